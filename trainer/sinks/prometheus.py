"""Metrics for Prometheus, on a port of the main rank, as long as it trains."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, make_wsgi_app, start_http_server

from convoy.same_origin import HostCheck, host_check
from trainer.paths import CHECKPOINTS
from trainer.sinks.base import Kind, Mistake, Outcome, RunInfo

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

STEP = "convoy_training_step"
NUM_STEPS = "convoy_training_num_steps"
EPOCH = "convoy_training_epoch"
PROGRESS_TIME = "convoy_training_last_progress_timestamp_seconds"
CHECKPOINT_TIME = "convoy_training_last_checkpoint_timestamp_seconds"
FIGURES = {
    "loss": ("convoy_training_loss", "Mean training loss of the last logged steps."),
    "accuracy": ("convoy_training_accuracy", "Training accuracy of the last logged steps, between 0 and 1."),
    "lr_factor": ("convoy_training_lr_factor", "Factor of the recipe's learning rates at the last logged step."),
    "images_per_second": ("convoy_training_images_per_second", "Images trained per second, over all ranks together."),
    "val_loss": ("convoy_training_validation_loss", "Loss on the validation images after the last epoch."),
    "val_accuracy": ("convoy_training_validation_accuracy", "Accuracy on the validation images, between 0 and 1."),
    "seconds": ("convoy_training_seconds", "Seconds in training steps, in all sessions of the run."),
}
"""Figures of a run by their names in `metrics.jsonl`: name and help text of the metric."""
NAMES = frozenset({STEP, NUM_STEPS, EPOCH, PROGRESS_TIME, CHECKPOINT_TIME, *(name for name, _ in FIGURES.values())})
"""All names. Each metric has the label `run`, the name of the run folder."""


class PrometheusSink:
    """Serves the newest value of each figure.

    Args:
        address: `HOST:PORT`.

    Raises:
        OSError: the port is in use.
    """

    def __init__(self, run: RunInfo, address: str) -> None:
        self._registry = CollectorRegistry()
        self._run = run
        self._gauges: dict[str, Gauge] = {}
        self._set(STEP, "Steps done.", run.from_step)
        self._set(NUM_STEPS, "Steps of the whole run.", run.num_steps)
        self._set(PROGRESS_TIME, "Time of the last logged step or epoch.", time.time())
        saved = Gauge(CHECKPOINT_TIME, "Time of the newest checkpoint; 0 for none.", ["run"], registry=self._registry)
        saved.labels(run.name).set_function(lambda: _newest_change(run.folder / CHECKPOINTS))
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        self._server, self._thread = start_http_server(int(port), host, self._registry)
        if (hosts := host_check(host, ())) is not None:
            self._server.set_app(_for_this_machine(make_wsgi_app(self._registry), hosts))

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def write(self, kind: Kind, *, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self._set(STEP, "Steps done.", step)
        self._set(EPOCH, "The epoch of the last logged step.", epoch)
        self._set(PROGRESS_TIME, "Time of the last logged step or epoch.", time.time())
        for key in FIGURES.keys() & values.keys():
            self._set(*FIGURES[key], values[key])

    def show_mistakes(self, mistakes: Sequence[Mistake], *, step: int) -> None:
        """Does nothing."""

    def close(self, outcome: Outcome) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _set(self, name: str, text: str, value: float) -> None:
        """Sets a metric. It appears with its first value, so that no figure is 0 before it is known."""
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, ["run"], registry=self._registry)
        self._gauges[name].labels(self._run.name).set(value)


def _for_this_machine(app: "WSGIApplication", hosts: HostCheck) -> "WSGIApplication":
    """Returns the application, which refuses names that another site can have."""

    def answer(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if not hosts.refuses(environ.get("HTTP_HOST")):
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"the Host may be another site's: this port serves this machine only\n"]

    return answer


def _newest_change(folder: Path) -> float:
    """Returns when the newest checkpoint in a folder was complete; 0 if there is none."""
    newest = 0.0
    for path in folder.glob("step-*"):
        with suppress(FileNotFoundError):  # the training deletes older ones
            newest = max(newest, path.stat().st_mtime)
    return newest
