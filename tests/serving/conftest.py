"""Real servers for the tests: one for each transport, over a repository of tiny models."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import tritonclient.grpc as triton

from serving.config import ServeConfig
from serving.protocol.tensors import DATATYPES, Array
from serving.server import Server
from tests.serving.onnx_models import LOADED, write_repository

SERVICE = "/inference.GRPCInferenceService/"
MAX_MESSAGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Served:
    """A server in this process.

    Args:
        target: for gRPC clients.
        channel: to it.
    """

    server: Server
    target: str
    channel: grpc.Channel


@pytest.fixture(scope="session")
def model_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of `tests.serving.models`."""
    folder = tmp_path_factory.mktemp("models")
    write_repository(folder)
    return folder


@pytest.fixture(scope="session", params=["native", "grpcio"])
def served(request: pytest.FixtureRequest, model_repository: Path) -> Iterator[Served]:
    """A server with all models that are loaded at first, on each of the two transports."""
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
def client(served: Served) -> Iterator[triton.InferenceServerClient]:
    """An independent client."""
    with triton.InferenceServerClient(served.target) as connected:
        yield connected


def tensor(name: str, array: Array) -> triton.InferInput:
    """An input with raw contents."""
    datatype = next(kind.name for kind in DATATYPES.values() if kind.dtype == array.dtype)
    given = triton.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array)
    return given


def serve(config: ServeConfig) -> Iterator[Served]:
    """The server of a configuration, ready, until the generator is closed."""
    server = Server(config)
    server.start()
    try:
        server.load()
        target = f"127.0.0.1:{server.grpc.port}"
        with grpc.insecure_channel(target) as channel:
            yield Served(server, target, channel)
    finally:
        server.drain()
        server.stop()
