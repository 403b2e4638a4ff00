"""Locks, folders for unfinished files, and disks that are full or read-only."""

import errno
import os
import threading
from pathlib import Path

import pytest

from trainer.data.staging import explain_disk_errors, file_lock, remove_stale, staging
from trainer.errors import ConfigError, DataError


def test_a_process_that_waits_logs_one_line(tmp_path: Path, logged: list[str]) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with file_lock(tmp_path / "tiny.lock", logged.append):
            held.set()
            release.wait(30)

    def tell(line: str) -> None:
        logged.append(line)
        release.set()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    with file_lock(tmp_path / "tiny.lock", tell, log_after_s=0.1):
        pass
    thread.join()
    assert logged == ["waiting for another process that is preparing tiny"]


def test_a_staging_folder_is_removed_whatever_happens(tmp_path: Path) -> None:
    def interrupt() -> None:
        with staging(tmp_path) as folder:
            (folder / "part").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert list(tmp_path.iterdir()) == []


def test_only_unfinished_files_are_stale(tmp_path: Path) -> None:
    for name in ("tiny.pt", ".32-facts.json.7.tmp"):
        (tmp_path / name).write_text("x")
    with staging(tmp_path) as folder:
        remove_stale(tmp_path)
        assert not folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.pt"]


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EROFS, ConfigError, "cannot write in .*: Read-only file system; choose another --data-dir"),
        (errno.ENOSPC, DataError, "disk full: about 2.0 MB are needed in .*, .* MB are free"),
        (errno.EIO, OSError, "Input/output error"),
    ],
)
def test_errors_of_the_disk_are_one_line(tmp_path: Path, number: int, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message), explain_disk_errors(tmp_path / "new", 2_000_000):
        raise OSError(number, os.strerror(number))
