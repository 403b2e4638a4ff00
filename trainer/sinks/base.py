"""The protocol of a sink, and what it gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from trainer.records.mistakes import Mistake as Mistake

Outcome = Literal["finished", "failed", "interrupted"]
Kind = Literal["step", "epoch", "result"]


def as_utf8(text: str) -> str:
    """Replaces the undecodable bytes that names of folders may contain: services and TensorBoard take UTF-8 only."""
    return text.encode(errors="replace").decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """The run whose metrics a sink gets.

    Args:
        folder: the run folder, which exists; a sink may keep files of its own in it.
        from_step: the step of the checkpoint from which the run continues; 0 for a new run.
        num_steps: of the whole run.
        settings: hyper-parameters and the like by dotted names.
    """

    folder: Path
    from_step: int
    num_steps: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        return as_utf8(self.folder.name)


class Sink(Protocol):
    """A place for the metrics of one run. Its errors end no training: its caller warns."""

    def write(self, kind: Kind, *, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Writes metrics.

        Args:
            kind: of the last steps, of an epoch and its validation, or of the trained network.
            step: steps done; `epoch` likewise.
        """

    def show_mistakes(self, mistakes: Sequence[Mistake], *, step: int) -> None:
        """Shows images of mistakes, the most confident ones first."""

    def close(self, outcome: Outcome) -> None:
        """Ends the sink. A run that is continued opens it again."""


def chart_names(kind: Kind, values: Mapping[str, float]) -> dict[str, float]:
    """Returns metrics by the names of charts: `train/loss` and `validation/loss` of an epoch, `step/loss`."""
    prefixes = {"train": "train", "val": "validation", "test": "test"}
    found = {}
    for name, value in values.items():
        prefix, _, rest = name.partition("_")
        found[f"{prefixes[prefix]}/{rest}" if prefix in prefixes else f"{kind}/{name}"] = value
    return found
