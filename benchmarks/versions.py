"""Compares two checkouts of Convoy, in one run on one machine.

    git worktree add --detach ../before COMMIT
    python benchmarks/versions.py ../before . --model models/mnist/1/model.onnx

The two take turns (A B A B), because the speed of a shared machine changes by the minute; the table gives medians, and
the median ratio of the rounds with its range. Both run with this Python's packages. A checkout may be followed by
further folders for PYTHONPATH, after colons. h2load generates the load on the servers. Writes
`benchmarks/results/versions-DATE.md`; with `--serving-only`, which trains nothing, `versions-serving-DATE.md`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from h2load import cpu_seconds

import serving as bench  # benchmarks/serving.py

ROOT = Path(__file__).parent.parent
Row = dict[str, float]
Rounds = list[tuple[dict[str, Row], dict[str, Row]]]
"""The rows of each round, before and after."""


def run_training(checkout: str, *arguments: str, ranks: int | None = None) -> tuple[Row, str]:
    """Runs a training. Returns its measurements and the digest of its weights."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        command = [sys.executable, *launcher, "trainer/main.py", "--no-export", "--run-dir", str(run), *arguments]
        began = time.time()
        process = subprocess.Popen(
            command, cwd=folder_of(checkout), env=environment(checkout), stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"error: {' '.join(command)} failed in {checkout}")
        wall = time.time() - began
        result = json.loads((run / "result.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if line["kind"] == "step"]
    first = next(line["time"] for line in lines if line["kind"] == "step")
    batch = result["global_batch_size"]
    row = {
        "step, µs": 1e6 * batch / statistics.median(rates[1:]),
        "command to first step, s": first - 50 * batch / rates[0] - began,
        "whole command, s": wall,
    }
    if ranks is None:
        row["peak memory, MB"] = usage.ru_maxrss / 1024
    return row, result["weights_sha256"]


def measure_server(checkout: str, transport: str, repository: Path, bodies: dict[str, Path], seconds: float) -> Row:
    """Measures one server's CPU time for a request, its start and its memory."""
    http_port = bench.free_port()
    options = ["--model-repository", str(repository), "--num-threads", "1", "--metrics-port", "0"]
    options += ["--grpc-port", "PORT", "--http-port", str(http_port), "--transport", transport]
    path = environment(checkout)["PYTHONPATH"]
    command = ["env", "-C", folder_of(checkout), f"PYTHONPATH={path}", sys.executable, "-m", "serving", *options]
    with bench.running(bench.Server(checkout, command)) as (port, pid, ready_s):
        row = {"start to first response, s": ready_s, "start, CPU s": cpu_seconds(pid)}
        row["memory, MB"] = bench.resident_mb(pid)
        for concurrency in (32, 128):
            load = bench.measure_load(port, pid, bodies["grpc"], seconds, concurrency)
            row[f"CPU a request, c={concurrency}, µs"] = load.cpu_us_per_request
            if concurrency == 32:
                row["requests/s, c=32"] = load.requests_per_second
        load = bench.measure_load(port, pid, bodies["grpc with id"], seconds, 32)
        row["CPU a request with an id, c=32, µs"] = load.cpu_us_per_request
        if transport == "native":
            row["CPU an HTTP JSON request, c=32, µs"] = http_cpu_us(http_port, pid, bodies["json"], seconds)
            row["CPU an HTTP binary request, c=32, µs"] = http_cpu_us(http_port, pid, bodies["binary"], seconds)
        row["memory after load, MB"] = bench.resident_mb(pid)
    return row


def http_cpu_us(port: int, pid: int, body: Path, seconds: float) -> float:
    """Returns the server's CPU time for an HTTP request, in microseconds."""
    header = body.with_suffix(".header")
    extra = ["-H", f"inference-header-content-length: {header.read_text()}"] if header.exists() else []
    url = f"http://127.0.0.1:{port}/v2/models/peer/infer"
    command = ["h2load", "--h1", "-t1", "-c32", f"-D{round(seconds)}", "-d", str(body), *extra, url]
    before = cpu_seconds(pid)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spent = cpu_seconds(pid) - before
    status = next(line for line in done.stdout.splitlines() if line.startswith("status codes:"))
    succeeded = int(status.split()[2])
    if not succeeded or " 0 4xx, 0 5xx" not in status:
        sys.exit(f"error: HTTP requests failed: {status}")
    return spent * 1e6 / succeeded


def write_bodies(folder: Path) -> dict[str, Path]:
    """Writes a request of one image in each form. Sets the request that tells whether a server is ready."""
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 28, 28)).astype(np.uint8)
    bench.REQUEST = bench.request(image)
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 28, 28]}
    with_id = bench.request(image, "request-1")
    in_json = json.dumps({"inputs": [{**tensor, "data": image.ravel().tolist()}]}).encode()
    header = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": 784}}]}).encode()
    (folder / "json").write_bytes(in_json)
    (folder / "binary").write_bytes(header + image.tobytes())
    (folder / "binary.header").write_text(str(len(header)))
    return {
        "grpc": bench.write_framed(bench.REQUEST, folder, "grpc"),
        "grpc with id": bench.write_framed(with_id, folder, "grpc-with-id"),
        "json": folder / "json",
        "binary": folder / "binary",
    }


def folder_of(checkout: str) -> str:
    """Returns the folder of a checkout, without the further ones for PYTHONPATH."""
    return str(Path(checkout.partition(":")[0]).resolve())


def environment(checkout: str) -> dict[str, str]:
    """Returns the environment in which Python imports the checkout."""
    folders = [str(Path(part).resolve()) for part in checkout.split(":")]
    return {**os.environ, "PYTHONPATH": ":".join(folders), "OMP_NUM_THREADS": str(os.cpu_count())}


def measure_trainings(checkout: str) -> tuple[dict[str, Row], list[str]]:
    """Returns the rows of some trainings, and the digests of their weights."""
    rows: dict[str, Row] = {}
    digests = []
    trainings = {
        "mnist": (("--epochs", "2"), None),
        "mnist, 2 ranks": (("--epochs", "2"), 2),
        "mnist, 2 ranks, 4 virtual shards": (("--epochs", "1", "--virtual-shards", "4"), 2),
        "mnist-fast": (("--recipe", "mnist-fast", "--epochs", "1"), None),
    }
    for name, (arguments, ranks) in trainings.items():
        rows[name], digest = run_training(checkout, *arguments, ranks=ranks)
        digests.append(f"{name}: `{digest[:16]}`")
    return rows, digests


def measure_servers(checkout: str, model: Path, seconds: float) -> dict[str, Row]:
    """Returns the rows of a server of each transport."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models/peer/1").mkdir(parents=True)
        shutil.copy(model, folder / "models/peer/1/model.onnx")
        bodies = write_bodies(folder)
        return {
            transport: measure_server(checkout, transport, folder / "models", bodies, seconds)
            for transport in ("native", "grpcio")
        }


def measure_round(checkout: str, options: argparse.Namespace) -> tuple[dict[str, Row], list[str]]:
    """Returns the rows of a checkout in one round, and the digests of the weights that it trained."""
    rows, digests = ({}, []) if options.serving_only else measure_trainings(checkout)
    return rows | measure_servers(checkout, options.model, options.seconds), digests


def table_rows(rounds: Rounds) -> Iterator[str]:
    """Yields the rows of the table: medians before and after, and the median ratio with its range."""
    for name, row in rounds[0][0].items():
        for what in row:
            old, new = ([one[side][name][what] for one in rounds] for side in (0, 1))
            ratios = [b / a for a, b in zip(old, new, strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            yield f"| {name} | {what} | {statistics.median(old):,.4g} | {statistics.median(new):,.4g} | {spread} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a checkout")
    parser.add_argument("after", help="another one")
    parser.add_argument("--model", type=Path, required=True, help="an MNIST model.onnx of `make train`")
    parser.add_argument("--serving-only", action="store_true", help="train nothing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each load")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    # Byte code that only one of the checkouts has makes its starts a fifth faster.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    options.out.mkdir(parents=True, exist_ok=True)
    rounds: Rounds = []
    for number in range(options.rounds):
        before, digests_before = measure_round(options.before, options)
        after, digests_after = measure_round(options.after, options)
        rounds.append((before, after))
        print(f"round {number + 1} of {options.rounds} done", flush=True)
    commits = [
        subprocess.run(["git", "-C", folder_of(c), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        for c in (options.before, options.after)
    ]
    date = datetime.now(UTC).date()
    lines = [
        f"# {commits[0].stdout.strip()} and {commits[1].stdout.strip()}, {date}",
        "",
        f"`{bench.command()}`, on {bench.machine()}; median of {options.rounds} rounds in turn, and the median, least "
        "and largest ratio within a round.",
        "",
        "| | | before | after | after / before |",
        "|---|---|---|---|---|",
        *table_rows(rounds),
    ]
    if digests_after:
        same = digests_before == digests_after
        lines += ["", f"`weights_sha256` of the trainings, {'the same in both' if same else 'NOT the same'}:", ""]
        lines += [f"- {digest}" for digest in (digests_after if same else digests_before + digests_after)]
    text = "\n".join([*lines, ""])
    print(text)
    kind = "versions-serving" if options.serving_only else "versions"
    (options.out / f"{kind}-{date}.md").write_text(text)


if __name__ == "__main__":
    main()
