"""A server with a model that breaks: the health tells, and it is loaded again. Failing requests change nothing."""

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

from serving.config import ControlMode, ServeConfig
from serving.inference import batcher, instance
from tests.serving.conftest import Served, serve, tensor
from tests.serving.model_files import write_config, write_version

CONFIG = """
backend: "python" max_batch_size: 4 parameters { key: "commands" value { string_value: "%s" } }
input { name: "x" data_type: TYPE_FP32 dims: [ 3 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 3 ] }
"""
MODEL = """
import pathlib

def load(model):
    global commands, is_broken
    commands, is_broken = pathlib.Path(model.parameters["commands"]), False

def run(batch):
    global is_broken
    with (commands / "runs").open("a") as runs:
        runs.write(".")
    is_broken = is_broken or (commands / "break").exists()
    if is_broken or (commands / "fail").exists():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if (batch["x"] == 13).any():
        raise ValueError("no 13")
    return {"y": 2 * batch["x"]}
"""
TIMEOUT_S = 30


class Broken:
    """A server of the model `m`, which can be broken: for good until it is loaded again, or for a while."""

    def __init__(self, served: Served, commands: Path, client: triton.InferenceServerClient) -> None:
        self.commands = commands
        self.client = client
        self._health = f"http://127.0.0.1:{served.server.http.port}/v2/health"

    def infer(self, value: float) -> list[list[float]]:
        rows = np.full((1, 3), value, np.float32)
        result: list[list[float]] = self.client.infer("m", [tensor("x", rows)]).as_numpy("y").tolist()
        return result

    def fail(self, value: float = 1) -> str:
        """Sends a request that fails. Returns its status."""
        with pytest.raises(InferenceServerException) as error:
            self.infer(value)
        return str(error.value.status())

    def num_runs(self) -> int:
        return (self.commands / "runs").stat().st_size

    def health(self) -> tuple[int, int]:
        """Returns the status of the probes: ready and live."""
        return tuple(httpx.get(f"{self._health}/{probe}").status_code for probe in ("ready", "live"))  # type: ignore[return-value]

    def index(self) -> tuple[str, str]:
        """Returns the state of the model in the index, and the reason."""
        [entry] = self.client.get_model_repository_index().models
        return entry.state, entry.reason

    def break_down(self) -> None:
        """Sends requests that fail until the health tells."""
        statuses = set()
        until = time.monotonic() + TIMEOUT_S
        while self.health() == (200, 200):
            assert time.monotonic() < until
            statuses.add(self.fail())
        assert statuses <= {str(grpc.StatusCode.INTERNAL), str(grpc.StatusCode.UNAVAILABLE)}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[ControlMode], Broken]]:
    commands = tmp_path / "commands"
    commands.mkdir()
    write_config(tmp_path / "models" / "m", CONFIG % commands)
    write_version(tmp_path / "models" / "m", 1, MODEL.encode(), filename="model.py")
    stops = []

    def start(mode: ControlMode) -> Broken:
        config = ServeConfig(
            model_repository=str(tmp_path / "models"),
            model_control_mode=mode,
            poll_interval_s=0.1,
            transport="grpcio",
            grpc_port=0,
            http_port=0,
            metrics_port=0,
            device="cpu",
            num_threads=1,
            allow_model_code=True,
            grace_s=0.1,
        )
        served = serve(config)
        stops.append(served)
        running = next(served)
        client = triton.InferenceServerClient(running.target)
        stops.append(iter(client.close, None))
        return Broken(running, commands, client)

    yield start
    for stop in reversed(stops):
        next(stop, None)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until
        threading.Event().wait(0.02)


def test_a_model_that_stays_broken_is_not_ready_until_it_is_loaded_again(
    start: Callable[[ControlMode], Broken], caplog: pytest.LogCaptureFixture
) -> None:
    made = start("poll")
    assert made.infer(1) == [[2, 2, 2]]
    (made.commands / "break").touch()
    made.break_down()
    assert 200 not in made.health()
    assert made.fail() == str(grpc.StatusCode.UNAVAILABLE)
    wait_until(lambda: "; loading it again: the model fails on a batch of 4 rows: CUDA error" in made.index()[1])
    state, reason = made.index()
    assert state == "UNAVAILABLE"
    assert reason.startswith("the model is broken: its batches fail, and so does its own check: ")
    assert "an illegal memory access" in reason
    assert "retry in" in reason
    (made.commands / "break").unlink()
    wait_until(lambda: made.health() == (200, 200))
    assert made.infer(1) == [[2, 2, 2]]
    assert made.index() == ("READY", "")
    assert caplog.text.count("model 'm': an instance is broken: ") == 1


def test_without_polling_it_serves_again_once_its_check_passes(
    start: Callable[[ControlMode], Broken], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batcher, "_FIRST_PAUSE_S", 0.1)
    made = start("none")
    (made.commands / "fail").touch()
    made.break_down()
    state, reason = made.index()
    assert (state, "is broken" in reason, "retry" in reason) == ("UNAVAILABLE", True, False)
    (made.commands / "fail").unlink()
    wait_until(lambda: made.health() == (200, 200))
    assert made.infer(1) == [[2, 2, 2]]
    assert "model 'm': an instance that was broken passes its check and serves again" in caplog.text


def test_requests_that_a_model_cannot_compute_cause_few_checks_and_change_nothing(
    start: Callable[[ControlMode], Broken],
) -> None:
    made = start("poll")
    before = made.num_runs()
    for _ in range(5):
        for _ in range(instance.MAX_FAILED_BATCHES - 1):
            made.fail(13)
        made.infer(1)
    assert made.num_runs() - before == 5 * instance.MAX_FAILED_BATCHES, "good ones in between: no check"
    before = made.num_runs()
    assert {made.fail(13) for _ in range(30)} == {str(grpc.StatusCode.INTERNAL)}
    assert made.num_runs() - before == 30 + 1
    assert made.health() == (200, 200)
    assert made.infer(1) == [[2, 2, 2]]


def test_a_client_may_load_it_again(start: Callable[[ControlMode], Broken]) -> None:
    made = start("explicit")
    made.client.load_model("m")
    (made.commands / "break").touch()
    made.break_down()
    with pytest.raises(InferenceServerException, match="failed to load 'm', version 1: the model fails"):
        made.client.load_model("m")
    assert made.index()[0] == "UNAVAILABLE"
    (made.commands / "break").unlink()
    made.client.load_model("m")
    assert made.health() == (200, 200)
    assert made.infer(1) == [[2, 2, 2]]
