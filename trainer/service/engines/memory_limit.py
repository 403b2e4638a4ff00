"""Limits the memory of a job's processes by a control group, of either version, where this user may create one."""

import os
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_TRIAL = "convoy-trial"


def create(name: str, memory_mb: int) -> str | None:
    """Creates a control group below this process's own.

    Args:
        memory_mb: its limit, in MB of 10^6 bytes; 0 for none.

    Returns:
        Its folder, in whose `cgroup.procs` a process enters itself; None if there is no limit, or it is not allowed.
    """
    if not memory_mb:
        return None
    for parent, limit in _parents():
        folder = parent / name
        try:
            folder.mkdir(exist_ok=True)
            (folder / limit).write_text(str(memory_mb * 10**6))
            return str(folder)
        except OSError:
            with suppress(OSError):
                folder.rmdir()
    return None


def is_allowed() -> bool:
    """Returns whether this user may create a control group with a limit of memory."""
    folder = create(f"{_TRIAL}-{os.getpid()}", memory_mb=100)
    if folder is None:
        return False
    with suppress(OSError):
        os.rmdir(folder)
    return True


def _parents() -> list[tuple[Path, str]]:
    """Returns the folders of this process's own groups, and the name of the file with the limit in a group there."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            found.append((ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"))
        elif not controllers:
            found.append((ROOT / path.lstrip("/"), "memory.max"))
    return found
