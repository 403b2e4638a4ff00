"""The folder of a run: the identity of its run, the paths of its files, and whether the run is complete."""

import datetime
import errno
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convoy.named_files import read_regular
from trainer.config import Resume, TrainConfig
from trainer.config_file import RUN_TOML, write_config_file
from trainer.data import Dataset
from trainer.errors import CheckpointError, ConfigError, TrainerError, no_run, reading, writing
from trainer.files import create_folder, is_temporary, locked, remove_temporary, write_json
from trainer.network_files import keep_network
from trainer.paths import (
    FAILURE_FILE,
    LEDGER_FILE,
    LOCK_FILE,
    RESULT_FILE,
    STUDY_FILE,
    default_model_name,
    image_folder,
)
from trainer.ranks.world import World
from trainer.recipes import Recipe
from trainer.recipes.files import read_toml
from trainer.records.fingerprint import Fingerprint
from trainer.records.origin import Origin
from trainer.records.result import Result

RUNS = Path("runs")
LOCK_TIMEOUT_S = 120.0
"""Longest wait for another process to leave a folder: an NFS server notices after 90 s that a host is gone."""
_TO_KEEP_PRECISION = {
    "float32": "continue with --precision float32",
    "tf32": "continue with --precision tf32 on a GPU that has it, or start anew with float32",
    "bfloat16": "continue with --precision bfloat16 on the same kind of machine, or start anew with float32",
}


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's folder. All ranks know its path; only the main rank reads and writes in it.

    Args:
        path: absolute, or relative to the working directory.
        fingerprint: all that decides the run's result.
    """

    path: Path
    fingerprint: Fingerprint

    @classmethod
    def plan(cls, config: TrainConfig, recipe: Recipe, dataset: Dataset, world: World) -> "RunFolder":
        """Returns the folder that the run will have, the same on all ranks.

        A run without `--run-dir` gets a new folder. If it is still empty when the rank leaves the run, it is removed.

        Raises:
            CheckpointError: the new folder cannot be created.
        """
        path = config.run_dir or _new_folder(recipe.name, config.seed, world)
        fingerprint = Fingerprint.of(
            recipe,
            seed=config.seed,
            image_size=config.image_size,
            dataset_sha256=dataset.sha256,
            virtual_shards=config.virtual_shards,
            is_streamed=dataset.is_streamed,
            is_compiled=config.compile,
            has_bfloat16_gradients=config.gradient_reduction == "ddp-bfloat16",
        )
        if world.is_main:
            fingerprint = _with_known_folder(fingerprint, path)
        return cls(*world.broadcast_object((path, fingerprint)))

    @classmethod
    def read(cls, path: Path) -> "RunFolder":
        """Returns a folder that holds a run.

        Raises:
            ConfigError: the folder holds no run.
            CheckpointError: its `config.json` cannot be read, or is damaged.
        """
        with reading(path / "config.json"):
            try:
                return cls(path, Fingerprint(json.loads(read_regular(path / "config.json"))["fingerprint"]))
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                    raise no_run(path) from error
                raise

    def check(self, resume: Resume, world: World) -> None:
        """Refuses a folder that `enter` would refuse, so that the user knows before the work. Writes nothing.

        Raises:
            ConfigError, CheckpointError: as in `enter`.
        """
        if world.is_main:
            with writing(self.path):
                self._holds_this_run(resume)

    @contextmanager
    def entered(self, resume: Resume, world: World, log: Callable[[str], None]) -> Iterator[None]:
        """Context in which the folder is this run's and in use by no other process. All ranks call this.

        Raises:
            ConfigError, CheckpointError: as in `enter` and `in_use`.
        """
        with in_use(self.path, world, log):
            self.enter(resume, world)
            world.failure_context.folder = self.path
            yield

    def enter(self, resume: Resume, world: World) -> None:
        """Creates the folder, or enters the existing folder of the same run. All ranks call this.

        Raises:
            ConfigError: the folder belongs to another run, or `resume` is `never` and it holds a run.
            CheckpointError: it cannot be written, or its content is damaged.
        """
        if world.is_main:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                if not self._holds_this_run(resume):
                    self.write_config(world)
        world.barrier()

    def write_config(self, world: World) -> None:
        """Writes `config.json` unless it is there. The main rank calls this.

        Also while the run trains: whoever moves or removes its folder must not stop it, or keep it from continuing.

        Raises:
            OSError: it cannot be written.
        """
        if not self.config_path.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            content = {"fingerprint": self.fingerprint.values, "started_with": asdict(Origin.here(world))}
            write_json(self.config_path, content)

    def keep_settings(self, config: TrainConfig, recipe: Recipe) -> None:
        """Writes `run.toml` and a copy of the user's own network, unless they are there; the main rank calls this.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = self.path / RUN_TOML
        with writing(path):
            if not path.exists():
                keep_network(recipe, self.path)
                write_config_file(path, config, recipe)

    @property
    def model_name(self) -> str:
        """The name of the run's model: that of its `--name`, or its default."""
        path = self.path / RUN_TOML
        chosen = read_toml(path).get("name") if path.exists() else None
        return str(chosen) if chosen else default_model_name(self.fingerprint.dataset, self.fingerprint.recipe.name)

    def create_for_failure(self) -> Path | None:
        """Creates the folder for a failure before `enter`.

        Returns:
            The folder, or None if it cannot be created or holds something else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return None if self._holds_other_files() and not self.config_path.exists() else self.path
        except OSError:
            return None

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def result_path(self) -> Path:
        return self.path / RESULT_FILE

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    @property
    def ledger_path(self) -> Path:
        """The workspace's ledger, in the folder of the run folders and studies; a study's runs are one level deeper."""
        workspace = self.path.absolute().parent
        return (workspace.parent if self._is_in_study else workspace) / LEDGER_FILE

    @property
    def _is_in_study(self) -> bool:
        return (self.path.absolute().parent / STUDY_FILE).exists()

    @property
    def origin(self) -> Origin:
        """The code and the machine that the run started with.

        Raises:
            CheckpointError: `config.json` cannot be read, or is damaged.
        """
        with reading(self.config_path):
            return Origin(**json.loads(read_regular(self.config_path))["started_with"])

    def result(self) -> Result | None:
        """Returns the result of the run, or None if it is not complete.

        Raises:
            CheckpointError: `result.json` cannot be read, or is damaged.
        """
        return Result.read(self.result_path)

    def is_complete(self, world: World) -> bool:
        """Returns whether the run has its result, the same answer on every rank."""
        return world.broadcast_object(world.is_main and self.result() is not None)

    def _holds_this_run(self, resume: Resume) -> bool:
        """Returns whether the folder holds this run, or nothing yet. Raises ConfigError if it holds anything else."""
        # Listed first: another process may write `config.json`, and then other files, at any moment.
        has_files = self.path.exists() and self._holds_other_files()
        if self.config_path.exists():
            self._check_same_run(RunFolder.read(self.path), resume)
            return True
        if has_files:
            raise ConfigError(f"--run-dir {self.path}: the folder is not empty and holds no run; choose another one")
        return False

    def _holds_other_files(self) -> bool:
        """Returns whether there are files that a run does not leave if it ends before `config.json` is complete."""
        return any(
            path.name not in (FAILURE_FILE, LOCK_FILE) and not is_temporary(path) for path in self.path.iterdir()
        )

    def _check_same_run(self, known: "RunFolder", resume: Resume) -> None:
        if resume == "never":
            raise ConfigError(f"--resume never, but {self.path} holds a run: choose another --run-dir")
        differences = known.fingerprint.differences(self.fingerprint)
        if differences:
            reason = self._describe_difference(*min(differences, key=_precedence))
            raise ConfigError(f"--run-dir {self.path}{reason}")

    def _describe_difference(self, name: str, theirs: Any, ours: Any) -> str:
        """Returns how the run in the folder differs from this one, and what the user can do."""
        match name:
            case "recipe.precision":
                remedy = _TO_KEEP_PRECISION[theirs]
                if self._is_in_study:  # which is continued with the same options only
                    remedy = "continue the study on the same kind of machine, or choose another --run-dir"
                return (
                    f": this run computes in {theirs}, and this command, on this hardware, would compute in {ours}: "
                    f"{remedy}"
                )
            case "gradients":
                remedy = "with" if theirs else "without"
                return (
                    f": this run adds up gradients in {theirs or 'float32'}: continue {remedy} "
                    "--gradient-reduction ddp-bfloat16"
                )
            case "compiled":
                steps, remedy = ("compiled", "with") if theirs else ("not compiled", "without")
                return f": this run's steps are {steps}: continue {remedy} --compile"
            case "dataset_sha256" if image_folder(self.fingerprint.dataset):
                return (
                    ": the folder of images is not what this run is trained on: images have been added, changed or "
                    "removed since, or others are left out; undo that, or choose another --run-dir"
                )
        theirs, ours = ("the default" if value is None else value for value in (theirs, ours))
        return f" is of another run: its {name} is {theirs}, not {ours}; choose another folder"


@contextmanager
def in_use(folder: Path, world: World, log: Callable[[str], None]) -> Iterator[None]:
    """Context in which no other process uses the folder of a run or a study. All ranks call this.

    Creates the folder, or removes the unfinished files of killed processes from it.

    Args:
        log: prints a line for the user if another process uses the folder and this one waits for it.

    Raises:
        ConfigError: another process still uses the folder after `LOCK_TIMEOUT_S`.
        CheckpointError: the folder cannot be written.
    """
    is_in_use = f"{folder} is in use by another process"
    with ExitStack() as stack:
        if world.is_main:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                waiting = f"{is_in_use}: waiting up to {LOCK_TIMEOUT_S:.0f} s for it to leave"
                if stack.enter_context(locked(folder / LOCK_FILE, log, waiting, timeout_s=LOCK_TIMEOUT_S)):
                    remove_temporary(folder)
            except TimeoutError:
                raise ConfigError(f"--run-dir {is_in_use}: stop that process, or choose another folder") from None
            except BrokenPipeError:  # the reader of our output is gone
                raise
            except OSError as error:
                raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
        world.barrier()
        yield


def create_in_runs(kind: str, suffix: str = "") -> Path:
    """Creates a folder in `runs/` with the time in its name, which no other run or study has.

    Raises:
        CheckpointError: it cannot be created.
    """
    with writing(RUNS):
        return create_folder(RUNS, f"{kind}-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}{suffix}")


def _precedence(difference: tuple[str, Any, Any]) -> int:
    """Returns an order of differences: another recipe explains all others, and all others the data set's digest."""
    return {"recipe.name": 0, "dataset_sha256": 2}.get(difference[0], 1)


def _new_folder(recipe: str, seed: int, world: World) -> Path:
    if not world.is_main:
        return RUNS
    path = create_in_runs(recipe, f"-s{seed}")
    world.on_leave.callback(_remove_if_empty, path)
    return path


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _with_known_folder(fingerprint: Fingerprint, path: Path) -> Fingerprint:
    """Returns the fingerprint with the folder of images under the name that the run at `path` knows.

    The place of the folder decides nothing, and its content has a digest of its own.
    """
    try:
        known = RunFolder.read(path).fingerprint.dataset
    except (TrainerError, KeyError, TypeError):  # no run to continue; `check` reports what is damaged
        return fingerprint
    are_folders = image_folder(known) and image_folder(fingerprint.dataset)
    return fingerprint.with_dataset(known) if are_folders else fingerprint
