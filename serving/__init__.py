"""Serves a model repository over gRPC and HTTP. `python -m serving --help`; the flow is in `serving.server`."""
