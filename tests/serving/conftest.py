"""Real servers for the tests, one for each transport, with a repository of tiny models.

Functions import what they need of gRPC and ONNX: tests of backends on a GPU run where these are not installed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from serving.protocol.tensors import DATATYPES, Array

if TYPE_CHECKING:
    import grpc
    import tritonclient.grpc as triton

    from serving.config import ServeConfig
    from serving.server import Server

SERVICE = "/inference.GRPCInferenceService/"
MAX_MESSAGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Served:
    """A server that runs in this process.

    Args:
        transport: "native" or "grpcio".
        target: the address for gRPC clients.
        channel: a gRPC channel to the server.
    """

    server: "Server"
    transport: str
    target: str
    channel: "grpc.Channel"


@pytest.fixture(scope="session")
def model_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the models of `tests.serving.onnx_models`."""
    from tests.serving.onnx_models import write_repository

    folder = tmp_path_factory.mktemp("models")
    write_repository(folder)
    return folder


@pytest.fixture(scope="session", params=["native", "grpcio"])
def served(request: pytest.FixtureRequest, model_repository: Path) -> Iterator[Served]:
    """A server with all models of `LOADED`, for each of the two transports."""
    from serving.config import ServeConfig
    from tests.serving.onnx_models import LOADED

    yield from serve(
        ServeConfig(
            model_repository=model_repository,
            model_control_mode="explicit",
            load_model=LOADED,
            transport=request.param,
            max_message_bytes=MAX_MESSAGE_BYTES,
            grpc_port=0,
            http_port=0,
            metrics_port=0,
            device="cpu",
            num_threads=1,
        )
    )


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator["triton.InferenceServerClient"]:
    """Triton's client, as an independent implementation."""
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(served.target) as connected:
        yield connected


def tensor(name: str, array: Array) -> "triton.InferInput":
    """Returns an input with raw contents."""
    import tritonclient.grpc as triton

    datatype = next(kind.name for kind in DATATYPES.values() if kind.dtype == array.dtype)
    infer_input = triton.InferInput(name, list(array.shape), datatype)
    infer_input.set_data_from_numpy(array)
    return infer_input


def serve(config: "ServeConfig") -> Iterator[Served]:
    """Yields a server with this configuration once it is ready, and stops it afterwards."""
    import grpc

    from serving.server import build_server

    server = build_server(config)
    server.start()
    try:
        server.load()
        target = f"127.0.0.1:{server.grpc.port}"
        with grpc.insecure_channel(target) as channel:
            yield Served(server, config.choose_transport()[0], target, channel)
    finally:
        server.drain()
        server.stop()
