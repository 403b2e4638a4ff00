"""A run's metrics on disk: `metrics.jsonl`, one line per log step and per epoch, and the same for TensorBoard."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import writing
from trainer.files import write_atomically


class MetricsLog:
    """Appends to a run's metrics.

    A full disk does not end the training: it is one warning. What does not fit waits in the files' buffers for the next
    write, or is lost in whole lines.

    Args:
        folder: the run folder.
        from_step: the step of the checkpoint from which the run continues; lines of later steps are removed.
        log: prints one line for the user.

    Raises:
        CheckpointError: the existing metrics cannot be read, or the folder cannot be written.
    """

    def __init__(self, folder: Path, *, from_step: int, log: Callable[[str], None]) -> None:
        self._folder = folder
        self._from_step = from_step
        self._log = log
        self._has_warned = False
        self._events: _EventFile | None = None
        path = folder / "metrics.jsonl"
        with writing(path):
            kept = [line for line in read_metrics(folder) if line["step"] <= from_step]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = path.open("ab")

    def write(self, kind: str, *, step: int, epoch: int, **values: float) -> None:
        """Writes one line. `kind` is `step` or `epoch`; `step` and `epoch` count those that are done."""
        line = {"kind": kind, "step": step, "epoch": epoch, "time": time.time(), **values}
        with self._warning_once():
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        with self._warning_once():
            self._events = self._events or _EventFile(self._folder / "tensorboard", self._from_step + 1)
            self._events.write(step, {f"{kind}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        for file in (self._file, self._events):
            if file is not None:
                with self._warning_once():
                    file.close()

    @contextmanager
    def _warning_once(self) -> Iterator[None]:
        """Context that turns a failed write into one warning."""
        try:
            yield
        except OSError as error:
            if not self._has_warned:
                self._log(
                    f"warning: cannot write the metrics in {self._folder}: {error.strerror or error}; "
                    "the training continues, and the next write tries again"
                )
            self._has_warned = True


class _EventFile:
    """A file of events for TensorBoard. torch's own writer dies in a thread if the disk is full.

    Args:
        purge_step: TensorBoard ignores events of this and later steps in older files of the folder.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        # Imported here because it takes a moment, and the first step should not wait for it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("ab"))
        self._add(file_version="brain.Event:2")
        self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: dict[str, float]) -> None:
        scalars = [{"tag": tag, "simple_value": value} for tag, value in values.items()]
        self._add(step=step, summary={"value": scalars})
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`, without a last line that a crash cut short."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []
    metrics = []
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except ValueError:
            break
    return metrics
