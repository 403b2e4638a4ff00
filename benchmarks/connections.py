"""Measures what idle and slow connections cost the callers beside them.

    python benchmarks/connections.py [--idle 2000] [--slow 500] [--rounds 3] [--seconds 10] [--fronts …]

Idle connections say nothing (HTTP) or only HTTP/2's greeting (gRPC). Slow ones drip a valid request, a byte a second;
those that the server closes are opened again. Good callers send requests at a fixed rate over connections of their own,
without and with the others, in turn. Writes `benchmarks/results/connections-DATE.md`; exit code 1 if a good request
failed, or if the median of the good callers' times, over the rounds, is more than `LIMIT` times that without the
others. The ratio of the 99th percentiles is shown too.
"""

import argparse
import datetime
import http.client
import json
import multiprocessing
import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.fuzz import machine  # noqa: E402
from benchmarks.open_loop import PREFACE, frame, request_frames, request_head  # noqa: E402
from protos import grpc_service_pb2 as pb  # noqa: E402
from serving.protocol.methods import INFER  # noqa: E402
from tests.serving.onnx_models import write_repository  # noqa: E402
from tests.serving.server_process import ServerProcess  # noqa: E402

FRONTS = ("native", "grpcio", "http")
LIMIT = 1.5
NUM_CALLERS = 4
CALLS_PER_SECOND = 50
"""Of each caller."""
DRIP_S = 1.0
MODEL = "spare"
"""Of `tests.serving.onnx_models`: one that waits for no other requests."""

X = np.arange(4, dtype=np.float32).reshape(1, 4)


GREETING = PREFACE + frame(4, 0, 0, b"")
"""The client's preface and empty settings."""


def grpc_payload() -> bytes:
    message = pb.ModelInferRequest(model_name=MODEL, raw_input_contents=[X.tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=X.shape)
    return message.SerializeToString()


def http_body() -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": list(X.shape), "data": X.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def http_request() -> bytes:
    body = http_body()
    head = f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Crowd:
    """Idle and slow connections to one port.

    Args:
        greeting: what each connection sends at once.
        request: what slow connections then drip, again and again.
    """

    def __init__(self, port: int, greeting: bytes, request: bytes, *, idle: int, slow: int) -> None:
        self._port, self._greeting, self._request = port, greeting, request
        self._idle = [self._open() for _ in range(idle)]
        self._slow = [self._open() for _ in range(slow)]
        self._places = [place % len(request) for place in range(slow)]
        self.num_reopened = 0
        for connection, place in zip(self._slow, self._places, strict=True):
            self._send(connection, request[:place])

    def _open(self) -> socket.socket | None:
        try:
            connection = socket.create_connection(("127.0.0.1", self._port), 10)
            connection.sendall(self._greeting)
            connection.setblocking(False)
            return connection
        except OSError:
            return None

    def drip(self, over: Callable[[], bool]) -> None:
        """Sends a byte on each slow connection, evenly over `DRIP_S`, and opens again what the server closed."""
        while not over():
            began = time.monotonic()
            for number in range(len(self._slow)):
                self._step(number)
                if number % 10 == 9:
                    time.sleep(max(0.0, began + DRIP_S * number / len(self._slow) - time.monotonic()))
            self._reopen_idle()
            time.sleep(max(0.0, began + DRIP_S - time.monotonic()))

    def _step(self, number: int) -> None:
        place = self._places[number]
        if self._send(self._slow[number], self._request[place : place + 1]):
            self._places[number] = (place + 1) % len(self._request)
        else:
            self._slow[number] = self._replace(self._slow[number])
            self._places[number] = 0

    def _reopen_idle(self) -> None:
        for number, connection in enumerate(self._idle):
            if not self._send(connection, b""):
                self._idle[number] = self._replace(connection)

    def _replace(self, connection: socket.socket | None) -> socket.socket | None:
        if connection is not None:
            connection.close()
        self.num_reopened += 1
        return self._open()

    def _send(self, connection: socket.socket | None, data: bytes) -> bool:
        """Sends, and drops what has arrived. Returns whether the connection is still open."""
        if connection is None:
            return False
        try:
            if data:
                connection.send(data)
            with suppress(BlockingIOError):
                return connection.recv(65536) != b""
        except OSError:
            return False
        return True

    def num_open(self) -> int:
        return sum(connection is not None for connection in (*self._idle, *self._slow))


def hold_crowd(port: int, parts: tuple[bytes, bytes], idle: int, slow: int, pipe: Connection) -> None:
    """Holds a crowd, in a process of its own, until something arrives on the pipe."""
    allow_files(idle + slow + 200)
    crowd = Crowd(port, *parts, idle=idle, slow=slow)
    pipe.send(None)
    crowd.drip(pipe.poll)
    pipe.send((crowd.num_open(), crowd.num_reopened))


@dataclass
class Caller:
    """Sends good requests at a fixed rate for some seconds.

    Args:
        call: sends one request and returns whether the answer is right.
    """

    call: Callable[[], bool]
    seconds: float
    times_ms: list[float] = field(default_factory=list)
    num_failed: int = 0

    def run(self) -> None:
        began = time.monotonic()
        for number in range(int(self.seconds * CALLS_PER_SECOND)):
            time.sleep(max(0.0, began + number / CALLS_PER_SECOND - time.monotonic()))
            start = time.monotonic()
            try:
                is_right = self.call()
            except (OSError, grpc.RpcError, http.client.HTTPException):
                is_right = False
            self.num_failed += not is_right
            self.times_ms.append(1000 * (time.monotonic() - start))


@contextmanager
def grpc_caller(port: int) -> Iterator[Callable[[], bool]]:
    payload = grpc_payload()
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        infer = channel.unary_unary(INFER, None, pb.ModelInferResponse.FromString)
        yield lambda: infer(payload, timeout=10).raw_output_contents[0] == X.tobytes()


@contextmanager
def http_caller(port: int) -> Iterator[Callable[[], bool]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    body = http_body()

    def call() -> bool:
        try:
            connection.request("POST", f"/v2/models/{MODEL}/infer", body)
            response = connection.getresponse()
            return response.status == 200 and json.load(response)["outputs"][0]["data"] == X.ravel().tolist()
        except (OSError, http.client.HTTPException):
            connection.close()
            raise

    yield call
    connection.close()


def measure_callers(front: str, port: int, seconds: float) -> tuple[list[float], int]:
    """Returns the times of the good callers' requests in ms, sorted, and how many failed."""
    make = http_caller if front == "http" else grpc_caller
    callers = []

    def run() -> None:
        with make(port) as call:
            call()
            caller = Caller(call, seconds)
            callers.append(caller)
            caller.run()

    threads = [threading.Thread(target=run) for _ in range(NUM_CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(callers) < NUM_CALLERS:
        return [float("inf")], NUM_CALLERS - len(callers)
    times = sorted(time_ms for caller in callers for time_ms in caller.times_ms)
    return times, sum(caller.num_failed for caller in callers)


def measure(front: str, port: int, *, idle: int, slow: int, seconds: float) -> dict[str, float]:
    """Measures the good callers without and with the others."""
    alone, failed_alone = measure_callers(front, port, seconds)
    greeting, request = b"", http_request()
    if front != "http":
        greeting, request = GREETING, request_frames(1, request_head(INFER), grpc_payload())
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    crowd = spawn.Process(target=hold_crowd, args=(port, (greeting, request), idle, slow, theirs), daemon=True)
    crowd.start()
    ours.recv()
    beside, failed = measure_callers(front, port, seconds)
    ours.send(None)
    num_open, num_reopened = ours.recv()
    crowd.join()
    return {
        "alone_ms": statistics.median(alone),
        "alone_p99_ms": alone[int(0.99 * len(alone))],
        "beside_ms": statistics.median(beside),
        "beside_p99_ms": beside[int(0.99 * len(beside))],
        "failed": failed + failed_alone,
        "open": num_open,
        "reopened": num_reopened,
    }


def allow_files(number: int) -> None:
    """Raises this process's soft limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(number, hard), hard))


def measure_front(front: str, repository: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    transport = "native" if front == "http" else front
    arguments = [
        "--model-control-mode",
        "explicit",
        "--load-model",
        MODEL,
        "--transport",
        transport,
        "--device",
        "cpu",
    ]
    server = ServerProcess("--model-repository", str(repository), *arguments)
    try:
        port = server.http_port() if front == "http" else int(server.target().rpartition(":")[2])
        rounds = []
        for _ in range(options.rounds):
            rounds.append(measure(front, port, idle=options.idle, slow=options.slow, seconds=options.seconds))
            print(front, {key: round(value, 2) for key, value in rounds[-1].items()}, flush=True)
        return rounds
    finally:
        server.stop()
        server.close()


def median(rounds: list[dict[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in rounds)


def ratio(rounds: list[dict[str, float]], percentile: str = "") -> float:
    """Returns the median over the rounds of the good callers' times beside the others, over those alone."""
    return statistics.median(one[f"beside{percentile}_ms"] / one[f"alone{percentile}_ms"] for one in rounds)


def table(found: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> list[str]:
    lines = [
        f"# Idle and slow connections, {datetime.datetime.now(datetime.UTC).date()}",
        "",
        f"`{' '.join(['python', 'benchmarks/connections.py', *sys.argv[1:]])}`, on {machine()}.",
        "",
        f"{options.idle:,} idle and {options.slow:,} dripping connections beside {NUM_CALLERS} callers with "
        f"{CALLS_PER_SECOND} requests per second each; medians of {options.rounds} rounds of {options.seconds:g} s. "
        "Connections that the server closed were opened again.",
        "",
        "| front end | alone: median, p99 | beside them: median, p99 | ratio of medians | of p99 | failed | reopened |",
        "|---|---|---|---|---|---|---|",
    ]
    for front, rounds in found.items():
        lines.append(
            f"| {front} | {median(rounds, 'alone_ms'):.2f}, {median(rounds, 'alone_p99_ms'):.2f} ms | "
            f"{median(rounds, 'beside_ms'):.2f}, {median(rounds, 'beside_p99_ms'):.2f} ms | {ratio(rounds):.2f} | "
            f"{ratio(rounds, '_p99'):.2f} | {sum(one['failed'] for one in rounds):.0f} | "
            f"{sum(one['reopened'] for one in rounds):.0f} |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=int, default=2000)
    parser.add_argument("--slow", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each measurement")
    parser.add_argument("--fronts", nargs="+", choices=FRONTS, default=FRONTS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        repository = Path(name) / "models"
        write_repository(repository)
        found = {front: measure_front(front, repository, options) for front in options.fronts}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"connections-{datetime.datetime.now(datetime.UTC).date()}.md"
    path.write_text("\n".join(table(found, options)))
    wrong = [f"{front}: {ratio(rounds):.2f} times" for front, rounds in found.items() if ratio(rounds) > LIMIT]
    wrong += [f"{front}: failed requests" for front, rounds in found.items() if any(one["failed"] for one in rounds)]
    sys.exit("error: " + "; ".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
