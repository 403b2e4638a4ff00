"""The folder of a study: its options and its results so far, from which it continues."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from convoy.named_files import read_regular
from trainer.errors import ConfigError, reading, writing
from trainer.files import append_line, is_temporary, read_lines, write_json
from trainer.hardware import describe
from trainer.paths import LOCK_FILE, STUDY_FILE
from trainer.ranks.world import World
from trainer.records.origin import Origin
from trainer.records.run_folder import RUNS, create_in_runs, in_use

_FREE_OPTIONS = {"run_dir", "data_dir", "device", "runs", "stack"}
"""Options that may change when a study is continued: those of its place, its number of runs, and how many at a time."""


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """The folder of a study. `results.jsonl` holds one result a line, each under a unique key.

    Args:
        name: the study's name, such as `seeds`.
    """

    path: Path
    name: str

    @classmethod
    @contextmanager
    def open(cls, name: str, config: Any, world: World) -> Iterator["StudyFolder"]:
        """Creates the folder or opens that of the same study, and locks it. All ranks call this.

        Args:
            config: the command line, a dataclass; its `run_dir` is the folder, or None for a new one in `runs/`. A
                study is continued with the same options only, except where it runs and how many runs it has.

        Raises:
            ConfigError: the folder holds something else.
            CheckpointError: the folder cannot be written.
        """
        path = world.broadcast_object(config.run_dir or (create_in_runs(f"study-{name}") if world.is_main else RUNS))
        folder = cls(path, name)
        options = {field: value for field, value in asdict(config).items() if field not in _FREE_OPTIONS}
        defaults = {field.name: field.default for field in fields(config) if field.default is not MISSING}
        identity, defaults = json.loads(json.dumps([{"study": name, "asked": options}, defaults], default=str))
        if world.is_main:
            with writing(path):
                folder._holds_this_study(identity, defaults)  # a refusal need not wait for the lock
        world.barrier()
        with in_use(path, world, partial(print, flush=True)):
            if world.is_main:
                with writing(path):
                    folder._create_or_continue(identity, defaults, world)
            world.barrier()
            yield folder

    def _create_or_continue(self, identity: dict[str, Any], defaults: dict[str, Any], world: World) -> None:
        """Writes `study.json` into a new folder; records the machine in that of this study, if it is a new one."""
        if not self._holds_this_study(identity, defaults):
            write_json(self.path / STUDY_FILE, identity | asdict(Origin.here(world)))
            return
        known, machine = self.description(), describe(world.device)
        others = known.get("continued_on", [])
        if _without_threads(machine) not in map(_without_threads, [known["machine"], *others]):
            write_json(self.path / STUDY_FILE, known | {"continued_on": [*others, machine]})

    def _holds_this_study(self, identity: dict[str, Any], defaults: dict[str, Any]) -> bool:
        """Returns whether the folder holds this study, or nothing yet. Raises ConfigError if it holds anything else.

        Args:
            defaults: of the options: an older version wrote none for an option that it did not have.
        """
        if not self.path.exists():
            return False
        # Listed first: another process may write `study.json`, and then other files, at any moment.
        is_empty = all(is_temporary(path) or path.name == LOCK_FILE for path in self.path.iterdir())
        if (self.path / STUDY_FILE).exists():
            self._check(identity, defaults)
            return True
        if not is_empty:
            raise ConfigError(f"--run-dir {self.path}: the folder is not empty and holds no study")
        return False

    def _check(self, identity: dict[str, Any], defaults: dict[str, Any]) -> None:
        """Raises ConfigError if the folder holds another study, or this one with other options."""
        known = self.description()
        if known["study"] != identity["study"]:
            raise ConfigError(f"--run-dir {self.path} holds the study {known['study']}: choose another folder")
        theirs, ours = _with_defaults(known["asked"], defaults, identity), identity["asked"]
        if differing := [name for name in {**theirs, **ours} if theirs.get(name, ...) != ours.get(name, ...)]:
            options = ", ".join(
                f"{_option(name, theirs.get(name))} (you ask for {_option(name, ours.get(name))})" for name in differing
            )
            raise ConfigError(
                f"--run-dir {self.path} holds this study with other options, {options}: give the same ones to continue "
                "it, or choose another folder"
            )

    def description(self) -> dict[str, Any]:
        """Returns the content of `study.json`: options, code and machine.

        `continued_on` holds the other machines that the study ran on, if there are any.

        Raises:
            CheckpointError: the file cannot be read, or is damaged.
        """
        with reading(self.path / STUDY_FILE):
            known: dict[str, Any] = json.loads(read_regular(self.path / STUDY_FILE))
            if "study" not in known or not all(isinstance(known.get(name), dict) for name in ("asked", "machine")):
                raise ValueError("it describes no study")
        return known

    def results(self) -> dict[str, Any]:
        """Returns the results so far by key, without a last line that a crash cut short.

        Raises:
            CheckpointError: the file cannot be read, or is damaged.
        """
        with reading(self._results_path):
            entries = [json.loads(line) for line in read_lines(self._results_path)]
            return {entry["key"]: entry["value"] for entry in entries}

    def add_result(self, key: str, value: Any) -> None:
        """Appends a result. Only the main rank does.

        Raises:
            CheckpointError: the file cannot be written.
        """
        with writing(self._results_path):
            append_line(self._results_path, json.dumps({"key": key, "value": value}))

    @property
    def _results_path(self) -> Path:
        return self.path / "results.jsonl"


def _with_defaults(asked: dict[str, Any], defaults: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of a folder, with the defaults of those of this study's that its version did not have."""
    missing = {name: defaults[name] for name in identity["asked"] if name in defaults}
    return missing | {name: value for name, value in asked.items() if name not in _FREE_OPTIONS}


def _option(name: str, value: Any) -> str:
    """Returns an option as on the command line."""
    flag = name.replace("_", "-")
    if value is None:
        return f"no --{flag}"
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def _without_threads(machine: dict[str, Any]) -> dict[str, Any]:
    """Drops the threads of a rank, which depend on the number of ranks and not on the machine."""
    return {name: value for name, value in machine.items() if name != "threads"}
