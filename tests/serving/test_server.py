"""Server processes start, serve, follow their repository, drain and exit."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest

from protos import grpc_service_pb2 as pb
from protos import health_pb2
from serving.config import ServeConfig, TransportChoice
from serving.server import build_server
from tests.serving.model_files import scale
from tests.serving.server_process import READY, ServerProcess

PATIENCE_S = 120
MAX_FILES = 128
INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers that are killed at the end of the test."""
    with contextlib.ExitStack() as undo:

        def begin(*arguments: str, prefix: Sequence[str] = ()) -> ServerProcess:
            started = ServerProcess(*arguments, prefix=prefix)
            undo.callback(started.close)
            return started

        yield begin


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A repository with one model, whose version n multiplies by n."""
    publish(tmp_path / "models", 1)
    return tmp_path / "models"


def publish(repository: Path, version: int) -> None:
    """Publishes a version by one rename, as the trainer does."""
    staging = repository / "scale" / f".staging-{version}"
    staging.mkdir(parents=True)
    (staging / "model.onnx").write_bytes(scale(float(version)))
    config = repository / "scale" / "config.pbtxt"
    if not config.exists():
        config.write_text('name: "scale" backend: "onnxruntime" max_batch_size: 8\n')
    staging.rename(repository / "scale" / str(version))


def ask(channel: grpc.Channel, value: float = 1.0) -> float:
    """Sends a number to the model. Returns its output."""
    request = pb.ModelInferRequest(
        model_name="scale", raw_input_contents=[np.full((1, 3), value, np.float32).tobytes()]
    )
    request.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    call = channel.unary_unary(INFER, pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString)
    answer = call(request, timeout=60)
    return float(np.frombuffer(answer.raw_output_contents[0], np.float32)[0])


class Clients:
    """Threads that send requests without pause, and record the responses."""

    def __init__(self, target: str, number: int = 4) -> None:
        self.answers: list[float] = []
        self.failures: list[grpc.RpcError] = []
        self._over = threading.Event()
        self._target = target
        self._threads = [threading.Thread(target=self._ask) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        with grpc.insecure_channel(self._target) as channel:
            while not self._over.is_set():
                try:
                    self.answers.append(ask(channel))
                except grpc.RpcError as error:
                    self.failures.append(error)
                    return

    def wait_for(self, condition: Callable[[list[float]], bool]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not condition(self.answers):
            assert time.monotonic() < until, (len(self.answers), self.failures)
            self._over.wait(0.01)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)


def wait_until_not_serving(target: str) -> None:
    """Watches the server's health until it is NOT_SERVING."""
    with grpc.insecure_channel(target) as channel:
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert any(answer.status == health_pb2.HealthCheckResponse.NOT_SERVING for answer in watch)
        watch.cancel()


def test_metrics_and_health_are_told_while_connections_take_all_files(start, models: Path) -> None:
    prefix = ("prlimit", f"--nofile={MAX_FILES}:{MAX_FILES}")
    server = start("--model-repository", str(models), "--transport", "native", prefix=prefix)
    target = server.target().rpartition(":")
    ports = [int(target[2])] * MAX_FILES + [server.http_port(), server.metrics_port()] * 40
    with contextlib.ExitStack() as stack:
        for port in ports:  # each of them stays silent
            stack.enter_context(socket.create_connection((target[0], port), timeout=PATIENCE_S))
        server.wait_for("accept failed: Too many open files")
        for _ in range(5):
            assert httpx.get(f"http://127.0.0.1:{server.metrics_port()}/metrics").status_code == 200
            for port in (server.metrics_port(), server.http_port()):
                assert httpx.get(f"http://127.0.0.1:{port}/v2/health/ready").status_code == 200
    assert ask_once(server.target()) == 1


def ask_once(target: str) -> float:
    with grpc.insecure_channel(target) as channel:
        return ask(channel)


@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test_no_request_fails_during_a_drain(start, models: Path, transport: str) -> None:
    server = start("--model-repository", str(models), "--transport", transport, "--drain-delay-s", "2")
    target = server.target()
    clients = Clients(target)
    clients.wait_for(lambda answers: len(answers) > 50)
    threading.Timer(0.1, server.process.send_signal, [signal.SIGTERM]).start()
    wait_until_not_serving(target)
    served = len(clients.answers)
    clients.wait_for(lambda answers: len(answers) > served)
    clients.stop()
    assert clients.failures == []
    assert server.wait() == 0
    server.wait_for("stopped")


def ask_slow(channel: grpc.Channel, loops: int) -> grpc.Future:
    """Starts an inference of the model `slow`."""
    request = pb.ModelInferRequest(model_name="slow")
    request.inputs.add(name="loops", datatype="INT64", shape=[1, 1]).contents.int64_contents.append(loops)
    return channel.unary_unary(INFER, None, pb.ModelInferResponse.FromString).future(
        request.SerializeToString(), timeout=PATIENCE_S
    )


def wait_until_open(metrics_port: str, number: int) -> None:
    """Waits until a number of requests is in the queue or being computed."""
    until = time.monotonic() + PATIENCE_S
    wanted = f'convoy_open_requests{{model="slow",version="1"}} {number}.0\n'
    while wanted not in httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test_a_running_request_is_finished_without_a_drain_delay(start, model_repository: Path, transport: str) -> None:
    arguments = ["--model-control-mode", "explicit", "--load-model", "slow", "--transport", transport]
    server = start("--model-repository", str(model_repository), *arguments, "--drain-delay-s", "0")
    loops = 20_000  # a second and more
    with grpc.insecure_channel(server.target()) as channel:
        call = ask_slow(channel, loops)
        wait_until_open(server.wait_for(READY)[4], 1)
        server.process.terminate()
        server.wait_for("draining")
        assert not call.done()
        assert np.frombuffer(call.result().raw_output_contents[0], np.int64).tolist() == [loops]
    assert server.wait() == 0
    server.wait_for("stopped")


@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test_a_hanging_model_does_not_keep_the_process(start, model_repository: Path, transport: str) -> None:
    arguments = ["--model-control-mode", "explicit", "--load-model", "slow", "--transport", transport]
    server = start("--model-repository", str(model_repository), *arguments, "--grace-s", "0.5")
    with grpc.insecure_channel(server.target()) as channel:
        calls = [ask_slow(channel, 10**9)]  # the second request waits for the first, which never ends
        wait_until_open(server.wait_for(READY)[4], 1)
        calls.append(ask_slow(channel, 1))
        wait_until_open(server.wait_for(READY)[4], 2)
        server.process.terminate()
        assert server.wait() == 1
        assert {call.code() for call in calls} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    server.wait_for("the grace period is over: exiting with unfinished requests")


@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test_no_request_fails_while_versions_are_replaced(start, models: Path, transport: str) -> None:
    arguments = ["--model-control-mode", "poll", "--poll-interval-s", "0.1", "--transport", transport]
    server = start("--model-repository", str(models), *arguments)
    clients = Clients(server.target())
    for version in (2, 3, 4):
        publish(models, version)
        clients.wait_for(lambda answers, version=version: version in answers[-4:])
    clients.stop()
    assert clients.failures == []
    assert set(clients.answers) == {1.0, 2.0, 3.0, 4.0}
    server.process.terminate()
    assert server.wait() == 0


def test_a_bad_version_never_replaces_a_good_one(start, models: Path) -> None:
    server = start("--model-repository", str(models), "--model-control-mode", "poll", "--poll-interval-s", "0.1")
    with grpc.insecure_channel(server.target()) as channel:
        (models / "scale" / "2").mkdir()
        (models / "scale" / "2" / "model.onnx").write_bytes(b"half a model")
        server.wait_for("scale version 2")
        index = channel.unary_unary("/inference.GRPCInferenceService/RepositoryIndex")
        entries = pb.RepositoryIndexResponse.FromString(index(b"", timeout=60)).models
        assert {entry.version: entry.state for entry in entries} == {"1": "READY", "2": "UNAVAILABLE"}
        assert next(entry.reason for entry in entries if entry.version == "2")
        assert ask(channel, 5.0) == 5.0


def test_a_server_of_onnx_models_logs_json_and_loads_no_torch(start, models: Path) -> None:
    server = start("--model-repository", str(models), "--log-format", "json")
    ready = json.loads(server.wait_for("serving on").string)["message"]
    http_port = int(READY.search(ready)[3])  # type: ignore[index]
    assert httpx.get(f"http://127.0.0.1:{http_port}/v2/health/ready").status_code == 200
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "libtorch" not in maps
    assert all(json.loads(line)["message"] for line in server.lines)


def test_a_second_signal_ends_the_process_at_once(start, models: Path) -> None:
    server = start("--model-repository", str(models), "--drain-delay-s", "1000")
    server.target()
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == 128 + signal.SIGINT


@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test_a_unix_socket_in_use_is_reported_in_one_line(start, models: Path, tmp_path: Path, transport: str) -> None:
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "grpc.sock"))
        taken.listen()
        arguments = ["--transport", transport, "--grpc-socket", str(tmp_path / "grpc.sock")]
        server = start("--model-repository", str(models), *arguments)
        assert server.wait() == 2
    assert server.lines == [f"error: cannot listen on unix:{tmp_path}/grpc.sock: address already in use\n"]


def test_a_unix_socket(start, models: Path, tmp_path: Path) -> None:
    server = start("--model-repository", str(models), "--grpc-socket", str(tmp_path / "grpc.sock"))
    assert server.target() == f"unix:{tmp_path}/grpc.sock"
    with grpc.insecure_channel(server.target()) as channel:
        assert ask(channel, 3.0) == 3.0


@pytest.mark.parametrize("option", ["--grpc-port", "--http-port", "--metrics-port"])
def test_a_port_in_use_is_reported_in_one_line(start, models: Path, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = start("--model-repository", str(models), option, str(port))
        assert server.wait() == 2
    assert server.lines[-1].startswith("error: cannot listen on 127.0.0.1"), server.lines
    assert str(port) in server.lines[-1]
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-repository", "{tmp}/none"], "none"),
        (["--model-repository", "{tmp}/empty"], "empty"),
        (["--model-repository", "{tmp}/file"], "file"),
        (["--model-repository", "{models}", "--token-file", "{tmp}/no-token"], "no-token"),
        (["--model-repository", "{models}", "--tls-cert", "{tmp}/file", "--tls-key", "{tmp}/file"], "file"),
        (["--model-repository", "{models}", "--grpc-port", "99999"], "--grpc-port 99999"),
        (["--model-repository", "{models}", "--host", "no.such.host.invalid"], "cannot listen on no.such.host"),
    ],
)
def test_a_server_that_cannot_start_prints_one_line(start, models: Path, arguments: list[str], message: str) -> None:
    (models.parent / "empty").mkdir()
    (models.parent / "file").write_text("x")
    server = start(*[argument.format(tmp=models.parent, models=models) for argument in arguments])
    assert server.wait() == 2
    errors = [line for line in server.lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.parametrize("policy", [None, "active"])
def test_openmp_threads_do_not_spin_unless_the_environment_says_so(tmp_path: Path, policy: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "import os, sys; from serving.__main__ import main; main(sys.argv[1:]); print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run(
        [sys.executable, "-c", code, "--model-repository", str(tmp_path / "none")],
        env=environment | ({} if policy is None else {"OMP_WAIT_POLICY": policy}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == (policy or "passive")


def test_a_repository_without_permission_is_reported_in_one_line(start, models: Path) -> None:
    models.chmod(0)
    # Root can read everything, unless it drops these capabilities.
    unprivileged = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    server = start("--model-repository", str(models), prefix=unprivileged)
    assert server.wait() == 2
    assert "permission denied" in server.lines[-1].lower()


def test_sigterm_during_the_imports_ends_the_process(tmp_path: Path) -> None:
    """As process 1 of a container, it would ignore a signal that it does not handle."""
    code = """
import os, signal, sys
from serving.__main__ import main
class Finder:
    def find_spec(self, name, *anything):
        if name == "tyro":
            os.kill(os.getpid(), signal.SIGTERM)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.meta_path.insert(0, Finder())
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, "--model-repository", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_that_does_not_wake_the_main_thread_ends_the_wait() -> None:
    """Another thread receives the signal here: as when it arrives just before the main thread begins to wait."""
    code = """
import os, signal, threading, time
from serving.server import stop_signals
with stop_signals() as wait:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    assert wait() == signal.SIGTERM
"""
    subprocess.run([sys.executable, "-c", code], timeout=PATIENCE_S, check=True)


def test_sigterm_while_models_load(start, models: Path) -> None:
    server = start("--model-repository", str(models))
    server.wait_for("gRPC transport")
    server.process.terminate()
    assert server.wait() == 0
    server.wait_for("stopped")


@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test_a_stop_needs_no_new_thread(
    model_repository: Path, transport: TransportChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = build_server(
        ServeConfig(
            model_repository=model_repository,
            model_control_mode="explicit",
            load_model=("slow",),
            transport=transport,
            grpc_port=0,
            http_port=0,
            metrics_port=0,
        )
    )
    server.start()
    assert server.load() == ["slow version 1"]

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with grpc.insecure_channel(f"127.0.0.1:{server.grpc.port}") as channel:
        call = ask_slow(channel, 10_000)
        wait_until_open(str(server.http.metrics_port), 1)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        server.stop()
        monkeypatch.undo()
        assert np.frombuffer(call.result().raw_output_contents[0], np.int64).tolist() == [10_000]
    assert server.repository.index(ready_only=True) == []


def test_standard_error_that_nobody_reads_holds_up_nothing(models: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    options = ["--access-log", "--log-format", "json", "--http-port", str(port), "--num-threads", "1"]
    ports = ["--grpc-port", "0", "--metrics-port", "0", "--model-repository", str(models)]
    with subprocess.Popen([sys.executable, "-m", "serving", *options, *ports], stderr=write_end) as process:
        try:
            os.close(write_end)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
                until = time.monotonic() + PATIENCE_S
                while True:
                    assert time.monotonic() < until
                    with contextlib.suppress(httpx.ConnectError):
                        if client.get("/v2/health/ready").status_code == 200:
                            break
                    time.sleep(0.02)
                for _ in range(200):
                    assert client.get("/v2/models/scale").status_code == 200
                    assert client.get("/v2/models/none").status_code == 404
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            os.close(read_end)
