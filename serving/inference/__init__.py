"""The path of an inference: request, plan, batcher, response."""
