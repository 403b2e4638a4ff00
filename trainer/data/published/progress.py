"""Progress of downloads: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.data.published.download import DownloadProgress

INTERVAL_S = 10.0


class LineProgress:
    """Logs a line every `INTERVAL_S`.

    Args:
        log: receives each line.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._name = ""
        self._started = self._logged = 0.0

    def __call__(self, name: str, num_bytes: int, total: int | None) -> None:
        now = time.monotonic()
        if name != self._name:
            self._name, self._started, self._logged = name, now, now
        if now - self._logged < INTERVAL_S:
            return
        self._logged = now
        size = f"{100 * num_bytes / total:.0f} % of {total / 1e6:.1f} MB" if total else f"{num_bytes / 1e6:.1f} MB"
        self._log(f"{name}: {size}, {num_bytes / 1e6 / (now - self._started):.2f} MB/s")


@contextmanager
def download_progress() -> Iterator[tuple[Callable[[str], None], DownloadProgress | None]]:
    """Yields a function that prints a line, and the progress bars to pass to a download.

    Without a terminal there are no bars: the second value is None.
    """
    if not sys.stdout.isatty():
        yield print, None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(name: str, num_bytes: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name)
            bars.update(tasks[name], completed=num_bytes, total=total)

        yield lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True), show
