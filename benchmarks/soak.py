"""Serves at half load for hours, and watches memory, threads, descriptors and answers.

    python benchmarks/soak.py [--hours 2 | --minutes 5] [--transport native]

First measures how much the mixed clients get when they do not pause, then sends half of that: gRPC with raw and typed
contents, with request ids, with deadlines that often pass, with calls that are cancelled, streams, HTTP with JSON and
with binary data, and invalid requests. Each answer is checked. Every 30 s (every 3 s in the first 10 minutes, for the
heap takes some 200 changes to reach its size) a version is replaced, and a model is unloaded and loaded again. Memory
is sampled every 10 s. Writes `benchmarks/results/soak-DATE.md`; exit code 1 if an answer was wrong, or if the memory
grew by more than 1 % from the end of the first 10 minutes (of a run of less than an hour: from its first third) to the
end.
"""

import argparse
import collections
import datetime
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.fuzz import machine  # noqa: E402
from benchmarks.mixed_clients import Calls, Clients, run_clients  # noqa: E402
from protos import grpc_service_pb2 as pb  # noqa: E402
from serving.protocol.methods import INFER, INFERENCE_SERVICE  # noqa: E402
from tests.serving.fuzzing.requests import MODELS  # noqa: E402
from tests.serving.model_files import scale  # noqa: E402
from tests.serving.onnx_models import write_repository  # noqa: E402
from tests.serving.server_process import ServerProcess  # noqa: E402

SAMPLE_S = 10.0
CHANGE_S = 30.0
WARM_UP_CHANGE_S = 3.0
GROWTH = 0.01
SHORTEST_WARM_UP_S = 600.0
CAPACITY_S = 10.0


class Changes:
    """Replaces a version, and unloads and loads a model, from time to time."""

    def __init__(self, server: ServerProcess, repository: Path) -> None:
        self._repository = repository
        self._channel = grpc.insecure_channel(server.target(), [("grpc.use_local_subchannel_pool", 1)])
        self.num_changes = 0
        self.failures: collections.Counter[str] = collections.Counter()

    def run(self, over: threading.Event, warm_up_s: float) -> None:
        warm_from = time.monotonic() + warm_up_s
        while not over.wait(WARM_UP_CHANGE_S if time.monotonic() < warm_from else CHANGE_S):
            try:
                self._change()
            except Exception as error:
                self.failures[repr(error)[:300]] += 1

    def _change(self) -> None:
        self.num_changes += 1
        folder = self._repository / "scale" / "1"
        new = folder / ".new"
        new.write_bytes(scale(float(self.num_changes)))
        new.rename(folder / "model.onnx")
        self._call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="scale"))
        request = pb.ModelInferRequest(model_name="scale", raw_input_contents=[np.ones(3, np.float32).tobytes()])
        request.inputs.add(name="x", datatype="FP32", shape=[1, 3])
        answer = pb.ModelInferResponse.FromString(self._channel.unary_unary(INFER)(request.SerializeToString()))
        if np.frombuffer(answer.raw_output_contents[0], np.float32)[0] != self.num_changes:
            self.failures["an old version answered after the swap"] += 1
        self._call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="spare"))
        self._call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="spare"))

    def _call(self, name: str, message: pb.RepositoryModelLoadRequest) -> None:
        self._channel.unary_unary(f"/{INFERENCE_SERVICE}/{name}")(message.SerializeToString(), timeout=60)


def warm_up_s(seconds: float) -> float:
    """Returns how much of the run's time is not judged."""
    return SHORTEST_WARM_UP_S if seconds >= 3600 else seconds / 3


@dataclass
class Sample:
    """The state of the server at one moment."""

    at_s: float
    memory_mb: float
    threads: int
    files: int
    cpu_s: float


@dataclass
class Soak:
    """The outcome."""

    capacity: float
    seconds: float
    clients: Clients
    changes: Changes
    samples: list[Sample]
    log: list[str] = field(default_factory=list)
    exit_code: int | None = None

    def memory_mb(self) -> tuple[float, float]:
        """Returns the median memory after the warm-up, and at the end."""
        warm_up = warm_up_s(self.seconds)
        width = max(3 * SAMPLE_S, self.seconds / 20)
        early = [s.memory_mb for s in self.samples if warm_up <= s.at_s <= warm_up + width]
        late = [s.memory_mb for s in self.samples if s.at_s >= self.seconds - width]
        return statistics.median(early or late), statistics.median(late or early)

    def failures(self) -> list[str]:
        """Returns one sentence for everything that is wrong."""
        found = [
            f"{kind.name}: {count} times: {what}"
            for kind in self.clients.kinds
            for what, count in kind.failures.items()
        ]
        found += [f"changes: {count} times: {what}" for what, count in self.changes.failures.items()]
        early, late = self.memory_mb()
        if late > (1 + GROWTH) * early:
            found.append(f"memory grew from {early:.1f} to {late:.1f} MB")
        if self.exit_code != 0:
            found.append(f"the server's exit code was {self.exit_code}")
        return found + [line.strip() for line in self.log if line.startswith("Traceback")]


def watch(server: ServerProcess, seconds: float, kinds: list[Calls], samples: list[Sample]) -> None:
    """Samples the server until the time is over, and prints one line of progress."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        samples.append(Sample(passed, server.resident_mb(), server.num_threads(), server.num_files(), server.cpu_s()))
        calls, failed = sum(k.num_calls for k in kinds), sum(k.failures.total() for k in kinds)
        print(
            f"\r{passed / 60:.1f} of {seconds / 60:.0f} min: {samples[-1].memory_mb:.1f} MB, "
            f"{samples[-1].threads} threads, {samples[-1].files} descriptors, {calls:,} calls, {failed} failed ",
            end="",
            flush=True,
        )
        time.sleep(min(SAMPLE_S, max(0.0, seconds - passed)))
    print()


def soak(transport: str, repository: Path, seconds: float) -> Soak:
    """Serves for this time at half load."""
    names = [*MODELS, "scale", "spare"]
    arguments = ["--model-repository", str(repository), "--model-control-mode", "explicit", "--load-model", *names]
    server = ServerProcess(*arguments, "--device", "cpu", "--transport", transport)
    try:
        clients = Clients(server)
        before = [kind.num_calls for kind in clients.kinds]
        capacity = run_clients(clients.kinds, CAPACITY_S, None)
        made = [kind.num_calls - was for kind, was in zip(clients.kinds, before, strict=True)]
        rates = {kind.name: 0.5 * calls / CAPACITY_S for kind, calls in zip(clients.kinds, made, strict=True)}
        print(f"capacity {capacity:.0f} calls/s; half of it for {seconds / 60:.0f} minutes", flush=True)
        changes = Changes(server, repository)
        over = threading.Event()
        changer = threading.Thread(target=changes.run, args=(over, warm_up_s(seconds)))
        changer.start()
        samples: list[Sample] = []
        watcher = threading.Thread(target=watch, args=(server, seconds, clients.kinds, samples))
        watcher.start()
        run_clients(clients.kinds, seconds, rates)
        watcher.join()
        over.set()
        changer.join()
        exit_code = server.stop()
        return Soak(capacity, seconds, clients, changes, samples, server.lines, exit_code)
    finally:
        server.close()


def report(outcome: Soak, transport: str) -> list[str]:
    early, late = outcome.memory_mb()
    first, last = outcome.samples[0], outcome.samples[-1]
    calls = sum(kind.num_calls for kind in outcome.clients.kinds)
    lines = [
        f"# Soak, {datetime.datetime.now(datetime.UTC).date()}",
        "",
        f"`{' '.join(['python', 'benchmarks/soak.py', *sys.argv[1:]])}`, {transport}, on {machine()}.",
        "",
        f"{outcome.seconds / 60:.0f} minutes at half of {outcome.capacity:,.0f} calls per second, all clients together "
        f"on the same machine: {calls:,} calls, {outcome.changes.num_changes} hot swaps with as many unloads and loads "
        f"of another model. Memory after the warm-up {early:.1f} MB, at the end {late:.1f} MB "
        f"({100 * (late / early - 1):+.2f} %). Threads {first.threads} to {last.threads}, descriptors {first.files} to "
        f"{last.files}. CPU {100 * (last.cpu_s - first.cpu_s) / (last.at_s - first.at_s or 1):.0f} % of one core. "
        f"Exit code {outcome.exit_code}. Calls that end early share a connection; {outcome.clients.num_ended:,} "
        "failed because the server ended it (too_many_resets or a broken pipe, docs/serving-security.md).",
        "",
        "| client | calls | failed | median, p99 of the last 20,000 |",
        "|---|---|---|---|",
    ]
    for kind in outcome.clients.kinds:
        times = sorted(kind.times_ms) or [0.0]
        lines.append(
            f"| {kind.name} | {kind.num_calls:,} | {kind.failures.total()} | {statistics.median(times):.2f}, "
            f"{times[int(0.99 * len(times))]:.1f} ms |"
        )
    lines += ["", "| minute | memory | threads | descriptors |", "|---|---|---|---|"]
    step = max(1, len(outcome.samples) // 24)
    for sample in outcome.samples[::step]:
        lines.append(f"| {sample.at_s / 60:.1f} | {sample.memory_mb:.1f} MB | {sample.threads} | {sample.files} |")
    return [*lines, "", *(f"- {failure}" for failure in outcome.failures()), ""]


def write_models(repository: Path) -> None:
    write_repository(repository)
    (repository / "scale" / "1").mkdir(parents=True)
    (repository / "scale" / "config.pbtxt").write_text('name: "scale" backend: "onnxruntime" max_batch_size: 8\n')
    (repository / "scale" / "1" / "model.onnx").write_bytes(scale(1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    duration = parser.add_mutually_exclusive_group()
    duration.add_argument("--hours", type=float, default=2.0)
    duration.add_argument("--minutes", type=float, help="in place of --hours")
    parser.add_argument("--transport", choices=("native", "grpcio"), default="native")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    seconds = 3600 * options.hours if options.minutes is None else 60 * options.minutes
    with tempfile.TemporaryDirectory() as name:
        repository = Path(name) / "models"
        write_models(repository)
        outcome = soak(options.transport, repository, seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"soak-{datetime.datetime.now(datetime.UTC).date()}.md"
    path.write_text("\n".join(report(outcome, options.transport)))
    print("\n".join(report(outcome, options.transport)))
    sys.exit("error: " + "; ".join(outcome.failures()[:10]) if outcome.failures() else 0)


if __name__ == "__main__":
    main()
