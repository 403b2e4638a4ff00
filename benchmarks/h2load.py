"""Load from h2load on a gRPC server, and what the server and its children spend on it."""

import contextlib
import os
import re
import statistics
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

INFER = "/inference.GRPCInferenceService/ModelInfer"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Load:
    """The result of one period of load."""

    requests_per_second: float
    cpu_us_per_request: float
    fastest_us: float
    median_us: float
    p99_us: float


def write_framed(payload: bytes, folder: Path, name: str) -> Path:
    """Writes a message to a file in the form that h2load sends; returns the file."""
    path = folder / name
    path.write_bytes(b"\0" + struct.pack(">I", len(payload)) + payload)
    return path


def process_tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            found += [int(child) for child in children]
    return found


def cpu_seconds(pid: int) -> float:
    """Returns the user and system time of a process and its children."""
    total = 0
    for member in process_tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total * TICK_S


def resident_mb(pid: int) -> float:
    total = 0
    for member in process_tree(pid):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{member}/status").read_text()
            total += int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]
    return total / 1024


def measure_load(
    port: int, pid: int, payload: Path, seconds: float, concurrency: int, per_second: float | None = None
) -> Load:
    """Keeps `concurrency` requests in flight for `seconds`, at most `per_second` requests in total per second."""
    connections = min(concurrency, 4)
    log = payload.with_suffix(".log")
    log.unlink(missing_ok=True)
    # The first second warms up; neither the counts nor the CPU time include it.
    rate = [] if per_second is None else [f"--rps={per_second / connections:.0f}"]
    run_h2load(port, payload, 1, connections, concurrency, rate)
    before = cpu_seconds(pid)
    report = run_h2load(port, payload, seconds, connections, concurrency, [*rate, f"--log-file={log}"])
    spent = cpu_seconds(pid) - before
    done = int(re.search(r"(\d+) succeeded", report)[1])  # type: ignore[index]
    if not done:
        sys.exit(f"error: no request succeeded:\n{report}")
    latencies = sorted(int(line.split("\t")[2]) for line in log.read_text().splitlines())
    return Load(
        requests_per_second=done / seconds,
        cpu_us_per_request=spent * 1e6 / done,
        fastest_us=latencies[0],
        median_us=statistics.median(latencies),
        p99_us=latencies[int(0.99 * len(latencies))],
    )


def run_h2load(port: int, payload: Path, seconds: float, connections: int, concurrency: int, extra: list[str]) -> str:
    command = [
        "h2load", "-t1", "-c", str(connections), "-m", str(concurrency // connections), "-D", str(round(seconds)),
        "-H", "content-type: application/grpc", "-H", "te: trailers", "-d", str(payload),
        *extra, f"http://127.0.0.1:{port}{INFER}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or "succeeded" not in done.stdout:
        sys.exit(f"error: h2load failed:\n{done.stdout}{done.stderr}")
    return done.stdout
