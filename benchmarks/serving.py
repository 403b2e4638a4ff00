"""Compares the server with Triton and MLServer, in one run on one machine.

    python benchmarks/serving.py --model models/mnist/1/model.onnx --peers FOLDER [--rounds 3] [--seconds 5]

FOLDER holds `triton.sh` and `mlserver.sh`. Each takes the path of an ONNX model and a port, and serves the model as
`peer`. All servers compute with ONNX Runtime on one thread. They take turns (A B C A B C), because the speed of a
shared machine changes by the minute; the results are medians over the rounds, and ratios within the run. h2load
generates the load; for the curve of latency against load `open_loop.py` does, at 10 % to 95 % of the most requests a
second that h2load got. CPU time includes all children of a server, from /proc. Writes
`benchmarks/results/serving-DATE.json`, and a table of it in Markdown.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.h2load import (  # noqa: E402
    INFER,
    measure_load,
    resident_mb,
    write_framed,
)
from benchmarks.open_loop import send_at_rate  # noqa: E402
from protos import grpc_service_pb2 as pb  # noqa: E402

TIMEOUT_S = 120
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
"""Of a server's capacity: the rates of the curve of latency against load."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server under test. `PORT` in its command stands for its gRPC port."""

    name: str
    command: list[str]
    http: bool = False


def servers(repository: Path, model: Path, peers: Path | None) -> dict[str, Server]:
    """Returns all servers by name."""
    own = [
        sys.executable, "-m", "serving", "--model-repository", str(repository), "--num-threads", "1",
        "--grpc-port", "PORT", "--http-port", "0", "--metrics-port", "0",
    ]  # fmt: skip
    found = {
        "convoy native": Server("convoy native", [*own, "--transport", "native"]),
        "convoy grpcio": Server("convoy grpcio", [*own, "--transport", "grpcio"]),
    }
    if peers is not None:
        found["triton"] = Server("triton", [str(peers / "triton.sh"), str(model), "PORT"])
        found["mlserver"] = Server("mlserver", [str(peers / "mlserver.sh"), str(model), "PORT"])
    return found


@contextlib.contextmanager
def running(server: Server, extra: tuple[str, ...] = ()) -> Iterator[tuple[int, int, float]]:
    """Runs a server. Yields its port, its process id and the seconds from start to the first response."""
    port = free_port()
    command = [str(port) if part == "PORT" else part for part in (*server.command, *extra)]
    began = time.monotonic()
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        wait_until_ready(port, process)
        yield port, process.pid, time.monotonic() - began
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        if process.poll() is not None:
            sys.exit(f"error: a server has ended: {process.args}")
        with contextlib.suppress(OSError, grpc.RpcError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            send_request(port, REQUEST)
            return
        time.sleep(0.02)
    sys.exit(f"error: a server does not respond: {process.args}")


REQUEST = b""


def send_request(port: int, payload: bytes) -> pb.ModelInferResponse:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        response: pb.ModelInferResponse = pb.ModelInferResponse.FromString(
            channel.unary_unary(INFER)(payload, timeout=5)
        )
        return response


def request(images: np.ndarray, request_id: str = "") -> bytes:
    """Returns a serialised ModelInferRequest with these images for the model `peer`."""
    message = pb.ModelInferRequest(model_name="peer", id=request_id, raw_input_contents=[images.tobytes()])
    message.inputs.add(name="images", datatype="UINT8", shape=images.shape)
    return message.SerializeToString()


def bare_cpu_us(model: Path, images: np.ndarray, seconds: float) -> float:
    """Measures the CPU time of `InferenceSession.run` on these images, in a separate process with one thread."""
    script = f"""
import numpy as np, onnxruntime, time
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession({str(model)!r}, options, providers=["CPUExecutionProvider"])
images = np.random.default_rng(0).integers(0, 256, {images.shape}).astype(np.uint8)
for _ in range(20): session.run(None, {{"images": images}})
began, until, runs = time.process_time(), time.monotonic() + {seconds}, 0
while time.monotonic() < until: session.run(None, {{"images": images}}); runs += 1
print((time.process_time() - began) * 1e6 / runs)
"""
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def measure_round(
    found: dict[str, Server], one: Path, many: Path, model: Path, images: np.ndarray, seconds: float
) -> dict[str, Any]:
    """Measures each server in turn under each kind of load."""
    seen: dict[str, Any] = {}
    for name, server in found.items():
        with running(server) as (port, pid, ready_s):
            idle_mb = resident_mb(pid)
            loads = {f"c={c}": measure_load(port, pid, one, seconds, c) for c in (1, 32, 128)}
            loads["64 images, c=8"] = measure_load(port, pid, many, seconds, 8)
            capacity = max(loads[key].requests_per_second for key in ("c=32", "c=128"))
            curve = measure_curve(port, seconds, capacity)
            seen[name] = {
                "ready_s": ready_s,
                "resident_mb_idle": idle_mb,
                "resident_mb_after": resident_mb(pid),
                "loads": {key: dataclasses.asdict(value) for key, value in loads.items()},
                "curve": curve,
            }
        print(
            f"  {name}: "
            + "; ".join(
                f"{key} {value.cpu_us_per_request:.0f} us CPU, {value.requests_per_second:.0f}/s"
                for key, value in loads.items()
            ),
            flush=True,
        )
    seen["bare run of 64 images"] = {"cpu_us": bare_cpu_us(model, images, seconds)}
    return seen


def measure_curve(port: int, seconds: float, capacity: float) -> dict[str, dict[str, float]]:
    """Measures the latency of single images at fixed rates. Returns the results by share of the capacity."""
    curve = {}
    for share in SHARES:
        result = send_at_rate(port, INFER, REQUEST, per_second=share * capacity, seconds=seconds)
        times = sorted(result.latencies_us) or [float("nan")]
        curve[f"{share:.0%}"] = {
            "median_us": statistics.median(times),
            "p99_us": times[int(0.99 * len(times))],
            "requests_per_second": len(result.latencies_us) / seconds,
            "failed": result.num_failed,
        }
    return curve


def measure_overload(server: Server, many: Path, seconds: float) -> dict[str, float]:
    """Measures responses per second at capacity and at six times the load, and the time of refusals."""
    with running(server, ("--max-queue-size", "32")) as (port, pid, _):
        best = measure_load(port, pid, many, seconds, 16).requests_per_second
        before = successes(port)
        refusals = Refusals(port)
        began = time.monotonic()
        overloaded = measure_load(port, pid, many, seconds, 512, per_second=6 * best)
        good = (successes(port) - before) / (time.monotonic() - began)
        times = refusals.stop()
    return {
        "best_per_second": best,
        "asked_per_second": overloaded.requests_per_second,
        "good_per_second": good,
        "refusal_median_ms": statistics.median(times) if times else float("nan"),
        "num_refusals_timed": len(times),
    }


def successes(port: int) -> int:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelStatistics")
        response = pb.ModelStatisticsResponse.FromString(call(b"", timeout=30))
        return int(response.model_stats[0].inference_stats.success.count)


class Refusals:
    """Eight clients beside the overload that send fifty requests per second each, and time their refusals."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._times: list[float] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._send_requests, daemon=True) for _ in range(8)]
        for thread in self._threads:
            thread.start()

    def _send_requests(self) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{self._port}") as channel:
            call = channel.unary_unary(INFER)
            while not self._over.wait(0.02):
                began = time.monotonic()
                try:
                    call(REQUEST, timeout=10)
                except grpc.RpcError as error:
                    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                        self._times.append(1000 * (time.monotonic() - began))

    def stop(self) -> list[float]:
        """Stops the clients. Returns the milliseconds of each refusal."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        return self._times


def median_of(rounds: list[dict[str, Any]], *path: str) -> float:
    values = []
    for one in rounds:
        value: Any = one
        for key in path:
            value = value[key]
        values.append(value)
    return statistics.median(values)


def table(rounds: list[dict[str, Any]], found: dict[str, Server], overloaded: dict[str, float]) -> list[str]:
    lines = [
        "| server | c=1 fastest / median | c=32 | c=128 | 64 images, c=8 | requests/s c=128 | ready | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in found:
        cpu = [
            median_of(rounds, name, "loads", key, "cpu_us_per_request") for key in ("c=32", "c=128", "64 images, c=8")
        ]
        one = [median_of(rounds, name, "loads", "c=1", key) for key in ("fastest_us", "median_us")]
        lines.append(
            f"| {name} | {one[0]:.0f} / {one[1]:.0f} µs | {cpu[0]:.0f} µs | {cpu[1]:.0f} µs | {cpu[2]:.0f} µs | "
            f"{median_of(rounds, name, 'loads', 'c=128', 'requests_per_second'):,.0f} | "
            f"{median_of(rounds, name, 'ready_s'):.2f} s | {median_of(rounds, name, 'resident_mb_after'):.0f} MB |"
        )
    bare = median_of(rounds, "bare run of 64 images", "cpu_us")
    own = median_of(rounds, "convoy native", "loads", "64 images, c=8", "cpu_us_per_request")
    lines += ["", "Columns of microseconds without a name are the server's CPU time per request.", ""]
    lines.append(
        f"Bare `InferenceSession.run` of 64 images: {bare:.0f} µs of CPU; native spends {own / bare:.2f} times that."
    )
    for name in found:
        if name != "convoy native":
            ratios = [
                median_of(rounds, name, "loads", key, "cpu_us_per_request")
                / median_of(rounds, "convoy native", "loads", key, "cpu_us_per_request")
                for key in ("c=32", "c=128")
            ]
            lines.append(
                f"{name} spends {ratios[0]:.1f} (c=32) and {ratios[1]:.1f} (c=128) times native's CPU a request."
            )
    lines += ["", *curve_table(rounds, found), ""]
    times_asked = overloaded["asked_per_second"] / overloaded["best_per_second"]
    kept = 100 * overloaded["good_per_second"] / overloaded["best_per_second"]
    lines += [
        "",
        "Overload (native, 64 images a request, queue of 32): "
        f"{overloaded['best_per_second']:.0f} responses per second at capacity; at {times_asked:.1f} times that load, "
        f"{overloaded['good_per_second']:.0f} ({kept:.0f} %); "
        f"median refusal {overloaded['refusal_median_ms']:.1f} ms "
        f"({overloaded['num_refusals_timed']:.0f} timed).",
    ]
    return lines


def curve_table(rounds: list[dict[str, Any]], found: dict[str, Server]) -> list[str]:
    """Returns the latencies at fixed rates, as shares of what each server gave at c=32 or c=128."""
    shares = [f"{share:.0%}" for share in SHARES]
    lines = [
        "Median / p99 in µs of single images that arrive at random times (Poisson), whether or not earlier ones were "
        "answered; the rates are shares of each server's most requests/s (c=32 or c=128), in brackets what it gave. "
        "From about 15,000 requests/s the client, in Python on the same two cores, adds to these times:",
        "",
        f"| server | {' | '.join(shares)} |",
        "|---" * (len(shares) + 1) + "|",
    ]
    for name in found:
        cells = []
        for share in shares:
            median, p99, rate = (
                median_of(rounds, name, "curve", share, key) for key in ("median_us", "p99_us", "requests_per_second")
            )
            cells.append(f"{median:,.0f} / {p99:,.0f} ({rate:,.0f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    global REQUEST
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model.onnx with one uint8 input named images")
    parser.add_argument(
        "--peers", type=Path, help="folder with triton.sh and mlserver.sh; without it, only Convoy is measured"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each load")
    parser.add_argument("--only", nargs="*", help="names of the servers to measure")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if not options.model.is_file():
        sys.exit(f"error: no model {options.model}: make train exports one")
    if shutil.which("h2load") is None:
        sys.exit("error: h2load is not on the path: install the package nghttp2-client of Debian or Ubuntu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = (
            onnxruntime.InferenceSession(options.model, providers=["CPUExecutionProvider"]).get_inputs()[0].shape[1:]
        )
        images = np.random.default_rng(0).integers(0, 256, (64, *shape)).astype(np.uint8)
        REQUEST = request(images[:1])
        one, many = write_framed(REQUEST, folder, "one"), write_framed(request(images), folder, "many")
        (folder / "models" / "peer" / "1").mkdir(parents=True)
        shutil.copy(options.model, folder / "models" / "peer" / "1" / "model.onnx")
        found = servers(folder / "models", options.model, options.peers)
        if options.only:
            found = {key: server for key, server in found.items() if key in options.only}
        rounds = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", flush=True)
            rounds.append(measure_round(found, one, many, options.model, images, options.seconds))
        overloaded = measure_overload(found["convoy native"], many, options.seconds)
    text = "\n".join([*heading(), *table(rounds, found, overloaded), ""])
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"serving-{datetime.datetime.now(datetime.UTC).date()}"
    path.with_suffix(".md").write_text(text)
    result = {"machine": machine(), "command": command(), "rounds": rounds, "overload": overloaded}
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} CPUs of {cpu}, {platform.platform()}, onnxruntime {onnxruntime.__version__}"


def command() -> str:
    """Returns the command line without this machine's folders."""
    return " ".join(["python", *(Path(part).name if "/" in part else part for part in sys.argv)])


def heading() -> list[str]:
    date = datetime.datetime.now(datetime.UTC).date()
    return [
        f"# Serving, {date}",
        "",
        f"`{command()}`",
        "",
        f"On {machine()}; the load comes from the same machine.",
        "",
    ]


if __name__ == "__main__":
    main()
