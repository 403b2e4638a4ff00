"""Messages and tensors of the Open Inference Protocol, over gRPC and HTTP, and how errors map to status codes."""
