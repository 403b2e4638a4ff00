"""Files are written completely or not at all; locks have one holder."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT, files_of_at_most
from trainer.files import (
    append_line,
    create_folder,
    is_temporary,
    locked,
    read_lines,
    sha256_of_file,
    temporary_name,
    write_atomically,
    write_json,
)


def test_a_file_is_replaced_completely(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"b": "ü"})
    assert json.loads(path.read_text()) == {"b": "ü"}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_lock_has_one_holder_and_another_process_gets_one_message_and_waits(tmp_path: Path) -> None:
    path, printed = tmp_path / "lock", list[str]()
    with locked(path, printed.append, "waiting") as has_locks:
        assert has_locks
        assert printed == []
        second = locked(path, printed.append, "waiting", log_after_s=0.1, timeout_s=0.1)
        with pytest.raises(TimeoutError, match="lock is locked"), second:
            pass
    assert printed == ["waiting"]
    with locked(path, printed.append, "waiting"):
        assert printed == ["waiting"]


def test_the_kernel_releases_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    holds = "import os, sys, trainer.files as f\nwith f.locked(f.Path('lock'), print, ''):\n    os.kill(os.getpid(), 9)"
    command = [sys.executable, "-c", holds]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -9
    with locked(tmp_path / "lock", pytest.fail, "waiting"):
        pass


def test_a_file_system_without_locks_excludes_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock", pytest.fail, "waiting") as has_locks:
        assert not has_locks


def test_the_file_of_a_killed_writer_is_temporary(tmp_path: Path) -> None:
    killed = (
        "import os, trainer.files as f; os.fsync = lambda fd: os.kill(os.getpid(), 9); f.write_json(f.Path('a'), 1)"
    )
    command = [sys.executable, "-c", killed]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    (left,) = tmp_path.iterdir()
    assert is_temporary(left)
    assert not is_temporary(tmp_path / "a")


@pytest.mark.parametrize("name", [b"n" * 255, b"\xe9" * 255, "é".encode() * 127, b"caf\xe9"])
def test_names_may_be_as_long_as_the_file_system_allows_and_need_not_be_utf_8(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    write_json(path, {"name": path.name})
    assert os.listdir(os.fsencode(tmp_path)) == [name]
    assert json.loads(path.read_text()) == {"name": path.name}
    temporary = temporary_name(path.name)
    assert len(os.fsencode(temporary)) <= 255
    assert is_temporary(tmp_path / temporary)


def test_a_line_that_does_not_fit_leaves_the_lines_before_it(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert read_lines(path) == []
    append_line(path, "ä")
    with files_of_at_most(10), pytest.raises(OSError, match="File too large"):
        append_line(path, "too much for the disk")
    assert path.read_text() == "ä\n"
    append_line(path, "b")
    assert read_lines(path) == ["ä", "b"]


def test_an_incomplete_last_line_is_ignored_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes("a\nä".encode()[:-1])
    assert read_lines(path) == ["a"]
    append_line(path, "b")
    assert path.read_text() == "a\nb\n"


def test_a_complete_last_line_needs_no_newline(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"b": 2}')
    assert read_lines(path) == ['{"a": 1}', '{"b": 2}']
    append_line(path, '{"c": 3}')
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n{"c": 3}\n'


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_name_that_another_process_has_gets_a_number(tmp_path: Path) -> None:
    """Several processes at the same moment get a folder each."""
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: create_folder(tmp_path / "runs", "mnist-s0"), range(8)))
    assert {folder.name for folder in folders} == {"mnist-s0", *(f"mnist-s0-{number}" for number in range(2, 9))}
    assert all(folder.is_dir() for folder in folders)


def test_a_file_of_that_name_counts_and_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert create_folder(tmp_path, "a").name == "a-2"
    with pytest.raises(OSError, match="Not a directory"):
        create_folder(tmp_path / "a" / "runs", "b")
