"""Whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, files_of_at_most
from trainer.files import (
    append_line,
    is_temporary,
    read_lines,
    sha256_of_file,
    sole_user,
    write_atomically,
    write_json,
)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
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


def test_a_folder_has_one_user_and_who_comes_second_waits_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.files.LEAVING_S", 0.1)
    said: list[str] = []
    with sole_user(tmp_path, said.append):
        assert said == []
        with pytest.raises(TimeoutError, match="is in use by another process"), sole_user(tmp_path, said.append):
            pass
    assert said == [f"{tmp_path} is in use by another process: waiting up to 0 s for it to leave"]
    with sole_user(tmp_path, said.append):
        assert len(said) == 1


def test_what_a_kill_leaves_is_known_as_temporary(tmp_path: Path) -> None:
    killed = (
        "import os, trainer.files as f; os.fsync = lambda fd: os.kill(os.getpid(), 9); f.write_json(f.Path('a'), 1)"
    )
    command = [sys.executable, "-c", killed]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    (left,) = tmp_path.iterdir()
    assert is_temporary(left)
    assert not is_temporary(tmp_path / "a")


def test_a_line_that_does_not_fit_leaves_those_before_it(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert read_lines(path) == []
    append_line(path, "ä")
    with files_of_at_most(10), pytest.raises(OSError, match="File too large"):
        append_line(path, "too much for the disk")
    assert path.read_text() == "ä\n"
    append_line(path, "b")
    assert read_lines(path) == ["ä", "b"]


def test_what_a_kill_left_of_a_line_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes("a\nä".encode()[:-1])
    assert read_lines(path) == ["a"]
    append_line(path, "b")
    assert path.read_text() == "a\nb\n"


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
