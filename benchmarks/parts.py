"""Parts of a benchmark on a rented machine: one that fails, or for which there is no time, ends no other."""

import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Parts:
    """The time that is left, and what has no result.

    SIGTERM, which `timeout` sends, ends the part that is being measured; what was measured before is written.

    Args:
        seconds: after them, nothing new begins.
    """

    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds
        self.left_out: dict[str, str] = {}
        """What has no result, and why."""
        signal.signal(signal.SIGTERM, lambda *_: self._stop())

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.until

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context of a part, whose failure is told and ends nothing else."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self.left_out[name] = (str(error).strip() or type(error).__name__)[-1000:]
            print(f"{name} failed: {self.left_out[name]}", file=sys.stderr, flush=True)

    def _stop(self) -> None:
        self.until = 0.0
        sys.exit("the time was over (SIGTERM)")


def results_folder(given: Path | None, device: str) -> Path:
    """Returns the folder for results: without one, the repository's, or a new one where a program is only tried."""
    if given is not None:
        return given.absolute()
    return Path(__file__).parent / "results" if device == "cuda" else Path(tempfile.mkdtemp(prefix="convoy-bench-"))
