"""Kills training runs at random moments, and checks that each ends with the weights of an undisturbed run.

    python benchmarks/faults.py --runs 100

The runs take turns among three faults, all of them SIGKILL, after which a process cannot clean up:

- `rank`: one rank is killed, and torchrun restarts the ranks.
- `launcher`: torchrun is killed, and the same command starts again at once, while the orphaned ranks still run.
- `all`: every process is killed, and the same command starts again.

After the last two faults the run continues with another number of ranks. In every second run the moment of the fault is
uniformly random within the duration of an undisturbed run, start-up included; in the others it follows the checkpoint
of a random step. A run ends with the checkpoint of its last step, before evaluation and report. The runs train
`mnist-mini` on CPUs.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Literal

import torch

from trainer.hardware import describe
from trainer.records.checkpoint import state_sha256

ROOT = Path(__file__).parent.parent
Kind = Literal["rank", "launcher", "all"]
KINDS: tuple[Kind, ...] = ("rank", "launcher", "all")
RUN = ["--recipe", "mnist-fast", "--dataset", "mnist-mini", "--device", "cpu", "--virtual-shards", "4"]
RUN += ["--epochs", "3", "--global-batch-size", "70", "--save-every-steps", "5", "--no-export"]
LAST_STEP = 195
LIMIT_S = 300.0


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """One run with one fault.

    Args:
        delay_s: longest time from the start to the fault.
        after_step: the fault follows the first checkpoint of this or a later step; None for `delay_s` alone.
        killed_at_step: step of the newest checkpoint at the fault.
        notice_s: from the fault to `failure.json`, if a rank wrote it.
        again_s: from the fault to the first checkpoint of the restarted ranks.
        right: whether the final weights equal those of an undisturbed run.
    """

    kind: Kind
    ranks: int
    ranks_after: int
    delay_s: float
    after_step: int | None = None
    killed_at_step: int = 0
    notice_s: float | None = None
    again_s: float | None = None
    right: bool = False


class Job:
    """A training run in a folder: torchrun and its ranks, in their own session."""

    def __init__(self, folder: Path, data_dir: Path, ranks: int) -> None:
        self.folder = folder
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--max-restarts=3"]
        paths = ["--run-dir", str(folder / "run"), "--data-dir", str(data_dir)]
        with (folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *torchrun, str(ROOT / "trainer" / "main.py"), *RUN, *paths],
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._known: set[tuple[int, str]] = set()

    def ranks(self) -> list[int]:
        """Returns the process ids of the running ranks."""
        found = [(pid, began) for pid, parent, began in _processes() if parent == self.process.pid]
        self._known.update(found)
        return sorted(pid for pid, _ in found)

    def orphans(self) -> list[int]:
        """Returns the running ranks that `ranks` has seen. Compares start times, as process ids are reused."""
        return [pid for pid, _, began in _processes() if (pid, began) in self._known]

    def kill_all(self) -> None:
        for pid in [*self.ranks(), *self.orphans(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _processes() -> list[tuple[int, int, str]]:
    """Returns process id, parent and start time of every process that is not a zombie."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found.append((int(stat.parent.name), int(fields[1]), fields[19]))
    return found


def newest_step(folder: Path) -> int:
    """Returns the step of the newest checkpoint; 0 if there is none."""
    return max((int(path.parent.name[5:]) for path in folder.glob("run/checkpoints/step-*/manifest.json")), default=0)


def wait_for(condition: Callable[[], object], what: str) -> float:
    """Waits until the condition is true. Returns the time, as `time.time` does.

    Raises:
        TimeoutError: `what`, after `LIMIT_S`.
    """
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.05)
    return time.time()


def digest(folder: Path) -> str:
    """Returns the weights_sha256 of the last step's checkpoint."""
    path = folder / "run" / "checkpoints" / f"step-{LAST_STEP:08d}" / "state.pt"
    return state_sha256(torch.load(path, weights_only=True)["model"])


def run_undisturbed(folder: Path, data_dir: Path, ranks: int) -> tuple[str, float]:
    """Runs without a fault. Returns the digest of the weights, and the seconds until the last checkpoint."""
    folder.mkdir()
    began = time.time()
    job = Job(folder, data_dir, ranks)
    try:
        ended = wait_for(lambda: newest_step(folder) == LAST_STEP, "the undisturbed run")
    finally:
        job.ranks()
        job.kill_all()
    return digest(folder), ended - began


def run_with_fault(outcome: Outcome, folder: Path, data_dir: Path, generator: random.Random) -> None:
    """Runs with one fault until the last step, and fills in the outcome."""
    folder.mkdir()
    job = Job(folder, data_dir, outcome.ranks)
    jobs = [job]
    try:
        end = time.monotonic() + outcome.delay_s
        while time.monotonic() < end and newest_step(folder) < (outcome.after_step or LAST_STEP):
            job.ranks()
            time.sleep(0.02)
        if outcome.kind == "rank":
            wait_for(job.ranks, "ranks to kill")
        outcome.killed_at_step = newest_step(folder)
        killed_at = time.time()
        if outcome.kind == "rank":
            with contextlib.suppress(ProcessLookupError):
                os.kill(generator.choice(job.ranks()), signal.SIGKILL)
        else:
            job.process.kill() if outcome.kind == "launcher" else job.kill_all()
            jobs.append(Job(folder, data_dir, outcome.ranks_after))
        if outcome.killed_at_step < LAST_STEP:
            # If orphans saved the last step before they exited, the restarted ranks save nothing.
            again = lambda: saved_since(folder, killed_at, job.orphans() if len(jobs) > 1 else [])  # noqa: E731
            wait_for(lambda: again() or jobs[-1].process.poll() is not None, "a checkpoint of the restarted ranks")
            outcome.again_s = time.time() - killed_at if again() else None
        wait_for(lambda: newest_step(folder) == LAST_STEP, "the last step")
        outcome.notice_s = seconds_to_report(folder, killed_at)
    finally:
        for each in jobs:
            each.ranks()
            each.kill_all()


def saved_since(folder: Path, killed_at: float, orphans: list[int]) -> bool:
    """Returns whether the restarted ranks have saved a checkpoint. Those of orphans do not count."""
    saved = (path.stat().st_mtime for path in folder.glob("run/checkpoints/step-*/manifest.json"))
    return not orphans and any(at > killed_at + 2 for at in saved)


def seconds_to_report(folder: Path, killed_at: float) -> float | None:
    """Returns the seconds from the fault to `failure.json`; None if there is none."""
    try:
        return (folder / "run" / "failure.json").stat().st_mtime - killed_at
    except FileNotFoundError:
        return None


def table(outcomes: list[Outcome]) -> str:
    lines = ["| fault | runs | during training | same weights | reported | after (median, largest) | next checkpoint |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for kind in (*KINDS, "all faults"):
        of_kind = [outcome for outcome in outcomes if kind in (outcome.kind, "all faults")]
        notice = [o.notice_s for o in of_kind if o.notice_s is not None and o.kind == "rank"]
        again = [o.again_s for o in of_kind if o.again_s is not None]
        right = sum(outcome.right for outcome in of_kind)
        during = sum(0 < outcome.killed_at_step < LAST_STEP for outcome in of_kind)
        # The other faults leave no rank that could report.
        num_ranks_killed = sum(outcome.kind == "rank" for outcome in of_kind)
        reported = f"{len(notice)} of {num_ranks_killed} | {_spread(notice)}" if num_ranks_killed else "|"
        lines += [f"| {kind} | {len(of_kind)} | {during} | {right} | {reported} | {_spread(again)} |"]
    return "\n".join(lines)


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s, {max(seconds):.1f} s" if seconds else ""


def write(outcomes: list[Outcome], reference: str, out: Path) -> None:
    content = {
        "weights_sha256": reference,
        "machine": describe(torch.device("cpu")),
        "command": RUN,
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    _, _, about = (__doc__ or "").partition("--runs 100\n\n")
    machine = describe(torch.device("cpu"))
    text = f"""# Training runs with a fault, {out.name[-10:]}

`python benchmarks/faults.py`. {about}
Measured on {machine["device"]}, {machine["cpus"]} CPUs; other load on the machine lengthens the times.
If a rank is killed before the ranks' rendezvous, no rank writes `failure.json`, and torchrun alone reports it.

{table(outcomes)}
"""
    out.with_suffix(".md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"faults-{date.today()}")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference, seconds = run_undisturbed(folder / "undisturbed", folder / "data", 2)
        print(f"undisturbed: {reference} after {seconds:.1f} s", flush=True)
        for number in range(arguments.runs):
            ranks, after = generator.choice([(2, 1), (2, 4), (4, 2), (1, 2)] if number % 5 == 0 else [(2, 1), (1, 2)])
            kind = KINDS[number % len(KINDS)]
            outcome = Outcome(
                kind=kind,
                ranks=max(2, ranks) if kind == "rank" else ranks,
                ranks_after=max(2, ranks) if kind == "rank" else after,
                delay_s=LIMIT_S if number % 2 else generator.uniform(0, seconds),
                after_step=generator.randrange(5, LAST_STEP - 5) if number % 2 else None,
            )
            run = folder / str(number)
            try:
                run_with_fault(outcome, run, folder / "data", generator)
                outcome.right = digest(run) == reference
            except TimeoutError as error:
                print(f"timed out waiting for {error}:\n{(run / 'log').read_text()}", flush=True)
            if not outcome.right:
                print(f"wrong weights:\n{(run / 'log').read_text()}", flush=True)
            print(number, outcome, flush=True)
            outcomes.append(outcome)
            write(outcomes, reference, arguments.out)
            shutil.rmtree(run)
    if not all(outcome.right for outcome in outcomes):
        sys.exit("error: not every run ended with the weights of the undisturbed run")


if __name__ == "__main__":
    main()
