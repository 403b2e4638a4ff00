"""A server with a model that hangs: the health tells, other models serve and can be changed, and recovery is seen."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from serving.backends.onnx import OnnxBackend
from serving.config import ServeConfig
from tests.serving.conftest import Served, serve, tensor
from tests.serving.model_files import SCALE_CONFIG, scale, write_config, write_version

HANGS = 13.0
TIMEOUT_S = 30


@pytest.fixture
def free() -> Iterator[threading.Event]:
    """Set to let the backends go on that hang."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def hanging(tmp_path: Path, free: threading.Event, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server of the models `a` and `b`, whose backends hang on a row of 13. A batch may take half a second."""
    for name in "ab":
        write_config(tmp_path / name, SCALE_CONFIG)
        write_version(tmp_path / name, 1, scale(2))
    run = OnnxBackend.run

    def run_or_hang(backend: OnnxBackend, inputs):
        if (inputs[0] == HANGS).any():
            assert free.wait(TIMEOUT_S)
        return run(backend, inputs)

    monkeypatch.setattr(OnnxBackend, "run", run_or_hang)
    yield from serve(
        ServeConfig(
            model_repository=tmp_path,
            model_control_mode="explicit",
            load_model=("a", "b"),
            transport="grpcio",
            grpc_port=0,
            http_port=0,
            metrics_port=0,
            device="cpu",
            num_threads=1,
            batch_timeout_s=0.5,
            grace_s=5,
        )
    )


def infer(client: triton.InferenceServerClient, model: str, value: float) -> list[list[float]]:
    rows = np.full((1, 3), value, np.float32)
    return client.infer(model, [tensor("x", rows)]).as_numpy("y").tolist()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_health_tells_and_the_rest_of_the_server_works(hanging: Served, free: threading.Event) -> None:
    http = f"http://127.0.0.1:{hanging.server.http.port}/v2"
    with triton.InferenceServerClient(hanging.target) as client:
        assert client.is_server_live()
        with pytest.raises(InferenceServerException, match=r"did not finish the batch within 0\.5 s") as error:
            infer(client, "a", HANGS)
        assert error.value.status() == str(grpc.StatusCode.DEADLINE_EXCEEDED)
        wait_until(lambda: not client.is_model_ready("a"))
        assert not client.is_server_ready()
        assert not client.is_server_live(), "only a new process is sure to end this"
        assert httpx.get(f"{http}/health/live").status_code != 200
        assert httpx.get(f"{http}/health/ready").status_code != 200
        entries = {each.name: each for each in client.get_model_repository_index().models}
        assert (entries["a"].state, entries["b"].state) == ("UNAVAILABLE", "READY")
        assert "hangs" in entries["a"].reason
        with pytest.raises(InferenceServerException, match="hangs") as error:
            infer(client, "a", 1)
        assert error.value.status() == str(grpc.StatusCode.UNAVAILABLE)
        assert infer(client, "b", 2) == [[4, 4, 4]]
        free.set()
        wait_until(lambda: client.is_model_ready("a") and client.is_server_ready() and client.is_server_live())
        assert infer(client, "a", 3) == [[6, 6, 6]]


def test_a_model_that_hangs_can_be_unloaded_and_loaded(hanging: Served) -> None:
    with triton.InferenceServerClient(hanging.target) as client:
        with pytest.raises(InferenceServerException, match="did not finish the batch"):
            infer(client, "a", HANGS)
        began = time.monotonic()
        client.unload_model("a")
        assert client.is_server_live()
        client.load_model("a")
        assert infer(client, "a", 3) == [[6, 6, 6]]
        client.load_model("b")
        assert time.monotonic() - began < 10
