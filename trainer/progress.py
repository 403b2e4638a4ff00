"""Shows the progress of a run: a bar on a terminal, plain lines elsewhere."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

from convoy.processes import describe_output_error
from trainer.signals import StopRequest

if TYPE_CHECKING:
    import rich.progress

PLAIN_LINE_INTERVAL_S = 10.0
BAR_INTERVAL_S = 0.25


def duration(seconds: float) -> str:
    """Returns a time such as 45 s, 12 min, 3 h or 4 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


class Progress:
    """Prints messages and progress on the main rank, nothing on the others.

    Args:
        is_main: this is the main rank.
        stop: takes a stop request if the output is closed, as for SIGPIPE; if None, `log` raises BrokenPipeError.
    """

    def __init__(self, *, is_main: bool, stop: StopRequest | None = None) -> None:
        self._is_main = is_main
        self._stop = stop
        self._bar: rich.progress.Progress | None = None
        self._shown_at = 0.0
        self._started: tuple[float, int] | None = None

    def log(self, line: str) -> None:
        """Prints a line, above the bar if there is one.

        Raises:
            BrokenPipeError: The output is closed, and there is no `stop`.
        """
        if not self._is_main:
            return
        with self._stopping_if_closed():
            if self._bar is not None:
                self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, flush=True)

    @contextmanager
    def _stopping_if_closed(self) -> Iterator[None]:
        """Context for output. If it is closed, asks the run to stop and discards all later output."""
        try:
            yield
        except BrokenPipeError as error:
            if self._stop is None:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            bar, self._bar = self._bar, None
            if bar is not None:
                bar.stop()
            self._stop.request(signal.SIGPIPE, describe_output_error(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *, step: int, num_steps: int) -> None:
        """Starts the clock of the remaining time, and the bar on a terminal."""
        self._started, self._shown_at = (time.monotonic(), step), time.monotonic()
        if self._is_main and sys.stdout.isatty():
            self._bar = _make_bar()
            self._bar.add_task("", total=num_steps, completed=step, epoch="", loss=0.0, accuracy=0.0, rate=0.0)
            with self._stopping_if_closed():
                self._bar.start()

    def is_due(self) -> bool:
        """Returns whether it is time for an `update`, whose values may cost a synchronisation with the device."""
        interval_s = BAR_INTERVAL_S if self._bar is not None else PLAIN_LINE_INTERVAL_S
        return self._is_main and time.monotonic() - self._shown_at >= interval_s

    def update(self, *, step: int, num_steps: int, epoch: str, loss: float, accuracy: float, rate: float) -> None:
        """Shows the state of the run.

        Args:
            accuracy: between 0 and 1.
            rate: in images a second.
        """
        self._shown_at = time.monotonic()
        if self._bar is not None:
            with self._stopping_if_closed():
                self._bar.update(
                    self._bar.task_ids[0], completed=step, epoch=epoch, loss=loss, accuracy=100 * accuracy, rate=rate
                )
        elif self._started is not None:
            since, first = self._started
            left = (time.monotonic() - since) / max(1, step - first) * (num_steps - step)
            self.log(
                f"epoch {epoch}  step {step}/{num_steps}  loss {loss:.4f}  accuracy {100 * accuracy:.2f} %  "
                f"{rate:,.0f} images/s  {duration(left)} left"
            )

    def stop(self) -> None:
        """Removes the bar; later lines are printed without one."""
        if self._bar is not None:
            with self._stopping_if_closed():
                self._bar.stop()
            self._bar = None


def _make_bar() -> "rich.progress.Progress":
    from rich import console, progress  # slow to import, and only needed on a terminal

    class Console(console.Console):
        def on_broken_pipe(self) -> None:
            """Raises the BrokenPipeError, where rich would end the process without saving; not in the bar's thread."""
            if threading.current_thread() is threading.main_thread():
                raise
            raise SystemExit

    return progress.Progress(
        progress.TextColumn("epoch {task.fields[epoch]}"),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TextColumn("loss {task.fields[loss]:.4f}"),
        progress.TextColumn("accuracy {task.fields[accuracy]:.2f} %"),
        progress.TextColumn("{task.fields[rate]:,.0f} images/s"),
        progress.TimeRemainingColumn(),
        console=Console(),
        transient=True,
        refresh_per_second=8,
    )
