"""Values of files: changes, replacements by symbolic links, files that are gone, and files that cannot be used."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from convoy import credentials
from convoy.credentials import KEEP_S, CredentialError, CredentialFiles

REVOKED = "revoked"


class Clock:
    """In place of `time.monotonic`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def next_look(self) -> None:
        self.now += credentials.CHECK_INTERVAL_S


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(credentials, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("one")
    return path


def parse(contents: list[bytes]) -> str:
    if contents[0].startswith(b"bad"):
        raise ValueError(f"no secret in {contents[0].decode()}")
    return contents[0].decode()


def revocable(path: Path) -> CredentialFiles[str]:
    return CredentialFiles([path], parse, revoke=lambda _: REVOKED)


def look(files: CredentialFiles[str], clock: Clock) -> str:
    clock.next_look()
    return files.get()


def test_a_change_is_noticed_at_the_next_look(path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    files = revocable(path)
    path.write_text("two")
    clock.now += credentials.CHECK_INTERVAL_S / 2
    assert files.get() == "one"
    assert look(files, clock) == "two"
    assert caplog.messages == [f"reloaded {path}"]
    assert look(files, clock) == "two"
    assert len(caplog.messages) == 1


def test_a_change_that_keeps_size_and_time_is_noticed(path: Path, clock: Clock) -> None:
    files = revocable(path)
    before = path.stat()
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert look(files, clock) == "two"


def test_a_swapped_symbolic_link_is_noticed(tmp_path: Path, clock: Clock) -> None:
    """As Kubernetes replaces the files of a Secret."""
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "secret").write_text(version)
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "secret").symlink_to("..data/secret")
    files = revocable(tmp_path / "secret")
    (tmp_path / "..data_tmp").symlink_to("two")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    (tmp_path / "one" / "secret").unlink()
    assert look(files, clock) == "two"


def test_a_swap_during_the_look_is_no_deletion(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = revocable(path)
    answers: list[Callable[[], bytes]] = [lambda: _raise(FileNotFoundError()), lambda: b"two"]
    monkeypatch.setattr(Path, "read_bytes", lambda _: answers.pop(0)())
    assert look(files, clock) == "two"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    "end", [Path.unlink, lambda path: path.rename(path.with_name("x")), lambda path: _to_dangling(path)]
)
def test_a_file_that_is_gone_ends_the_value_at_once(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, end: Callable[[Path], object]
) -> None:
    files = revocable(path)
    end(path)
    assert [look(files, clock), look(files, clock)] == [REVOKED, REVOKED]
    assert caplog.messages == [f"cannot read {path}: No such file or directory; what it held is no longer accepted"]
    path.unlink(missing_ok=True)
    path.write_text("one")
    assert look(files, clock) == "one"


def test_a_folder_that_became_a_file_ends_the_value(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "secret").write_text("one")
    files = revocable(tmp_path / "folder" / "secret")
    (tmp_path / "folder" / "secret").unlink()
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").write_text("")
    assert look(files, clock) == REVOKED


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied"), OSError(5, "Input/output error"), OSError(116, "Stale file handle")],
)
def test_an_unreadable_file_keeps_the_value_for_a_bounded_time(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: OSError
) -> None:
    error.filename = str(path)
    files = revocable(path)
    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", lambda _: _raise(error))
        assert [look(files, clock), look(files, clock)] == ["one", "one"]
        clock.now += KEEP_S
        assert [look(files, clock), look(files, clock)] == [REVOKED, REVOKED]
    assert caplog.messages == [
        f"cannot read {path}: {error.strerror}; the previous content stays in use for 300 s at most",
        f"cannot read {path}: {error.strerror}; what it held is no longer accepted",
    ]
    assert look(files, clock) == "one"


def test_an_invalid_file_keeps_the_value_for_a_bounded_time(path: Path, clock: Clock) -> None:
    files = revocable(path)
    path.write_text("bad")
    assert look(files, clock) == "one"
    clock.now += KEEP_S
    assert look(files, clock) == REVOKED


def test_a_value_that_has_ended_does_not_come_back_from_an_unreadable_file(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = revocable(path)
    path.unlink()
    assert look(files, clock) == REVOKED
    monkeypatch.setattr(Path, "read_bytes", lambda _: _raise(PermissionError(13, "Permission denied")))
    assert look(files, clock) == REVOKED


def test_a_value_without_revocation_outlives_its_file(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    files = CredentialFiles([path], parse)
    path.unlink()
    assert look(files, clock) == "one"
    clock.now += 10 * KEEP_S
    assert look(files, clock) == "one"
    assert caplog.messages == [
        f"cannot read {path}: No such file or directory; the previous content stays in use",
    ]


def test_a_pipe_is_read_once(tmp_path: Path, clock: Clock) -> None:
    """As in `--token-file <(command)`."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("one",))
    writer.start()
    files = revocable(tmp_path / "pipe")
    writer.join()
    clock.now += 10 * KEEP_S
    assert files.get() == "one"


@pytest.mark.parametrize("content", [None, "bad"])
def test_unusable_files_are_an_error_at_the_start(path: Path, content: str | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(CredentialError, match=r"cannot read .*/secret: No such file|no secret in bad"):
        revocable(path)


def test_a_slow_look_does_not_delay_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = revocable(path)
    reading, go_on = threading.Event(), threading.Event()

    def read(_: Path) -> bytes:
        reading.set()
        go_on.wait(30)
        return b"two"

    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(credentials, "CHECK_INTERVAL_S", 0.0)
    files._next_check = 0.0
    looking = threading.Thread(target=files.get)
    looking.start()
    assert reading.wait(30)
    began = time.monotonic()
    assert files.get() == "one"
    assert time.monotonic() - began < 5
    go_on.set()
    looking.join()
    assert files.get() == "two"


def _raise(error: OSError) -> bytes:
    raise error


def _to_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")
