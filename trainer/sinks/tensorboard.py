"""TensorBoard's event files: a chart for training and validation together, hyper-parameters, images of mistakes.

TensorBoard draws the same tag of several folders in one chart: `train` and `validation` each have an event file.
"""

import io
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trainer.sinks.base import Kind, Mistake, Outcome, RunInfo, chart_names
from trainer.typed_values import as_text

FOLDER = "tensorboard"
_CURVES = ("train", "validation")


class TensorBoardSink:
    """Writes event files. torch's own writer dies in a thread if the disk is full."""

    def __init__(self, run: RunInfo) -> None:
        self._run = run
        self._files: dict[str, _EventFile] = {}

    def write(self, kind: Kind, *, step: int, epoch: int, values: Mapping[str, float]) -> None:
        by_file: dict[str, dict[str, float]] = {}
        for name, value in chart_names(kind, values).items():
            curve, _, rest = name.partition("/")
            if kind == "epoch" and curve in _CURVES:
                by_file.setdefault(curve, {})[f"epoch/{rest}"] = value
            else:
                by_file.setdefault("", {})[name] = value
        for file, scalars in by_file.items():
            self._file(file).write(step, [{"tag": tag, "simple_value": value} for tag, value in scalars.items()])

    def show_mistakes(self, mistakes: Sequence[Mistake], *, step: int) -> None:
        images = [
            {"tag": f"mistakes/{number:02d}: {mistake.caption}", "image": _encode(mistake)}
            for number, mistake in enumerate(mistakes, start=1)
        ]
        self._file("").write(step, images)

    def close(self, outcome: Outcome) -> None:
        with ExitStack() as stack:  # closes all files even if the disk is full
            for file in self._files.values():
                stack.callback(file.close)
            if "" in self._files:
                self._files[""].end_session(outcome)

    def _file(self, name: str) -> "_EventFile":
        if name not in self._files:
            file = _EventFile(self._run.folder / FOLDER / name, self._run.from_step + 1)
            self._files[name] = file
            if name == "":
                file.start_session(self._run)
        return self._files[name]


class _EventFile:
    """A file of events.

    Args:
        purge_step: TensorBoard ignores events of this and later steps in older files of the folder.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        # Imported here because it takes a moment, and the first step should not wait for it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("ab"))
        self._add(file_version="brain.Event:2")
        self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Sequence[Mapping[str, Any]]) -> None:
        self._add(step=step, summary={"value": values})
        self._records.flush()

    def start_session(self, run: RunInfo) -> None:
        """Writes the hyper-parameters, which TensorBoard's page HParams compares between runs."""
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

        started = SessionStartInfo(start_time_secs=time.time(), group_name=run.name)
        for name, value in run.settings.items():
            if isinstance(value, bool):
                started.hparams[name].bool_value = value
            elif isinstance(value, int | float):
                started.hparams[name].number_value = value
            else:
                started.hparams[name].string_value = as_text(value)
        self._add_hparams(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=started))

    def end_session(self, outcome: Outcome) -> None:
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        status = STATUS_SUCCESS if outcome == "finished" else STATUS_FAILURE
        ended = SessionEndInfo(status=status, end_time_secs=time.time())
        self._add_hparams(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=ended))

    def close(self) -> None:
        self._records.close()

    def _add_hparams(self, tag: str, content: Any) -> None:
        from tensorboard.plugins.hparams import metadata

        summary = {"tag": tag, "metadata": metadata.create_summary_metadata(content), "tensor": metadata.NULL_TENSOR}
        self._add(step=0, summary={"value": [summary]})
        self._records.flush()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


def _encode(mistake: Mistake) -> dict[str, Any]:
    """Returns TensorBoard's message of an image."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(mistake.pixels).save(png, format="png")
    height, width = mistake.pixels.shape[:2]
    colorspace = 1 if mistake.pixels.ndim == 2 else 3
    return {"height": height, "width": width, "colorspace": colorspace, "encoded_image_string": png.getvalue()}
