"""What rank 0 tells the user while the run goes on: a bar on a terminal, plain lines elsewhere."""

import os
import signal
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from convoy.processes import describe_output_error
from trainer.signals import StopRequest

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

PLAIN_LINE_EVERY_S = 10.0
BAR_REFRESH_S = 0.25


class Progress:
    """The user's view of the run; silent on every rank but the main one.

    Args:
        is_main: whether this rank speaks.
        stop: is asked for the end, as SIGPIPE asks, when output cannot be written; None: `say` raises BrokenPipeError.
    """

    def __init__(self, *, is_main: bool, stop: StopRequest | None = None) -> None:
        self._is_main = is_main
        self._stop = stop
        self._bar: Bar | None = None
        self._shown_at = 0.0
        self._started: tuple[float, int] | None = None

    def say(self, line: str) -> None:
        """One line, above the bar if there is one."""
        if not self._is_main:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        try:
            print(line, flush=True)
        except BrokenPipeError as error:
            if self._stop is None:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for this line, and what is still said
            self._stop.ask(signal.SIGPIPE, describe_output_error(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *, step: int, num_steps: int) -> None:
        """Steps begin to count."""
        self._started, self._shown_at = (time.monotonic(), step), time.monotonic()
        if self._is_main and sys.stdout.isatty():
            self._bar = _make_bar()
            self._bar.add_task("", total=num_steps, completed=step, epoch="", loss=0.0, accuracy=0.0, rate=0.0)
            self._bar.start()

    def is_due(self) -> bool:
        """Whether it is time to show the user something new (asking is cheap; what to show may cost a sync)."""
        every = BAR_REFRESH_S if self._bar is not None else PLAIN_LINE_EVERY_S
        return self._is_main and time.monotonic() - self._shown_at >= every

    def update(self, *, step: int, num_steps: int, epoch: str, loss: float, accuracy: float, rate: float) -> None:
        """Show where the run is. `accuracy` between 0 and 1, `rate` in images a second."""
        self._shown_at = time.monotonic()
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], completed=step, epoch=epoch, loss=loss, accuracy=100 * accuracy, rate=rate
            )
        elif self._started is not None:
            since, first = self._started
            left = (time.monotonic() - since) / max(1, step - first) * (num_steps - step)
            self.say(
                f"epoch {epoch}  step {step}/{num_steps}  loss {loss:.4f}  accuracy {100 * accuracy:.2f} %  "
                f"{rate:,.0f} images/s  {left:.0f} s left"
            )

    def stop(self) -> None:
        """Take the bar away; lines go on."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _make_bar() -> "Bar":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("accuracy {task.fields[accuracy]:.2f} %"),
        TextColumn("{task.fields[rate]:,.0f} images/s"),
        TimeRemainingColumn(),
        transient=True,
        refresh_per_second=8,
    )
