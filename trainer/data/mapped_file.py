"""Files of tensors, written atomically and mapped by every process.

They are in torch's own format, opened with `mmap=True` and `weights_only=True`: the processes of a host share their
pages, so that memory does not grow with the number of ranks.
"""

import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from convoy.named_files import check_regular
from trainer.data.staging import explain_disk_errors, staging
from trainer.errors import DataError
from trainer.files import flush_to_disk, save_tensors


class DamagedFileError(DataError):
    """A file is not what was written: it has to be made again."""


def write_tensors(value: Any, path: Path, size_bytes: int) -> None:
    """Writes a file atomically.

    Args:
        value: tensors, numbers and texts, in lists and dicts.
        path: the new file, in an existing folder.
        size_bytes: of the tensors, for the message where the disk is full.

    Raises:
        DataError: the disk is full.
        ConfigError: the folder cannot be written.
    """
    with explain_disk_errors(path.parent, size_bytes), staging(path.parent) as folder:
        temporary = folder / path.name
        with temporary.open("xb") as file:
            save_tensors(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_to_disk(path.parent)


def map_tensors(path: Path) -> Any:
    """Returns the value in a file that `write_tensors` wrote, with tensors that are mapped: do not write to them.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not a file of torch.
        DataError: it cannot be opened or mapped.
    """
    try:
        check_regular(path)
        file = path.open("rb")  # torch opens no path that is not UTF-8, and does not tell why it cannot open one
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, error.filename) from error
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}") from error
    with file:
        try:
            return torch.load(path if _is_utf8(path) else f"/dev/fd/{file.fileno()}", mmap=True, weights_only=True)
        except Exception as error:
            if "unable to mmap" in str(error):  # too little address space, or a file system that maps no files
                reason = " ".join(str(error).partition("\n")[0].split())
                raise DataError(f"{path} cannot be mapped into memory: {reason}") from error
            raise DamagedFileError(f"{path} is damaged (not a file of tensors)") from error


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def share_lock(path: Path, tensor: torch.Tensor) -> None:
    """Holds a shared lock on a file for as long as the tensor lives: `discard` leaves the file alone until then.

    Raises:
        FileNotFoundError: `discard` was faster.
    """
    descriptor = os.open(path, os.O_RDONLY)
    weakref.finalize(tensor, os.close, descriptor)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.stat(path)


def discard(path: Path) -> None:
    """Deletes a file, unless a process uses it or it belongs to another user.

    A training opens its test images at its end, so the file must stay until then.
    """
    with suppress(FileNotFoundError, PermissionError), path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a file system without locks
            pass
        path.unlink()
