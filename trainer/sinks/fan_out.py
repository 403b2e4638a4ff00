"""All sinks of a run as one, whose failures are warnings."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from convoy.extras import how_to_install
from trainer.config import LogTo
from trainer.errors import ConfigError, Interrupted, in_one_line
from trainer.recipes.fields import flatten
from trainer.records.mistakes import write_mistakes
from trainer.records.run_folder import RunFolder
from trainer.sinks.background import BackgroundSink
from trainer.sinks.base import Kind, Mistake, Outcome, RunInfo, Sink, as_utf8
from trainer.sinks.jsonl import JsonLinesSink
from trainer.sinks.tensorboard import TensorBoardSink


def check_installed(services: Sequence[LogTo], metrics_address: str | None = None) -> None:
    """Checks that the packages of services are installed, before anything is built.

    Raises:
        ConfigError: one is missing.
    """
    for service in services:
        if importlib.util.find_spec(service) is None:
            raise ConfigError(f"--log-to {service} needs the package {service}: {how_to_install(service)}")
    if metrics_address is not None and importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError(f"--metrics-address needs the package prometheus-client: {how_to_install('serving')}")


class Sinks:
    """The sinks of one run; none on ranks other than the main one.

    The sinks in the run folder try again after a failure, as a full disk may get room. A service that failed once gets
    nothing more.

    Args:
        folder: the run folder.
        local: sinks in it.
        services: other sinks, by the options that ask for them.
        log: prints one line for the user.
    """

    def __init__(
        self, folder: Path, local: Sequence[Sink], services: Mapping[str, Sink], log: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._local = local
        self._services = dict(services)
        self._log = log
        self._has_warned = False

    def write(self, kind: Kind, *, step: int, epoch: int, **values: float) -> None:
        """Writes metrics; see `Sink.write`."""
        self._for_all(lambda sink: sink.write(kind, step=step, epoch=epoch, values=values))

    def show_mistakes(self, mistakes: Sequence[Mistake], *, step: int) -> None:
        """Shows images of mistakes."""
        self._for_all(lambda sink: sink.show_mistakes(mistakes, step=step))

    def keep_mistakes(self, mistakes: Sequence[Mistake], *, epoch: int) -> None:
        """Keeps images of an epoch's mistakes in the run folder, for a page."""
        try:
            write_mistakes(self._folder, epoch, mistakes)
        except OSError as error:
            self._warn_of_folder(error)

    def close(self, outcome: Outcome) -> None:
        self._for_all(lambda sink: sink.close(outcome))

    def _for_all(self, call: Callable[[Sink], None]) -> None:
        for sink in self._local:
            try:
                call(sink)
            except Exception as error:  # a full disk, or a name that TensorBoard cannot take
                self._warn_of_folder(error)
        for name, sink in list(self._services.items()):
            try:
                call(sink)
            except Exception as error:
                del self._services[name]
                reason = in_one_line(error)[:300]
                self._log(f"warning: {name} failed: {reason}; the training continues without it")

    def _warn_of_folder(self, error: Exception) -> None:
        if not self._has_warned:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            self._log(
                f"warning: cannot write the metrics in {self._folder}: {reason}; "
                "the training continues, and the next write tries again"
            )
        self._has_warned = True


@contextmanager
def open_sinks(
    folder: RunFolder,
    services: Sequence[LogTo],
    *,
    steps: tuple[int, int],
    is_main: bool,
    log: Callable[[str], None],
    metrics_address: str | None = None,
) -> Iterator[Sinks]:
    """Context with the sinks of a run, on the main rank; other ranks get none.

    Args:
        steps: that of the checkpoint from which the run continues, and the number of all.
        log: prints one line for the user.
        metrics_address: `HOST:PORT` that answers Prometheus; None for none.

    Raises:
        CheckpointError: the run folder's existing metrics cannot be read, or the folder cannot be written.
    """
    if not is_main:
        yield Sinks(folder.path, (), {}, log)
        return
    values = flatten(folder.fingerprint.values)
    settings = {name: as_utf8(value) if isinstance(value, str) else value for name, value in values.items()}
    run = RunInfo(folder=folder.path, from_step=steps[0], num_steps=steps[1], settings=settings)
    local: list[Sink] = [JsonLinesSink(run), TensorBoardSink(run)]
    others = {f"--log-to {name}": BackgroundSink(partial(_open_service, name, run)) for name in services}
    if metrics_address is not None:
        others["--metrics-address"] = BackgroundSink(partial(_open_prometheus, run, metrics_address))
    sinks = Sinks(folder.path, local, others, log)
    outcome: Outcome = "failed"
    try:
        yield sinks
        outcome = "finished"
    except Interrupted:
        outcome = "interrupted"
        raise
    finally:
        sinks.close(outcome)


def _open_service(name: LogTo, run: RunInfo) -> Sink:
    """Opens a sink of a service; imports its package, which takes a moment."""
    if name == "wandb":
        from trainer.sinks.wandb_sink import WandbSink

        return WandbSink(run)
    from trainer.sinks.mlflow_sink import MlflowSink

    return MlflowSink(run)


def _open_prometheus(run: RunInfo, address: str) -> Sink:
    from trainer.sinks.prometheus import PrometheusSink  # a training without it needs no package for it

    return PrometheusSink(run, address)
