"""A study's folder: what it was asked, what it has found so far, and so where it goes on."""

import datetime
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import CheckpointError, ConfigError, writing
from trainer.files import append_line, is_temporary, read_lines, write_json
from trainer.hardware import describe
from trainer.ranks.world import World
from trainer.records.run_folder import LOCK_FILE, RUNS, STUDY_FILE, git_commit, in_use

_NOT_ASKED = {"run_dir", "data_dir", "device", "runs"}
"""Fields of a study's command line that change where it runs, or how long it goes on, not what it finds."""


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """The folder of a study of that name. Results are lines of `results.jsonl`, each under a key of its own."""

    path: Path
    name: str

    @classmethod
    @contextmanager
    def enter(cls, name: str, config: Any, run_dir: Path | None, world: World) -> Iterator["StudyFolder"]:
        """Make the folder, or enter the one of the same study, and keep others out. All ranks call this.

        Args:
            config: the command line, a dataclass; all of it but where to run must be the same to go on.

        Raises:
            ConfigError: the folder belongs to something else, or somebody else uses it.
            CheckpointError: it cannot be written.
        """
        now = datetime.datetime.now(datetime.UTC)
        path = world.broadcast_object(run_dir or RUNS / f"study-{name}-{now:%Y%m%dT%H%M%SZ}")
        folder = cls(path, name)
        if world.is_main:
            asked = {field: value for field, value in asdict(config).items() if field not in _NOT_ASKED}
            folder._claim({"study": name, "asked": asked}, world)
        world.barrier()
        with in_use(path, world, partial(print, flush=True)):
            yield folder

    def _claim(self, mark: dict[str, Any], world: World) -> None:
        mark = json.loads(json.dumps(mark, default=str))
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            machine = describe(world.device)
            if (self.path / STUDY_FILE).exists():
                known = self.description()
                if {key: known[key] for key in mark} != mark:
                    raise ConfigError(
                        f"--run-dir {self.path} holds another study, {known['study']} of {known['asked']}: "
                        "choose another folder"
                    )
                others = known.get("continued_on", [])
                if _kind(machine) not in map(_kind, [known["machine"], *others]):
                    write_json(self.path / STUDY_FILE, known | {"continued_on": [*others, machine]})
                return
            if not all(is_temporary(path) or path.name == LOCK_FILE for path in self.path.iterdir()):
                raise ConfigError(f"--run-dir {self.path}: the folder is not empty and holds no study")
            started = {"git_commit": git_commit(), "world_size": world.size, "machine": machine}
            write_json(self.path / STUDY_FILE, mark | started)

    def description(self) -> dict[str, Any]:
        """What was asked, on which machine it began, and in `continued_on` those others on which it went on, if any."""
        try:
            known: dict[str, Any] = json.loads((self.path / STUDY_FILE).read_text())
        except ValueError as error:
            raise CheckpointError(f"{self.path / STUDY_FILE} is damaged: {error}") from error
        return known

    def results(self) -> dict[str, Any]:
        """What was found so far, by key; a last line that a crash cut short is left out."""
        try:
            entries = [json.loads(line) for line in read_lines(self._results_path)]
        except ValueError as error:
            raise CheckpointError(f"{self._results_path} is damaged: {error}") from error
        return {entry["key"]: entry["value"] for entry in entries}

    def add(self, key: str, value: Any) -> None:
        """Write a result down. Only the main rank does.

        Raises:
            CheckpointError: it cannot be written.
        """
        with writing(self._results_path):
            append_line(self._results_path, json.dumps({"key": key, "value": value}))

    @property
    def _results_path(self) -> Path:
        return self.path / "results.jsonl"


def _kind(machine: dict[str, Any]) -> dict[str, Any]:
    """What makes it another machine; how many threads a rank has follows from the number of ranks."""
    return {name: value for name, value in machine.items() if name != "threads"}
