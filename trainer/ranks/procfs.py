"""Facts about processes from Linux's /proc (see proc(5)), and whether this process makes progress."""

import os
import time
from pathlib import Path

IDLE_SHARE = 0.02
"""A process that uses less than this share of one processor is idle; the watchdog's own threads use a tenth of that."""


class IdleClock:
    """Measures how long this process has used no processor while its main thread did not wait for a disk."""

    def __init__(self) -> None:
        self._used_s, self._sampled_at = time.process_time(), time.monotonic()
        self._busy_at = time.monotonic()

    @property
    def idle_s(self) -> float:
        return time.monotonic() - self._busy_at

    def reset(self) -> None:
        self._busy_at = time.monotonic()

    def sample(self) -> None:
        """Measures what happened since the last call; to be called every half second or so."""
        used_s, now = time.process_time(), time.monotonic()
        if used_s - self._used_s > IDLE_SHARE * (now - self._sampled_at) or _state_and_parent(os.getpid())[0] == "D":
            self._busy_at = now
        self._used_s, self._sampled_at = used_s, now


def has_ended(pid: int) -> bool:
    """Returns whether a process has ended; a zombie has."""
    return _state_and_parent(pid)[0] in "ZX"


def parent_pid(pid: int) -> int:
    """Returns the parent of a process; 0 if the process has ended."""
    return int(_state_and_parent(pid)[1])


def _state_and_parent(pid: int) -> tuple[str, str]:
    """Returns X (dead) as the state of a process that does not exist, and ? where /proc cannot be read."""
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return state, parent
    except (FileNotFoundError, ProcessLookupError):
        return "X", "0"
    except OSError:
        return "?", "0"
