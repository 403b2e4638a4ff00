"""The name by which a service knows a run, kept in the run's folder, so that a continued training continues it."""

from collections.abc import Callable
from pathlib import Path

from convoy.named_files import read_regular
from trainer.files import write_atomically


def remembered_id(folder: Path, service: str, new: Callable[[], str]) -> str:
    """Returns the name of a run at a service; makes and keeps a new one the first time.

    Raises:
        OSError: the file cannot be read or written.
    """
    path = folder / f"{service}-run-id"
    if path.exists():
        return read_regular(path).decode().strip()
    name = new()
    write_atomically(path, f"{name}\n".encode())
    return name
