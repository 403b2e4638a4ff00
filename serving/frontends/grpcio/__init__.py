"""gRPC on grpcio, with TLS.

`frontend` is the server, `completion_queue` its path for ModelInfer, `handlers` all other RPCs, `streams` those among
them that stay open, `infer_stream` ModelStreamInfer, `rpc` the helpers that they share.
"""

from serving.frontends.grpcio.frontend import GrpcioFrontend

__all__ = ["GrpcioFrontend"]
