"""The folder of a run: whose it is, what is in it, whether it is complete."""

import dataclasses
import datetime
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from trainer.config import Resume, TrainConfig
from trainer.data import Dataset
from trainer.errors import CheckpointError, ConfigError, TrainerError, writing
from trainer.files import is_temporary, locked, write_json
from trainer.hardware import describe
from trainer.paths import image_folder
from trainer.ranks.failure import FAILURE_FILE
from trainer.ranks.world import World
from trainer.recipes import Recipe
from trainer.records.fingerprint import Fingerprint

RUNS = Path("runs")
STUDY_FILE = "study.json"
"""In a study's folder, and nowhere else."""
LOCK_FILE = ".in-use"
LEAVING_S = 120.0
"""How long the user of a folder may take to leave it: a file server knows after 90 s that a host is gone (NFS)."""
_KEEPS_PRECISION = {
    "float32": "go on with --precision float32",
    "bfloat16": "go on with --precision bfloat16 on the same kind of machine, or begin anew with --precision float32",
}


@dataclasses.dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's folder. All ranks know its path; only the main one reads and writes in it.

    Args:
        path: absolute or relative to the working directory.
        fingerprint: all that decides the result.
    """

    path: Path
    fingerprint: Fingerprint

    @classmethod
    def plan(cls, config: TrainConfig, recipe: Recipe, dataset: Dataset, world: World) -> "RunFolder":
        """Where the run will be, the same on all ranks. Nothing is written yet."""
        path = config.run_dir or RUNS / _default_name(recipe.name, config.seed)
        mine = Fingerprint.of(
            recipe,
            seed=config.seed,
            image_size=config.image_size,
            dataset_sha256=dataset.sha256,
            virtual_shards=config.virtual_shards,
        )
        return cls(*world.broadcast_object((path, _as_begun(path, mine) if world.is_main else mine)))

    def check(self, resume: Resume, world: World) -> None:
        """Refuse a folder that `enter` would refuse, before the work that comes first. Nothing is written.

        Raises:
            ConfigError, CheckpointError: as in `enter`.
        """
        if world.is_main:
            with writing(self.path):
                self._has_begun(resume)

    def enter(self, resume: Resume, world: World) -> None:
        """Make the folder, or enter an existing one of the same run. All ranks call this.

        Raises:
            ConfigError: the folder belongs to another run, or `resume` is `never` and it holds one.
            CheckpointError: it cannot be written, or what it holds is damaged.
        """
        if world.is_main:
            self._claim(resume, world)
        world.barrier()

    def _claim(self, resume: Resume, world: World) -> None:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._has_begun(resume):
                origin = {"git_commit": git_commit(), "world_size": world.size, "machine": describe(world.device)}
                write_json(self.config_path, {"fingerprint": self.fingerprint.values, "started_with": origin})

    def _has_begun(self, resume: Resume) -> bool:
        """Whether the folder holds this run; ConfigError where it holds something else."""
        if self.config_path.exists():
            self._check_same_run(RunFolder.read(self.path), resume)
            return True
        if self.path.exists() and self._holds_other_things():
            raise ConfigError(f"--run-dir {self.path}: the folder is not empty and holds no run; choose another one")
        return False

    def make_for_failure(self) -> Path | None:
        """The folder, made if need be, for a failure before `enter`; None if it is not ours, or cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return None if not self.config_path.exists() and self._holds_other_things() else self.path
        except OSError:
            return None

    def _holds_other_things(self) -> bool:
        """Whether there is more than a run leaves that ended before `config.json` was whole."""
        return any(
            path.name not in (FAILURE_FILE, LOCK_FILE) and not is_temporary(path) for path in self.path.iterdir()
        )

    def _check_same_run(self, known: "RunFolder", resume: Resume) -> None:
        if resume == "never":
            raise ConfigError(f"--resume never, but {self.path} holds a run: choose another --run-dir")
        for name, theirs, ours in known.fingerprint.differences(self.fingerprint):
            if name == "recipe.precision":
                raise ConfigError(
                    f"--run-dir {self.path}: this run computes in {theirs}, and here, as asked for and as the hardware "
                    f"has it, it would in {ours}: {_KEEPS_PRECISION[theirs]}"
                )
            raise ConfigError(
                f"--run-dir {self.path} is of another run: its {name} is {theirs}, not {ours}; choose another folder"
            )

    @classmethod
    def read(cls, path: Path) -> "RunFolder":
        """A folder that holds a run already.

        Raises:
            ConfigError: it holds none.
            CheckpointError: what it holds is damaged.
        """
        try:
            known = json.loads((path / "config.json").read_text())
            return cls(path, Fingerprint(known["fingerprint"]))
        except OSError as error:
            raise ConfigError(f"{path} holds no run: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path / 'config.json'} is damaged: {error}") from error

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    @property
    def ledger_path(self) -> Path:
        """The workspace's ledger: beside the run folders, and beside a study whose runs are one level deeper."""
        workspace = self.path.absolute().parent
        return (workspace.parent if (workspace / STUDY_FILE).exists() else workspace) / "ledger.jsonl"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    def is_complete(self, world: World) -> bool:
        """Whether the run has its result; the same answer on every rank."""
        return world.broadcast_object(world.is_main and self.result() is not None)

    def result(self) -> dict[str, Any] | None:
        """What the run found, if it is complete."""
        try:
            result: dict[str, Any] = json.loads(self.result_path.read_text())
            return result
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise CheckpointError(f"{self.result_path} is damaged: {error}") from error


@contextmanager
def in_use(folder: Path, world: World, say: Callable[[str], None]) -> Iterator[None]:
    """Around all that a run or a study does in its folder, made if need be; the main rank keeps other processes out.

    Raises:
        ConfigError: another one uses the folder, and stays.
        CheckpointError: it cannot be written.
    """
    is_in_use = f"{folder} is in use by another process"
    with ExitStack() as kept:
        if world.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                waiting = f"{is_in_use}: waiting up to {LEAVING_S:.0f} s for it to leave"
                kept.enter_context(locked(folder / LOCK_FILE, say, waiting, patience_s=LEAVING_S))
            except TimeoutError:
                raise ConfigError(f"--run-dir {is_in_use}: stop that one, or choose another folder") from None
            except BrokenPipeError:  # nobody reads what is said
                raise
            except OSError as error:
                raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
        world.barrier()
        yield


def git_commit() -> str | None:
    """The commit of the code that runs, with a + where files differ from it; None outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _default_name(recipe: str, seed: int) -> str:
    return f"{recipe}-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-s{seed}"


def _as_begun(path: Path, mine: Fingerprint) -> Fingerprint:
    """The fingerprint, with a folder of images under the name that it had when the run at `path` began.

    Where it lies decides nothing, and its content has a digest of its own.
    """
    try:
        known = RunFolder.read(path).fingerprint.dataset
    except (TrainerError, KeyError, TypeError):  # there is no run to go on with, as will be found later
        return mine
    return mine.with_dataset(known) if image_folder(known) and image_folder(mine.dataset) else mine
