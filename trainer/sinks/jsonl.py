"""`metrics.jsonl`: one line for each log step and epoch."""

import json
import time
from collections.abc import Mapping, Sequence

from trainer.errors import writing
from trainer.files import write_atomically
from trainer.records.metrics import METRICS_FILE, read_metrics
from trainer.sinks.base import Kind, Mistake, Outcome, RunInfo


class JsonLinesSink:
    """Appends to `metrics.jsonl`, without the lines of steps after the checkpoint.

    What does not fit on a full disk waits in the file's buffer for the next write, or is lost in whole lines.

    Raises:
        CheckpointError: the existing metrics cannot be read, or the folder cannot be written.
    """

    def __init__(self, run: RunInfo) -> None:
        self._num_steps = run.num_steps
        path = run.folder / METRICS_FILE
        with writing(path):
            known = (line for line in read_metrics(run.folder) if line["kind"] != "result")  # to be written once more
            kept = [line for line in known if line["step"] <= run.from_step]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = path.open("ab")

    def write(self, kind: Kind, *, step: int, epoch: int, values: Mapping[str, float]) -> None:
        line = {"kind": kind, "step": step, "epoch": epoch, "time": time.time(), **values}
        if kind == "step":
            line["num_steps"] = self._num_steps  # how far the run is, for `trainer.watch`
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def show_mistakes(self, mistakes: Sequence[Mistake], *, step: int) -> None:
        """Does nothing: the report has images of mistakes."""

    def close(self, outcome: Outcome) -> None:
        self._file.close()
