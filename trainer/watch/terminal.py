"""Shows watched runs in the terminal: a table that changes, or plain lines where the output is no terminal."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

from trainer.progress import duration
from trainer.watch.run import State, WatchedRun

if TYPE_CHECKING:
    from rich.console import Group

REFRESH_INTERVAL_S = 0.5
PLAIN_LINE_INTERVAL_S = 10.0
"""Between lines of a run in the middle of an epoch."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 12
_WIDE = 120
"""Characters of a terminal that has room for every column."""


def follow_in_table(runs: Sequence[WatchedRun]) -> None:
    """Shows a table of the runs until all have ended; the last table stays."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(make_table(runs, console.width), console=console, refresh_per_second=4) as live:
        while any(run.state is State.RUNNING for run in runs):
            time.sleep(REFRESH_INTERVAL_S)
            for run in runs:
                run.refresh()
            live.update(make_table(runs, console.width))


def make_table(runs: Sequence[WatchedRun], width: int) -> "Group":
    """Returns the table of the runs, with the reasons of failures below it.

    Args:
        width: of the terminal, in characters. A narrow one gets fewer columns.
    """
    from rich.console import Group, RenderableType
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    is_wide = width >= _WIDE
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    table.add_column("run", overflow="ellipsis", no_wrap=True, ratio=3)
    table.add_column("", ratio=2, min_width=8)
    wide, narrow = ("epoch", "loss", "", "accuracy", "validation", "images/s", ""), ("epoch", "loss", "validation", "")
    for name in wide if is_wide else narrow:
        table.add_column(name, justify="right", no_wrap=True)
    colours = {State.RUNNING: "", State.FINISHED: "green", State.FAILED: "red", State.STOPPED: "yellow"}
    for run in runs:
        num_steps = run.num_steps or max(1, run.step)
        is_unknown = run.num_steps is None and run.state is State.RUNNING
        bar = ProgressBar(total=num_steps, completed=min(run.step, num_steps), pulse=is_unknown)
        loss = _number(_loss(run), "{:.4f}")
        cells: list[RenderableType] = [Text(run.name), bar, Text(_epoch(run)), Text(loss)]
        cells += [Text(curve(_losses(run))), Text(_percent(_accuracy(run)))] if is_wide else []
        cells += [Text(_percent(run.newest("epoch", "val_accuracy")))]
        cells += [Text(_number(run.images_per_second, "{:,.0f}"))] if is_wide else []
        table.add_row(*cells, Text(_ending(run), style=colours[run.state]))
    failures = [f"{run.name}: {run.reason}" for run in runs if run.state is State.FAILED]
    return Group(table, *(Text(text, style="red") for text in failures))


def follow_in_lines(runs: Sequence[WatchedRun]) -> None:
    """Prints a line for each epoch, and now and then between two, until all runs have ended."""
    printers = [_LinePrinter(run) for run in runs]
    while True:
        for printer in printers:
            printer.print_news()
        if all(run.state is not State.RUNNING for run in runs):
            return
        time.sleep(REFRESH_INTERVAL_S)
        for run in runs:
            if run.state is State.RUNNING:
                run.refresh()


@dataclass(slots=True)
class _LinePrinter:
    """Prints what is new of one run."""

    run: WatchedRun
    epoch: int = 0
    step: int = 0
    printed_at: float = 0.0
    has_ended: bool = False

    def print_news(self) -> None:
        run = self.run
        for line in run.of_kind("epoch"):
            if line["epoch"] > self.epoch:
                self.epoch = line["epoch"]
                self._print(_describe_epoch(run, line), line["step"])
        if run.state is not State.RUNNING:
            if not self.has_ended:
                self._print(describe_end(run), run.step)
            self.has_ended = True
        elif run.step > self.step and time.monotonic() - self.printed_at > PLAIN_LINE_INTERVAL_S:
            self._print(_describe_step(run), run.step)

    def _print(self, text: str, step: int) -> None:
        self.step, self.printed_at = step, time.monotonic()
        print(f"{self.run.name}: {text}", flush=True)


def describe_end(run: WatchedRun) -> str:
    """Returns how a run ended, with its test accuracy if it is complete."""
    if run.state is State.FINISHED:
        return f"finished{_test(run)}"
    return f"{run.state} at step {max(run.step, run.saved_step):,}: {run.reason}"


def curve(values: Sequence[float]) -> str:
    """Returns a curve of block characters, the newest value at its right; empty for fewer than two values."""
    values = [value for value in values if math.isfinite(value)]
    if len(values) < 2:
        return ""
    width = min(_CURVE_WIDTH, len(values))
    ends = [len(values) * number // width for number in range(width + 1)]
    means = [fmean(values[start:end]) for start, end in pairwise(ends)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def _losses(run: WatchedRun) -> list[float]:
    by_step = [line["loss"] for line in run.of_kind("step") if line.get("loss") is not None]
    return by_step or [line["train_loss"] for line in run.of_kind("epoch") if line.get("train_loss") is not None]


def _loss(run: WatchedRun) -> float | None:
    losses = _losses(run)
    return losses[-1] if losses else None


def _accuracy(run: WatchedRun) -> float | None:
    by_step = run.newest("step", "accuracy")
    return run.newest("epoch", "train_accuracy") if by_step is None else by_step


def _epoch(run: WatchedRun) -> str:
    return f"{run.epoch}/{run.num_epochs}" if run.num_epochs else str(run.epoch)


def _ending(run: WatchedRun) -> str:
    if run.state is State.RUNNING:
        left = run.seconds_left
        return "" if left is None else f"{duration(left)} left"
    return f"{run.state}{_test(run)}"


def _test(run: WatchedRun) -> str:
    accuracy = run.newest("result", "test_accuracy")
    return "" if accuracy is None else f", test {_percent(accuracy)}"


def _describe_epoch(run: WatchedRun, line: dict[str, float]) -> str:
    parts = [f"epoch {line['epoch']}" + (f"/{run.num_epochs}" if run.num_epochs else "")]
    parts += [f"loss {line['train_loss']:.4f}, accuracy {_percent(line['train_accuracy'])}"]
    if line.get("val_loss") is not None:
        parts += [f"validation loss {line['val_loss']:.4f}, accuracy {_percent(line['val_accuracy'])}"]
    return "; ".join(parts)


def _describe_step(run: WatchedRun) -> str:
    of = f" of {run.num_steps:,}" if run.num_steps else ""
    parts = [f"step {run.step:,}{of}", f"loss {_number(_loss(run), '{:.4f}')}, accuracy {_percent(_accuracy(run))}"]
    speed, left = run.images_per_second, run.seconds_left
    parts += [f"{speed:,.0f} images/s"] if speed is not None else []
    parts += [f"{duration(left)} left"] if left is not None else []
    return "; ".join(parts)


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
