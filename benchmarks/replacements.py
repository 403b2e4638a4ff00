"""Replaces servers and model versions under load, again and again: no request may fail.

    python benchmarks/replacements.py [--swaps 100] [--replacements 100] [--transports native grpcio]

- Hot swaps: one server in poll mode; a new version is published by a rename, and the one before the last is deleted.
  Clients of gRPC and HTTP call without pause. Every answer must be of the newest version or the one before it.
- Rolling replacements: three servers behind one client, which knows four addresses. A new server starts on the free
  one; once it is ready, the oldest is ended with SIGTERM, as Kubernetes does with `maxSurge: 1, maxUnavailable: 0`.

Writes `benchmarks/results/replacements-DATE.md`; exit code 1 if a request failed or a server's exit code was not 0.
"""

import argparse
import datetime
import http.client
import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.fuzz import machine  # noqa: E402
from serving.client import Client  # noqa: E402
from tests.serving.model_files import scale  # noqa: E402
from tests.serving.server_process import READY, ServerProcess  # noqa: E402

NUM_CALLERS = 4
NUM_SERVERS = 3
POLL_S = 0.2
DRAIN_S = 0.5
"""How long a server serves on after SIGTERM, for clients that know only its address."""
SETTLE_S = 0.3
"""Pause under load between two changes."""

X = np.full((1, 3), 2.0, np.float32)

Call = Callable[[], tuple[float, float]]
"""Sends a request. Returns the version that answered, and the version by which the answer multiplied."""


@dataclass
class Load:
    """Callers without pause, each on a thread of its own.

    Args:
        oldest: the oldest version that may still answer.
    """

    calls: list[Call]
    oldest: int = 1
    times_ms: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator["Load"]:
        over = threading.Event()
        threads = [threading.Thread(target=self._run, args=(call, over)) for call in self.calls]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def _run(self, call: Call, over: threading.Event) -> None:
        while not over.wait(0.002):
            oldest, began = self.oldest, time.monotonic()
            try:
                version, factor = call()
                if factor != version or version < oldest:
                    self.failures.append(f"version {version} answered {factor}, and {oldest} is the oldest")
            except Exception as error:
                self.failures.append(f"{time.strftime('%H:%M:%S')} {error!r}")
            self.times_ms.append(1000 * (time.monotonic() - began))

    def summary(self) -> str:
        times = sorted(self.times_ms)
        return (
            f"{len(times):,} | {len(self.failures)} | {statistics.median(times):.2f}, "
            f"{times[int(0.99 * len(times))]:.1f}, {times[-1]:.0f} ms"
        )


def grpc_call(client: Client) -> Call:
    def call() -> tuple[float, float]:
        answer = client.infer("scale", {"x": X}, timeout_s=20)
        return float(answer.version), float(answer["y"][0, 0] / X[0, 0])

    return call


def http_call(connection: http.client.HTTPConnection) -> Call:
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": X.ravel().tolist()}]})

    def call() -> tuple[float, float]:
        connection.request("POST", "/v2/models/scale/infer", body)
        answer = json.load(connection.getresponse())
        return float(answer["model_version"]), answer["outputs"][0]["data"][0] / float(X[0, 0])

    return call


def publish(repository: Path, version: int) -> None:
    """Publishes a version that multiplies by its number, by one rename, and deletes the one before the last."""
    staging = repository / "scale" / f".staging-{version}"
    staging.mkdir(parents=True)
    (staging / "model.onnx").write_bytes(scale(float(version)))
    (repository / "scale" / "config.pbtxt").touch()
    staging.rename(repository / "scale" / str(version))
    old = repository / "scale" / str(version - 2)
    if old.exists():
        (old / "model.onnx").unlink()
        old.rmdir()


def write_models(repository: Path) -> None:
    (repository / "scale").mkdir(parents=True)
    (repository / "scale" / "config.pbtxt").write_text('name: "scale" backend: "onnxruntime" max_batch_size: 8\n')
    publish(repository, 1)


@dataclass
class Outcome:
    """The outcome of one kind of change with one transport."""

    name: str
    changes: int
    seconds: float
    load: Load
    notes: str
    exit_codes: list[int]


def swap(transport: str, repository: Path, swaps: int) -> Outcome:
    """Publishes version after version under load."""
    write_models(repository)
    arguments = ["--model-repository", str(repository), "--transport", transport, "--device", "cpu"]
    arguments += ["--model-control-mode", "poll", "--poll-interval-s", str(POLL_S)]
    server = ServerProcess(*arguments)
    try:
        over_http = http.client.HTTPConnection("127.0.0.1", server.http_port(), timeout=20)
        with Client(server.target()) as client, closing(over_http):
            calls = [grpc_call(client) for _ in range(NUM_CALLERS - 1)] + [http_call(over_http)]
            began = time.monotonic()
            with Load(calls).running() as load:
                time.sleep(SETTLE_S)
                memory = [server.resident_mb()]
                for version in range(2, swaps + 2):
                    publish(repository, version)
                    server.wait_for(f"scale version {version} ready")
                    load.oldest = version - 1
                    time.sleep(SETTLE_S)
                    memory.append(server.resident_mb())
        seconds = time.monotonic() - began
        early = memory[min(10, swaps)]
        notes = f"memory after {min(10, swaps)} swaps {early:.0f} MB, at the end {memory[-1]:.0f} MB"
        return Outcome(f"hot swaps, {transport}", swaps, seconds, load, notes, [server.stop()])
    finally:
        server.close()


class Fleet:
    """Servers on four addresses, of which three are in use."""

    def __init__(self, transport: str, repository: Path, undo: ExitStack) -> None:
        self._arguments = ["--model-repository", str(repository), "--transport", transport, "--device", "cpu"]
        self._arguments += ["--drain-delay-s", str(DRAIN_S)]
        self._undo = undo
        self._ports = free_ports(NUM_SERVERS + 1)
        self._running: list[tuple[int, ServerProcess]] = []
        self.target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in self._ports)
        for _ in range(NUM_SERVERS):
            self._start()

    def _start(self) -> None:
        used = [port for port, _ in self._running]
        port = next(port for port in self._ports if port not in used)
        server = ServerProcess(*self._arguments, "--grpc-port", str(port))
        self._undo.callback(server.close)
        server.wait_for(READY)
        self._running.append((port, server))

    def replace(self) -> int:
        """Starts a new server, and ends the oldest. Returns its exit code."""
        self._start()
        _, old = self._running[0]
        code = old.stop()
        del self._running[0]
        return code


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [int(listener.getsockname()[1]) for listener in sockets]


def roll(transport: str, repository: Path, replacements: int) -> Outcome:
    """Replaces the servers one after the other under load."""
    write_models(repository)
    with ExitStack() as undo:
        fleet = Fleet(transport, repository, undo)
        client = undo.enter_context(Client(fleet.target))
        began = time.monotonic()
        with Load([grpc_call(client) for _ in range(NUM_CALLERS)]).running() as load:
            time.sleep(SETTLE_S)
            codes = []
            for _ in range(replacements):
                codes.append(fleet.replace())
                time.sleep(SETTLE_S)
        seconds = time.monotonic() - began
    return Outcome(f"rolling replacements, {transport}", replacements, seconds, load, f"{NUM_SERVERS} servers", codes)


def table(outcomes: list[Outcome]) -> list[str]:
    lines = [
        f"# Replacements under load, {datetime.datetime.now(datetime.UTC).date()}",
        "",
        f"`{' '.join(['python', 'benchmarks/replacements.py', *sys.argv[1:]])}`, on {machine()}.",
        "",
        "| what | number | seconds | requests | failed | median, p99, longest | |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        lines.append(
            f"| {outcome.name} | {outcome.changes} | {outcome.seconds:.0f} | {outcome.load.summary()} "
            f"| {outcome.notes} |"
        )
    return [*lines, ""]


def failures(outcome: Outcome) -> list[str]:
    """Returns one sentence for everything that is wrong."""
    found = [f"{outcome.name}: {failure}" for failure in outcome.load.failures]
    return found + [f"{outcome.name}: exit code {code}" for code in outcome.exit_codes if code != 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=100, help="for each transport")
    parser.add_argument("--replacements", type=int, default=100, help="for each transport")
    parser.add_argument("--transports", nargs="+", choices=("native", "grpcio"), default=("native", "grpcio"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    outcomes = []
    for transport in options.transports:
        for change, number in ((swap, options.swaps), (roll, options.replacements)):
            if number:
                with tempfile.TemporaryDirectory() as name:
                    outcomes.append(change(transport, Path(name) / "models", number))
                print(f"{outcomes[-1].name}: {outcomes[-1].load.summary()}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"replacements-{datetime.datetime.now(datetime.UTC).date()}.md"
    path.write_text("\n".join(table(outcomes)))
    wrong = [failure for outcome in outcomes for failure in failures(outcome)]
    sys.exit("error: " + "; ".join(wrong[:10]) if wrong else 0)


if __name__ == "__main__":
    main()
