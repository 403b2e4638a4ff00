"""The run's numbers on disk: `metrics.jsonl`, a line a log step and an epoch, and the same for TensorBoard."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Appends to a run's metrics. When a run goes on from a checkpoint, what lies after it is cut off first.

    Args:
        folder: the run folder.
        from_step: lines of later steps are dropped.
    """

    def __init__(self, folder: Path, *, from_step: int) -> None:
        self._folder = folder
        self._from_step = from_step
        self._writer: SummaryWriter | None = None
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= from_step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a")

    def write(self, kind: str, *, step: int, epoch: int, **values: float) -> None:
        """One line; `kind` is `step` or `epoch`, and both count from 1 (so many are done)."""
        self._file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, "time": time.time(), **values}) + "\n")
        self._file.flush()
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second, which the first step need not wait for

            self._writer = SummaryWriter(self._folder / "tensorboard", purge_step=self._from_step + 1)
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last line that a crash cut short is left out."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    metrics = []
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except ValueError:
            break
    return metrics
