"""Several processes behind one port: they look like one server."""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import grpc
import httpx
import numpy as np
import pytest

from protos import grpc_service_pb2 as pb
from serving.config import ServeConfig
from serving.workers import supervisor
from serving.workers.messages import State
from serving.workers.worker import HEARTBEAT_S
from tests.serving.model_files import scale, write_version
from tests.serving.server_process import ServerProcess

PATIENCE_S = 60
SERVICE = "/inference.GRPCInferenceService/"
RETRY_POLICY = {
    "methodConfig": [
        {
            "name": [{"service": "inference.GRPCInferenceService", "method": "ModelInfer"}],
            "waitForReady": True,
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ]
}
"""As docs/serving-operations.md shows it."""


def publish(repository: Path, name: str) -> None:
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(scale(2.0))
    (repository / name / "config.pbtxt").write_text(f'name: "{name}" backend: "onnxruntime" max_batch_size: 8\n')


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a server with two workers, which is killed at the end of the test."""
    publish(tmp_path / "models", "scale")
    publish(tmp_path / "models", "other")
    with contextlib.ExitStack() as undo:

        def begin(*arguments: str) -> ServerProcess:
            control = ["--model-control-mode", "explicit", "--load-model", "scale"]
            started = ServerProcess(
                "--model-repository", str(tmp_path / "models"), "--workers", "2", *control, *arguments
            )
            undo.callback(started.close)
            return started

        yield begin


def workers_of(server: ServerProcess) -> list[int]:
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def payload() -> bytes:
    request = pb.ModelInferRequest(model_name="scale", raw_input_contents=[np.ones((1, 3), np.float32).tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    encoded: bytes = request.SerializeToString()
    return encoded


def channel(server: ServerProcess, *options: tuple[str, str]) -> grpc.Channel:
    """Returns a channel with a connection of its own."""
    return grpc.insecure_channel(server.target(), options=[("grpc.use_local_subchannel_pool", 1), *options])


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def metrics(server: ServerProcess) -> str:
    return httpx.get(f"http://127.0.0.1:{server.metrics_port()}/metrics", timeout=PATIENCE_S).text


def value(server: ServerProcess, name: str) -> float:
    found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? ([\d.e+]+)$", metrics(server), re.MULTILINE)
    assert found, name
    return float(found[1])


def is_ready(server: ServerProcess) -> bool:
    url = f"http://127.0.0.1:{server.metrics_port()}/v2/health/ready"
    return httpx.get(url, timeout=PATIENCE_S).json() == {"ready": True}


class TestTwoWorkers:
    def test_they_serve_and_change_and_stop_as_one(self, start: Callable[..., ServerProcess], tmp_path: Path) -> None:
        server = start()
        target = server.target()
        assert len(workers_of(server)) == 2
        assert is_ready(server)
        assert len([line for line in server.lines if "serving on grpc" in line]) == 1
        num_calls, by_worker = 30, set()
        for number in range(num_calls):
            with channel(server) as own:
                own.unary_unary(f"{SERVICE}ModelInfer")(payload(), timeout=PATIENCE_S)
                if number < 20:
                    asked = own.unary_unary(f"{SERVICE}ModelStatistics")(b"", timeout=PATIENCE_S)
                    statistics = pb.ModelStatisticsResponse.FromString(asked)
                    by_worker.add(statistics.model_stats[0].inference_count)
        assert value(server, 'nv_inference_request_success{model="scale",version="1"}') == num_calls
        assert value(server, "process_resident_memory_bytes") > 2 * 30e6
        self._check_changes(server, tmp_path / "models")
        held = int(target.rpartition(":")[2])
        with socket.socket() as probe, pytest.raises(OSError, match="in use"):
            probe.bind(("127.0.0.1", held))
        assert server.stop() == 0
        assert sum("stopped" in line for line in server.lines) == 2

    def _check_changes(self, server: ServerProcess, models: Path) -> None:
        """A model that one worker loads is loaded by all, and the same for unloading and errors.

        Of a load that fails in part, all have the part that did not.
        """
        http = f"http://127.0.0.1:{server.http_port()}"

        def ready(name: str) -> set[int]:
            return {httpx.get(f"{http}/v2/models/{name}/ready").status_code for _ in range(12)}

        assert ready("other") == {400}
        repository = f"{http}/v2/repository/models"
        assert httpx.post(f"{repository}/other/load", json={}, timeout=PATIENCE_S).status_code == 200
        assert ready("other") == {200}
        with channel(server) as own:
            own.unary_unary(f"{SERVICE}RepositoryModelUnload")(
                pb.RepositoryModelUnloadRequest(model_name="other").SerializeToString(), timeout=PATIENCE_S
            )
        assert ready("other") == {400}
        assert httpx.post(f"{repository}/none/load", json={}, timeout=PATIENCE_S).status_code >= 400
        for version, content in ((2, scale(3.0)), (3, b"no model")):
            write_version(models / "other", version, content)
        failed = httpx.post(f"{repository}/other/load", json={}, timeout=PATIENCE_S)
        assert (failed.status_code, "version 3: ONNX Runtime" in failed.text) == (500, True)
        assert ready("other/versions/2") == {200}

    def test_a_port_in_use_is_one_line(self, start: Callable[..., ServerProcess]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            server = start("--http-port", str(port))
            assert server.wait() == 2
        assert server.lines == [f"error: cannot listen on 127.0.0.1 port {port}: Address already in use\n"]


@pytest.mark.minutes
class TestDeath:
    @pytest.mark.parametrize("transport", ["native", "grpcio"])
    def test_one_that_is_killed_under_load_fails_no_request_that_is_retried(
        self, start: Callable[..., ServerProcess], transport: str, tmp_path: Path
    ) -> None:
        server = start("--transport", transport)
        server.target()
        http = f"http://127.0.0.1:{server.http_port()}"
        loaded = httpx.post(f"{http}/v2/repository/models/other/load", json={}, timeout=PATIENCE_S)
        assert loaded.status_code == 200
        is_over = threading.Event()
        counts: Counter[str] = Counter()
        failures: list[str] = []
        threads = [
            threading.Thread(target=caller, args=(server, is_over, counts, failures), daemon=True)
            for caller in 5 * [self._call_grpc] + 3 * [self._call_http]
        ]
        for thread in threads:
            thread.start()
        until(lambda: min(counts["grpc"], counts["http"]) > 100)
        counted = value(server, 'nv_inference_request_success{model="scale",version="1"}')
        write_version(tmp_path / "models" / "scale", 2, scale(3.0))
        [killed, other] = workers_of(server)
        os.kill(killed, signal.SIGKILL)
        server.wait_for(r"was ended by SIGKILL: starting it again in 0\.25 s")
        assert not is_ready(server) or len(workers_of(server)) == 2
        until(lambda: len(workers_of(server)) == 2 and is_ready(server))
        before = Counter(counts)
        until(lambda: all(counts[kind] > before[kind] + 100 for kind in before))
        is_over.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert failures == []
        assert other in workers_of(server)
        assert value(server, 'nv_inference_request_success{model="scale",version="1"}') >= counted
        # The new worker has the models that were loaded by calls before.
        states = {httpx.get(f"{http}/v2/models/other/ready").status_code for _ in range(20)}
        assert states == {200}
        # It has no version that was exported since.
        names = {httpx.get(f"{http}/v2/models/scale").json()["versions"][-1] for _ in range(20)}
        assert names == {"1"}
        assert server.stop() == 0

    @staticmethod
    def _call_grpc(server: ServerProcess, is_over: threading.Event, counts: Counter[str], failures: list[str]) -> None:
        """Makes one call after the other, on a new connection now and then. gRPC itself retries."""
        while not is_over.is_set():
            with channel(server, ("grpc.service_config", json.dumps(RETRY_POLICY))) as own:
                infer = own.unary_unary(f"{SERVICE}ModelInfer")
                for _ in range(50):
                    try:
                        infer(payload(), timeout=PATIENCE_S)
                        counts["grpc"] += 1
                    except grpc.RpcError as error:
                        failures.append(f"{error.code()}: {error.details()}")

    @staticmethod
    def _call_http(server: ServerProcess, is_over: threading.Event, counts: Counter[str], failures: list[str]) -> None:
        """Makes one request after the other. Retries once, at once, on a new connection."""
        url = f"http://127.0.0.1:{server.http_port()}/v2/models/scale/infer"
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 1, 1]}]}
        client = httpx.Client(timeout=PATIENCE_S)
        while not is_over.is_set():
            for is_last in (False, True):
                try:
                    client.post(url, json=body).raise_for_status()
                    counts["http"] += 1
                    break
                except httpx.HTTPError as error:
                    client.close()
                    client = httpx.Client(timeout=PATIENCE_S)
                    if is_last:
                        failures.append(repr(error))
        client.close()

    def test_one_that_cannot_load_what_the_others_serve(
        self, start: Callable[..., ServerProcess], tmp_path: Path
    ) -> None:
        """An older version serves in its place; without one, the others have the port for themselves."""
        write_version(tmp_path / "models/scale", 2, scale(3.0))
        server = start()
        server.target()
        until(lambda: is_ready(server))
        url = f"http://127.0.0.1:{server.http_port()}/v2/models/scale"
        last = workers_of(server)[1]

        def kill_first() -> None:
            os.kill(next(pid for pid in workers_of(server) if pid != last), signal.SIGKILL)

        (tmp_path / "models/scale/2/model.onnx").write_bytes(b"damaged")
        kill_first()
        why = "version 2: ONNX Runtime cannot load"
        server.wait_for(f"'scale', of which other workers serve version 2: this one serves version 1: {why}")
        until(lambda: len(workers_of(server)) == 2 and is_ready(server))
        (tmp_path / "models/scale/1/model.onnx").write_bytes(b"damaged")
        kill_first()
        server.wait_for(f"cannot start: model 'scale', of which other workers serve version 2, does not load: .*{why}")
        assert not is_ready(server)
        assert {tuple(httpx.get(url, timeout=PATIENCE_S).json()["versions"]) for _ in range(20)} == {("2",)}
        write_version(tmp_path / "models/scale", 2, scale(3.0))
        until(lambda: len(workers_of(server)) == 2 and is_ready(server))
        assert server.stop() == 0

    def test_pauses_grow_and_workers_end_with_their_supervisor(self, start: Callable[..., ServerProcess]) -> None:
        server = start()
        server.target()
        for pause in ("0.25", "0.5"):
            until(lambda: is_ready(server))
            # The system lists children by their start, and may give a later one a smaller number.
            os.kill(workers_of(server)[0 if pause == "0.25" else -1], signal.SIGKILL)
            server.wait_for(rf"starting it again in {re.escape(pause)} s")
            time.sleep(1.1)  # the log has an error that repeats once a second
        until(lambda: is_ready(server))
        workers = workers_of(server)
        server.process.kill()
        until(lambda: not any(_lives(pid) for pid in workers))


def _lives(pid: int) -> bool:
    try:
        state: Any = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


class FakeWorker:
    """A worker for which the system has a process at the first and the fourth attempt."""

    made: ClassVar[list["FakeWorker | None"]] = []
    number = 1
    state = State()
    channel = SimpleNamespace(tell=lambda *message: None)

    def __init__(self, *arguments: Any) -> None:
        self.made.append(None if len(self.made) in (1, 2) else self)
        if self.made[-1] is None:
            raise BlockingIOError(11, "Resource temporarily unavailable")

    def describe_end(self) -> str:
        return "ended"


def test_a_worker_is_started_again_once_the_system_has_a_process_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "WorkerProcess", FakeWorker)
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.001)
    one = supervisor.Supervisor(ServeConfig(model_repository="models", workers=1))
    one._start_worker(1)
    one._on_exit(one._workers[1])
    assert one._workers[1] is FakeWorker.made[3]
    assert caplog.text.count("worker 1 cannot be started: [Errno 11] Resource temporarily unavailable: trying") == 2


@pytest.mark.minutes
def test_a_worker_that_hangs_as_a_whole_is_not_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, "scale")
    monkeypatch.setattr(supervisor, "SILENT_S", 5 * HEARTBEAT_S)
    config = ServeConfig(
        model_repository=str(tmp_path), workers=2, grpc_port=0, http_port=0, metrics_port=0, device="cpu"
    )
    with contextlib.ExitStack() as ports:
        server = supervisor.Supervisor(supervisor._hold_ports(config, ports))
        ports.callback(server.stop)
        server.start()
        until(server.is_ready)
        assert server.is_live()
        worker = server._workers[1]
        os.kill(worker.pid, signal.SIGSTOP)
        until(lambda: not server.is_live())
        assert not server.is_ready()
        os.kill(worker.pid, signal.SIGCONT)
        until(lambda: server.is_live() and server.is_ready())
