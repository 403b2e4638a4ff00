"""Sends mutated messages to a server over each front end, and checks every response.

    python benchmarks/fuzz.py [--messages 1000000] [--seed 0] [--fronts native grpcio http]
    python benchmarks/fuzz.py --fronts http --only 4711

The messages share the front ends; each depends on the seed and its number alone, so that `--only` repeats one. They are
valid requests with up to five changes that know the structure: fields dropped, repeated, reordered, renumbered, with
other wire types, lengths, counts, text; JSON and the binary extension likewise (`tests/serving/fuzzing`). An oracle
knows which statuses are right for each message, and which numbers: what protobuf parses and the model accepts must be
computed, all else must be refused as the client's fault. Beside the messages one client sends good requests, and the
server's memory and threads are watched. Exit code 1 after any wrong answer, a failed good request, more than `GROWTH`
of memory after the first third, a traceback in the server's log, or an exit code of the server other than 0. Writes
`benchmarks/results/fuzz-DATE.md`.
"""

import argparse
import collections
import datetime
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from protos import grpc_service_pb2 as pb  # noqa: E402
from serving.protocol.methods import INFER  # noqa: E402
from tests.serving.fuzzing.grpc_sender import send_grpc  # noqa: E402
from tests.serving.fuzzing.http_sender import send_http  # noqa: E402
from tests.serving.fuzzing.messages import grpc_message, http_message  # noqa: E402
from tests.serving.fuzzing.requests import MODELS  # noqa: E402
from tests.serving.fuzzing.result import Result  # noqa: E402
from tests.serving.onnx_models import write_repository  # noqa: E402
from tests.serving.server_process import ServerProcess  # noqa: E402

FRONTS = ("native", "grpcio", "http")
GROWTH = 0.05
"""Of the resident memory, from the median of the second third of the run to that of the last third."""
SLOW_S = 2.0
"""A good request may take no longer, while `NUM_IN_FLIGHT` mutated messages are on their way."""
MAX_FINDINGS = 20
"""Of each front end, in the result."""


@dataclass
class Report:
    """The outcome for one front end."""

    front: str
    num_messages: int = 0
    seconds: float = 0.0
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: list[str] = field(default_factory=list)
    good_s: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    num_threads: list[int] = field(default_factory=list)
    exit_code: int | None = None

    def part_mb(self, third: int) -> float:
        """Returns the median of the memory in a third of the run."""
        size = max(1, len(self.memory_mb) // 3)
        return statistics.median(self.memory_mb[third * size :][:size] or self.memory_mb)


class Watcher:
    """Sends a good request from time to time, and samples the server's memory, on a thread of its own."""

    def __init__(self, server: ServerProcess, report: Report) -> None:
        self._server = server
        self._report = report
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        image = np.arange(4, dtype=np.float32).reshape(1, 4)
        request = pb.ModelInferRequest(model_name="rows", id="good", raw_input_contents=[image.tobytes()])
        request.inputs.add(name="x", datatype="FP32", shape=image.shape)
        payload = request.SerializeToString()
        with grpc.insecure_channel(self._server.target(), [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = channel.unary_unary(INFER, None, pb.ModelInferResponse.FromString)
            while not self._over.wait(0.05):
                began = time.monotonic()
                try:
                    response = call(payload, timeout=30)
                    if response.raw_output_contents[0] != image.tobytes():
                        self._report.findings.append(f"a good request got {response}")
                except grpc.RpcError as error:
                    self._report.findings.append(f"a good request failed: {error.code().name} {error.details()}")
                self._report.good_s.append(time.monotonic() - began)
                if self._report.good_s[-1] > SLOW_S:
                    self._report.findings.append(f"a good request took {self._report.good_s[-1]:.1f} s")
                self._sample()

    def _sample(self) -> None:
        try:
            self._report.memory_mb.append(self._server.resident_mb())
            self._report.num_threads.append(self._server.num_threads())
        except (OSError, ValueError):
            self._report.findings.append("the server process has ended")
            self._over.set()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def start_server(front: str, repository: Path) -> ServerProcess:
    arguments = ["--model-repository", str(repository), "--model-control-mode", "explicit", "--load-model", *MODELS]
    return ServerProcess(*arguments, "--device", "cpu", "--transport", "native" if front == "http" else front)


def results(server: ServerProcess, front: str, seed: int, numbers: range) -> Iterator[Result]:
    """Sends the messages with these numbers. Yields the results."""
    if front == "http":
        return send_http(server.http_port(), (http_message(seed, number) for number in numbers))
    return send_grpc(server.target(), (grpc_message(seed, number) for number in numbers))


def fuzz(front: str, repository: Path, seed: int, numbers: range) -> Report:
    """Runs all messages against a server of its own."""
    report = Report(front)
    server = start_server(front, repository)
    try:
        server.target()
        began = shown = time.monotonic()
        watcher = Watcher(server, report)
        for result in results(server, front, seed, numbers):
            report.num_messages += 1
            report.statuses[result.status] += 1
            if result.problem is not None:
                note(report, seed, result)
            if time.monotonic() > shown + 1:
                shown = time.monotonic()
                show(report, shown - began, len(numbers))
        report.seconds = time.monotonic() - began
        watcher.stop()
        show(report, report.seconds, len(numbers))
        print()
        report.exit_code = server.stop()
        report.findings += [f"in the log: {line.strip()}" for line in server.lines if line.startswith("Traceback")]
    finally:
        server.close()
    return report


def note(report: Report, seed: int, result: Result) -> None:
    message = result.message
    where = getattr(message, "path", "") or f"{message.method} {message.target}"  # type: ignore[union-attr]
    report.findings.append(
        f"--fronts {report.front} --seed {seed} --only {message.number}: {where} "
        f"({', '.join(message.changes) or 'unchanged'}): {result.problem}"
    )
    print(f"\n{report.findings[-1][:1000]}", flush=True)


def show(report: Report, seconds: float, total: int) -> None:
    print(
        f"\r{report.front}: {report.num_messages} of {total} messages, {report.num_messages / seconds:.0f}/s, "
        f"{len(report.findings)} findings, {report.memory_mb[-1] if report.memory_mb else 0:.0f} MB ",
        end="",
        flush=True,
    )


def failures(report: Report) -> list[str]:
    """Returns one sentence for everything that is wrong."""
    found = []
    if report.findings:
        found.append(f"{report.front}: {len(report.findings)} findings")
    if report.part_mb(2) > (1 + GROWTH) * report.part_mb(1):
        found.append(f"{report.front}: memory grew from {report.part_mb(1):.0f} to {report.part_mb(2):.0f} MB")
    if report.exit_code != 0:
        found.append(f"{report.front}: the server's exit code was {report.exit_code}")
    return found


def write(reports: list[Report], seed: int, path: Path) -> None:
    lines = [
        f"# Mutated messages, {datetime.datetime.now(datetime.UTC).date()}",
        "",
        f"`{' '.join(['python', 'benchmarks/fuzz.py', *sys.argv[1:]])}`, seed {seed}, on {machine()}.",
        "",
        "| front end | messages | per second | wrong answers | good requests between | median, p99, longest | "
        "memory in each third | threads | exit code |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        good = sorted(1000 * seconds for seconds in report.good_s) or [0.0]
        memory = ", ".join(f"{report.part_mb(third):.0f}" for third in range(3))
        lines.append(
            f"| {report.front} | {report.num_messages:,} | {report.num_messages / report.seconds:,.0f} | "
            f"{len(report.findings)} | {len(report.good_s):,} | {statistics.median(good):.1f}, "
            f"{good[int(0.99 * len(good))]:.1f}, {good[-1]:.1f} ms | {memory} MB | "
            f"{report.num_threads[0]} to {report.num_threads[-1]} | {report.exit_code} |"
        )
    lines += ["", "Statuses:", ""]
    for report in reports:
        counts = ", ".join(f"{status} {count:,}" for status, count in report.statuses.most_common())
        lines.append(f"- {report.front}: {counts}")
    findings = [finding for report in reports for finding in report.findings[:MAX_FINDINGS]]
    lines += ["", *(f"    {finding[:500]}" for finding in findings)] if findings else []
    path.write_text("\n".join([*lines, ""]))


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{len(lines) and sum(line.startswith('processor') for line in lines)} CPUs of {cpu}, {platform.platform()}"


def repeat(front: str, repository: Path, seed: int, number: int) -> int:
    """Sends one message and prints everything about it."""
    server = start_server(front, repository)
    try:
        server.target()
        [result] = results(server, front, seed, range(number, number + 1))
        print(result.message, f"status: {result.status}", f"problem: {result.problem}", sep="\n")
        server.stop()
        print(*server.lines, sep="", end="")
    finally:
        server.close()
    return int(result.problem is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=1_000_000, help="number for all front ends together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fronts", nargs="+", choices=FRONTS, default=FRONTS)
    parser.add_argument("--only", type=int, help="send the message with this number to the first of the front ends")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        repository = Path(name) / "models"
        write_repository(repository)
        if options.only is not None:
            sys.exit(repeat(options.fronts[0], repository, options.seed, options.only))
        share = -(-options.messages // len(options.fronts))
        reports = []
        for place, front in enumerate(options.fronts):
            reports.append(fuzz(front, repository, options.seed, range(place * share, (place + 1) * share)))
    options.out.mkdir(parents=True, exist_ok=True)
    write(reports, options.seed, options.out / f"fuzz-{datetime.datetime.now(datetime.UTC).date()}.md")
    wrong = [failure for report in reports for failure in failures(report)]
    sys.exit("error: " + "; ".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
