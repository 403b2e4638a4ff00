"""gRPC over grpcio, with TLS.

`transport` is the server, `address` what it listens on, `lane` the short way of ModelInfer, `handlers` all other RPCs,
`streams` those among them that stay open, `infer_stream` one of these, `rpc` what they share.
"""

from serving.frontends.grpcio.frontend import GrpcioFrontend

__all__ = ["GrpcioFrontend"]
