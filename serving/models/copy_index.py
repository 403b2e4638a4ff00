"""The index of a local copy, and where files wait until they are whole.

The index says which files have been fetched from the address, and as which they were listed there.
"""

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_INDEX = ".fetched.json"

Tags = dict[str, str]
"""A tag of each file by its path in a model's folder."""


class CopyIndex:
    """The index of one copy, a file beside its models.

    Args:
        folder: of the copy.
        address: of which it is a copy.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self._folder = folder
        self._address = address

    def state(self) -> tuple[int, int]:
        """Returns what differs after a change of the index: its inode, and when it was written in ns."""
        try:
            status = (self._folder / _INDEX).stat()
        except OSError:
            return 0, 0
        return status.st_ino, status.st_mtime_ns

    def read(self) -> dict[str, Tags]:
        """Returns the files of each model that have been fetched, without those that have been changed since."""
        try:
            index, (_, written_ns) = json.loads((self._folder / _INDEX).read_bytes()), self.state()
            models = index["models"] if index["address"] == self._address else {}
            return {
                name: {
                    file: tag for file, tag in files.items() if _changed_ns(self._folder / name / file) <= written_ns
                }
                for name, files in models.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # all is fetched again

    def write(self, models: dict[str, Tags]) -> None:
        """Replaces the index.

        Raises:
            OSError: it cannot be written.
        """
        staged = self._folder / f"{_INDEX}.new"
        staged.write_text(json.dumps({"address": self._address, "models": models}))
        staged.replace(self._folder / _INDEX)


def of_version(fetched: Tags, version: int) -> Tags:
    """Returns the tags of one version's files, by path in its folder."""
    prefix = f"{version}/"
    return {file[len(prefix) :]: tag for file, tag in fetched.items() if file.startswith(prefix)}


def forget_version(fetched: Tags, version: int) -> None:
    """Removes the tags of one version's files."""
    for file in [file for file in fetched if file.startswith(f"{version}/")]:
        del fetched[file]


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yields a new hidden folder, which is removed afterwards unless it was renamed."""
    staged = folder / f".fetching-{secrets.token_hex(4)}"
    staged.mkdir()
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _changed_ns(file: Path) -> int:
    """Returns when a file's content was changed; 0 if there is none."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
