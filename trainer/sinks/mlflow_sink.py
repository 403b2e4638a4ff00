"""MLflow. Its own settings hold: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME` and others."""

import itertools
from collections.abc import Mapping, Sequence

from trainer.sinks.base import Kind, Mistake, Outcome, RunInfo, chart_names
from trainer.sinks.identity import remembered_id
from trainer.typed_values import as_text

_MAX_PARAMS = 100
"""A request takes no more."""
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class MlflowSink:
    """Logs to one run of MLflow, the same one when the training continues."""

    def __init__(self, run: RunInfo) -> None:
        import mlflow

        self._mlflow = mlflow
        is_new = False

        def start() -> str:
            nonlocal is_new
            is_new = True
            return str(mlflow.start_run(run_name=run.name).info.run_id)

        run_id = remembered_id(run.folder, "mlflow", start)
        if not is_new:
            mlflow.start_run(run_id=run_id)
            return
        parameters = iter((name, as_text(value)) for name, value in run.settings.items())
        while batch := dict(itertools.islice(parameters, _MAX_PARAMS)):
            mlflow.log_params(batch)

    def write(self, kind: Kind, *, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({"epoch": epoch, **chart_names(kind, values)}, step=step)

    def show_mistakes(self, mistakes: Sequence[Mistake], *, step: int) -> None:
        for number, mistake in enumerate(mistakes, start=1):
            name = "".join(letter if letter.isalnum() else "-" for letter in f"{mistake.label}-as-{mistake.predicted}")
            name = name.encode()[:200].decode(errors="ignore")  # a file's name has 255 bytes at most
            self._mlflow.log_image(mistake.pixels, f"mistakes/{number:02d}-{name}.png")

    def close(self, outcome: Outcome) -> None:
        self._mlflow.end_run(_STATUS[outcome])
