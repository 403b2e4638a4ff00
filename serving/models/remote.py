"""The files of a model repository at an address that fsspec opens, such as `s3://bucket/models`: listed and fetched.

Knows nothing of the local copy. Errors of all kinds of stores are OSErrors here.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convoy.extras import how_to_install
from serving.errors import StartupError
from serving.models.scanner import WARMUP_FOLDER, is_plain_name, version_number

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TAGS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "checksum", "LastModified", "mtime", "created", "ino")
"""What stores tell of a file that differs when its content does. All that are there count."""


logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises, with its stack, and advice at each poll


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """The files of one model, as a listing found them.

    Args:
        own: a tag of each file beside the versions, by path in the model's folder. It differs when the content does.
        versions: the same for the files of each version, by path in its folder.
    """

    own: dict[str, str] = field(default_factory=dict)
    versions: dict[int, dict[str, str]] = field(default_factory=dict)


def is_address(location: object) -> bool:
    """Returns whether a model repository is at an address, rather than in a folder."""
    return _ADDRESS.match(str(location)) is not None


class RemoteRepository:
    """A model repository at an address.

    Raises:
        StartupError: nothing that is installed opens such an address.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            import fsspec

            with _as_os_errors():
                self._files, root = fsspec.core.url_to_fs(address)
        except ImportError as error:
            raise StartupError(f"{address} needs a library: {error}; {how_to_install('remote')}") from error
        except OSError as error:
            raise StartupError(f"{address} cannot be opened: {error}") from error
        self._root = str(root).rstrip("/")

    def list(self) -> dict[str, RemoteModel]:
        """Returns the models by name. Leaves out hidden and temporary files, and names that could be paths.

        Raises:
            OSError: the address cannot be read.
        """
        with _as_os_errors():
            self._files.invalidate_cache()
            found: Mapping[str, Mapping[str, Any]] = self._files.find(self._root, detail=True)
        models: dict[str, RemoteModel] = {}
        for path, info in found.items():
            parts = path[len(self._root) :].lstrip("/").split("/")
            if len(parts) > 1 and all(map(is_plain_name, parts)):
                model = models.setdefault(parts[0], RemoteModel())
                number = version_number(parts[1])
                if number and len(parts) > 2:
                    model.versions.setdefault(number, {})["/".join(parts[2:])] = _tag(info)
                elif not number and (len(parts) == 2 or parts[1] == WARMUP_FOLDER):
                    model.own["/".join(parts[1:])] = _tag(info)
        return {name: model for name, model in models.items() if model.versions or "config.pbtxt" in model.own}

    def fetch(self, path: str, file: Path) -> None:
        """Writes a remote file to a local one.

        Args:
            path: in the repository.

        Raises:
            OSError: it cannot be read, or the local file not be written.
        """
        with _as_os_errors():
            self._files.get_file(f"{self._root}/{path}", str(file))

    def write(self, path: str, content: bytes) -> None:
        """Writes a remote file, which appears whole or not at all, as object stores do.

        Raises:
            OSError: it cannot be written.
        """
        with _as_os_errors():
            self._files.pipe_file(f"{self._root}/{path}", content)
            self._files.invalidate_cache()


def _tag(info: Mapping[str, Any]) -> str:
    return "|".join(str(info[key]) for key in ("size", *_TAGS) if info.get(key) is not None)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turns the errors of a store's own library into OSErrors of one line."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise OSError(kind + str(error).strip().partition("\n")[0].rstrip(".")) from error
