"""Measures a server of one worker and of several, and simulates how connections spread over many.

    python benchmarks/workers.py --model models/mnist/1/model.onnx --workers 1 2
    python benchmarks/workers.py --python --workers 1 2

With `--python` the model is a loop in Python of about a millisecond: a process computes one request at a time, because
Python runs one thread at a time, and the load generator needs next to nothing.

The load comes from h2load on the same machine, so that N workers have fewer than N cores: the CPU time of a request
says whether workers cost each other anything, and requests/s how much of it the machine gives. On a machine with enough
cores, `--load-cpus 0-3` keeps h2load on some of them, and the server on the others. Writes
`benchmarks/results/workers-DATE.md`, or `workers-python-DATE.md`; without a model, only prints what it simulates.
"""

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from h2load import INFER, cpu_seconds, process_tree, resident_mb, write_framed

import serving as bench  # benchmarks/serving.py

ROOT = Path(__file__).parent.parent
CONCURRENCY = 32
"""Requests in flight for each worker."""
PYTHON_MODEL = """
def run(batch):
    images, total = batch["images"], 0
    for number in range(40_000 * len(images)):
        total += number
    return {"sums": images.sum(axis=(1, 2, 3), dtype="int64")}
"""
PYTHON_CONFIG = """
backend: "python" max_batch_size: 8
input { name: "images" data_type: TYPE_UINT8 dims: [1, 28, 28] } output { name: "sums" data_type: TYPE_INT64 dims: [] }
"""


def measure(repository: Path, payload: Path, workers: int, options: argparse.Namespace) -> dict[str, float]:
    """Measures one server."""
    pinned = [] if options.load_cpus is None else ["taskset", "-c", _others(options.load_cpus)]
    command = [
        *pinned, sys.executable, "-m", "serving", "--model-repository", str(repository), "--num-threads", "1",
        "--grpc-port", "PORT", "--http-port", "0", "--metrics-port", "0", "--workers", str(workers),
        "--transport", options.transport, *(["--allow-model-code"] if options.python else []),
    ]  # fmt: skip
    with bench.running(bench.Server("workers", command)) as (port, pid, _):
        run_load(port, payload, 2, workers, options)
        members = process_tree(pid)
        before, each = cpu_seconds(pid), [cpu_seconds(member) for member in members]
        done = run_load(port, payload, options.seconds, workers, options)
        spent = cpu_seconds(pid) - before
        spread = [cpu_seconds(member) - began for member, began in zip(members, each, strict=True)]
        busy = sorted(spread[1:] if workers > 1 else spread)
        return {
            "requests/s": done / options.seconds,
            "CPU a request, µs": spent * 1e6 / done,
            "CPU cores used": spent / options.seconds,
            "busiest worker / mean": busy[-1] / statistics.mean(busy),
            "memory, MB": resident_mb(pid),
        }


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """Writes the model `peer`: the ONNX file, or a loop in Python."""
    (folder / "1").mkdir(parents=True)
    if options.python:
        (folder / "1/model.py").write_text(PYTHON_MODEL)
        (folder / "config.pbtxt").write_text(PYTHON_CONFIG)
    else:
        shutil.copy(options.model, folder / "1/model.onnx")


def run_load(port: int, payload: Path, seconds: float, workers: int, options: argparse.Namespace) -> int:
    """Returns the number of requests that succeeded."""
    connections = options.connections * workers
    pinned = [] if options.load_cpus is None else ["taskset", "-c", options.load_cpus]
    command = [
        *pinned, "h2load", f"-t{options.load_threads}", f"-c{connections}",
        f"-m{max(1, CONCURRENCY * workers // connections)}", f"-D{round(seconds)}", "-d", str(payload),
        "-H", "content-type: application/grpc", "-H", "te: trailers", f"http://127.0.0.1:{port}{INFER}",
    ]  # fmt: skip
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+) succeeded", report)
    if found is None or not int(found[1]):
        sys.exit(f"error: no request succeeded:\n{report}")
    return int(found[1])


def share_of_capacity(workers: int, connections: int) -> float:
    """Returns the mean over the busiest worker when the kernel spreads connections with equal load at random.

    When the busiest worker is full, the server gives that share of what its workers could.
    """
    shares = []
    for number in range(400):
        generator = random.Random(number)
        counts = [0] * workers
        for _ in range(connections):
            counts[generator.randrange(workers)] += 1
        shares.append(connections / workers / max(counts))
    return statistics.mean(shares)


def _others(cpus: str) -> str:
    """Returns the CPUs of this machine that are not in a list such as `0-3,8`."""
    taken: set[int] = set()
    for part in cpus.split(","):
        first, _, last = part.partition("-")
        taken |= set(range(int(first), int(last or first) + 1))
    return ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0) - taken))


def simulation() -> list[str]:
    """Returns a table of `share_of_capacity`."""
    each = (2, 8, 32, 128)
    lines = ["| workers | " + " | ".join(f"{number} connections a worker" for number in each) + " |"]
    lines.append("|---" * (len(each) + 1) + "|")
    for workers in (2, 8, 64):
        shares = [f"{100 * share_of_capacity(workers, workers * number):.0f} %" for number in each]
        lines.append(f"| {workers} | {' | '.join(shares)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an MNIST model.onnx of `make train`; without it, only simulate")
    parser.add_argument("--python", action="store_true", help="a model that is a loop in Python, in place of --model")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--connections", type=int, default=16, help="of each worker")
    parser.add_argument("--transport", default="native", choices=["native", "grpcio"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each load")
    parser.add_argument("--load-threads", type=int, default=1, help="threads of h2load")
    parser.add_argument("--load-cpus", help="CPUs for h2load, such as 0-3; the server gets the others")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.model is None and not options.python:
        print("\n".join(simulation()))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 28, 28)).astype(np.uint8)
    bench.REQUEST = bench.request(image)
    rounds: list[list[dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "models/peer", options)
        payload = write_framed(bench.REQUEST, folder, "grpc")
        for number in range(options.rounds):  # in turn: the speed of a shared machine changes by the minute
            rounds.append([measure(folder / "models", payload, workers, options) for workers in options.workers])
            print(f"round {number + 1} of {options.rounds} done", flush=True)
    date = datetime.now(UTC).date()
    lines = [f"# Workers, {date}", "", f"`{bench.command()}`, on {bench.machine()}; medians of the rounds.", ""]
    lines += ["| workers | " + " | ".join(rounds[0][0]) + " |", "|---" * (len(rounds[0][0]) + 1) + "|"]
    for place, workers in enumerate(options.workers):
        medians = [statistics.median(one[place][what] for one in rounds) for what in rounds[0][0]]
        lines.append(f"| {workers} | {' | '.join(f'{value:,.4g}' for value in medians)} |")
    text = "\n".join([*lines, "", "Simulated share of the capacity, by connections:", "", *simulation(), ""])
    print(text)
    (options.out / f"workers-{'python-' if options.python else ''}{date}.md").write_text(text)


if __name__ == "__main__":
    main()
