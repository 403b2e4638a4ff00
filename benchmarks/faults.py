"""Kill training runs at random moments and see that each ends in the weights of the undisturbed one.

    python benchmarks/faults.py --runs 100

Three faults, in turn. `rank`: one rank is killed, and torchrun starts the ranks again. `launcher`: torchrun is killed,
and the same command is given again at once, while the orphaned ranks are still there. `all`: every process is killed,
and the same command is given again. After the last two the number of ranks is another one. SIGKILL, always: nothing
can be tidied up. In every second run the moment is drawn evenly from the time that an undisturbed run takes, start-up
included; in the others it is when a step that was drawn has been saved.

A run ends with the checkpoint of its last step; evaluation and report are not waited for. On CPUs, `mnist-mini`.
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
from datetime import date
from pathlib import Path
from typing import Any, Literal

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
        delay_s: from the start to the fault, at most.
        after_step: the fault comes when a step from here on has been saved; None for `delay_s` alone.
        killed_at_step: of the newest checkpoint at that moment.
        notice_s: from the kill to `failure.json`, where a rank was left to write it.
        again_s: from the kill to the first checkpoint of the ranks that were started again.
        right: whether the weights are the undisturbed ones.
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
    """A training run in a folder: torchrun and its ranks, in a session of their own."""

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
        """The ranks' process ids, as far as they have been started and not ended."""
        found = [(pid, began) for pid, parent, began in _processes() if parent == self.process.pid]
        self._known.update(found)
        return sorted(pid for pid, _ in found)

    def orphans(self) -> list[int]:
        """Ranks seen by `ranks` that are still there. Numbers come round again, and are then of somebody else."""
        return [pid for pid, _, began in _processes() if (pid, began) in self._known]

    def kill_all(self) -> None:
        for pid in [*self.ranks(), *self.orphans(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _processes() -> list[tuple[int, int, str]]:
    """Process id, parent and time of start of all that is not a zombie."""
    pairs = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                pairs.append((int(stat.parent.name), int(fields[1]), fields[19]))
    return pairs


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max((int(path.parent.name[5:]) for path in folder.glob("run/checkpoints/step-*/manifest.json")), default=0)


def wait_for(condition: Any, what: str) -> float:
    """When the condition became true, in `time.time`."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.05)
    return time.time()


def digest(folder: Path) -> str:
    """weights_sha256 of the last step's checkpoint."""
    path = folder / "run" / "checkpoints" / f"step-{LAST_STEP:08d}" / "state.pt"
    return state_sha256(torch.load(path, weights_only=True)["model"])


def undisturbed(folder: Path, data_dir: Path, ranks: int) -> tuple[str, float]:
    """The digest, and the seconds that it took."""
    folder.mkdir()
    began = time.time()
    job = Job(folder, data_dir, ranks)
    try:
        ended = wait_for(lambda: newest_step(folder) == LAST_STEP, "the undisturbed run")
    finally:
        job.ranks()
        job.kill_all()
    return digest(folder), ended - began


def disturb(outcome: Outcome, folder: Path, data_dir: Path, chance: random.Random) -> None:
    """One run, one fault, and all until the last step; fills in the outcome."""
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
                os.kill(chance.choice(job.ranks()), signal.SIGKILL)
        else:
            job.process.kill() if outcome.kind == "launcher" else job.kill_all()
            jobs.append(Job(folder, data_dir, outcome.ranks_after))
        if outcome.killed_at_step < LAST_STEP:
            # Orphans who have come to the last step before they left have left nothing to save.
            again = lambda: saved_since(folder, killed_at, job.orphans() if len(jobs) > 1 else [])  # noqa: E731
            wait_for(lambda: again() or jobs[-1].process.poll() is not None, "training again")
            outcome.again_s = time.time() - killed_at if again() else None
        wait_for(lambda: newest_step(folder) == LAST_STEP, "the last step")
        outcome.notice_s = noticed(folder, killed_at)
    finally:
        for each in jobs:
            each.ranks()
            each.kill_all()


def saved_since(folder: Path, killed_at: float, orphans: list[int]) -> bool:
    """Whether those who were started again have saved. What orphans save does not count."""
    saved = (path.stat().st_mtime for path in folder.glob("run/checkpoints/step-*/manifest.json"))
    return not orphans and any(at > killed_at + 2 for at in saved)


def noticed(folder: Path, killed_at: float) -> float | None:
    """Seconds from the kill to `failure.json`, if one was written."""
    try:
        return (folder / "run" / "failure.json").stat().st_mtime - killed_at
    except FileNotFoundError:
        return None


def table(outcomes: list[Outcome]) -> str:
    lines = ["| fault | runs | in mid-training | right weights | noticed | after (median, largest) | again after |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for kind in (*KINDS, "together"):
        of_kind = [outcome for outcome in outcomes if kind in (outcome.kind, "together")]
        notice = [o.notice_s for o in of_kind if o.notice_s is not None and o.kind == "rank"]
        again = [o.again_s for o in of_kind if o.again_s is not None]
        right = sum(outcome.right for outcome in of_kind)
        amid = sum(0 < outcome.killed_at_step < LAST_STEP for outcome in of_kind)
        num_to_notice = sum(outcome.kind == "rank" for outcome in of_kind)  # after the others nobody is left to write
        seen = f"{len(notice)} of {num_to_notice} | {_spread(notice)}" if num_to_notice else "|"
        lines += [f"| {kind} | {len(of_kind)} | {amid} | {right} | {seen} | {_spread(again)} |"]
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
    text = f"""# Runs with a fault, {out.name[-10:]}

By `python benchmarks/faults.py`. {about}
{machine["device"]}, {machine["cpus"]} CPUs shared with much other work: the seconds say more about its load than about
Convoy. A rank that is killed before the ranks have met leaves nobody who could write `failure.json`: torchrun notices.

{table(outcomes)}
"""
    out.with_suffix(".md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"faults-{date.today()}")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference, seconds = undisturbed(folder / "undisturbed", folder / "data", 2)
        print(f"undisturbed: {reference} after {seconds:.1f} s", flush=True)
        for number in range(arguments.runs):
            ranks, after = chance.choice([(2, 1), (2, 4), (4, 2), (1, 2)] if number % 5 == 0 else [(2, 1), (1, 2)])
            kind = KINDS[number % len(KINDS)]
            outcome = Outcome(
                kind=kind,
                ranks=max(2, ranks) if kind == "rank" else ranks,
                ranks_after=max(2, ranks) if kind == "rank" else after,
                delay_s=LIMIT_S if number % 2 else chance.uniform(0, seconds),
                after_step=chance.randrange(5, LAST_STEP - 5) if number % 2 else None,
            )
            run = folder / str(number)
            try:
                disturb(outcome, run, folder / "data", chance)
                outcome.right = digest(run) == reference
            except TimeoutError as error:
                print(f"no {error}:\n{(run / 'log').read_text()}", flush=True)
            if not outcome.right:
                print(f"WRONG\n{(run / 'log').read_text()}", flush=True)
            print(number, outcome, flush=True)
            outcomes.append(outcome)
            write(outcomes, reference, arguments.out)
            shutil.rmtree(run)
    if not all(outcome.right for outcome in outcomes):
        sys.exit("error: not every run ended in the undisturbed weights")


if __name__ == "__main__":
    main()
