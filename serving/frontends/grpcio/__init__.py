"""gRPC on grpcio, with TLS.

`frontend` is the server. `completion_queue` takes ModelInfer, all other unary RPCs and Watch without a thread for each;
`calls` is one of them. The RPCs of `handlers` have a thread each: those that stay open (`streams`, `infer_stream`), and
all where grpcio's core is not as `completion_queue` knows it. `rpc` has the helpers that they share.
"""

from serving.frontends.grpcio.frontend import GrpcioFrontend

__all__ = ["GrpcioFrontend"]
