"""The files of a model repository at an address that fsspec opens, such as `s3://bucket/models`: listed and fetched.

Knows nothing of the local copy. Errors of all kinds of stores are OSErrors here.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from convoy.extras import how_to_install
from serving.errors import StartupError
from serving.models.files import is_file
from serving.models.scanner import WARMUP_FOLDER, is_plain_name, version_number

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TAGS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "generation", "blob_id", "checksum"),
    *("LastModified", "Last-Modified", "mtime", "created", "ino"),
)
"""What stores tell of a file that differs when its content does. All that are there count."""

PATIENCE_S = 60.0
"""For an answer."""
_BYTES_PER_S = 100_000
"""Of a file that arrives slowly, but fast enough to wait for it."""

_ABANDON_S = 600.0
"""Until another call may start beside one that goes on: a byte now and then keeps a connection open for days."""

T = TypeVar("T")

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
        self._lock = threading.Lock()
        self._left: Future[Any] | None = None
        """A call that has taken too long, and goes on."""
        self._left_at = 0.0
        find = getattr(type(self._files), "_find", type(self._files).find)
        self._finds_all = find.__module__ not in ("fsspec.spec", "fsspec.asyn")
        """Whether the store has a way of its own to list all files, which fails as a whole."""

    def list(self) -> dict[str, RemoteModel]:
        """Returns the models by name. Leaves out hidden and temporary files, and names that could be paths.

        Raises:
            OSError: the address, or a folder of it, cannot be read.
        """
        models: dict[str, RemoteModel] = {}
        for path, tag in self._tags("").items():
            parts = path.split("/")
            if len(parts) > 1 and all(map(is_plain_name, parts)):
                model = models.setdefault(parts[0], RemoteModel())
                number = version_number(parts[1])
                if number and len(parts) > 2:
                    model.versions.setdefault(number, {})["/".join(parts[2:])] = tag
                elif not number and (len(parts) == 2 or parts[1] == WARMUP_FOLDER):
                    model.own["/".join(parts[1:])] = tag
        return {name: model for name, model in models.items() if model.versions or "config.pbtxt" in model.own}

    def list_version(self, name: str, version: int) -> dict[str, str]:
        """Returns the tags of one version's files, as `list` does.

        Raises:
            OSError: they cannot be read.
        """
        tags = self._tags(f"/{name}/{version}")
        return {path: tag for path, tag in tags.items() if all(map(is_plain_name, path.split("/")))}

    def _tags(self, folder: str) -> dict[str, str]:
        """Returns the tag of each file in a folder, with its path there."""
        root = self._root + folder

        def find() -> dict[str, str]:
            self._files.invalidate_cache()
            found: Mapping[str, Mapping[str, Any]]
            found = self._files.find(root, detail=True) if self._finds_all else dict(self._walk(root))
            return {
                path[len(root) :].lstrip("/"): _tag(info) or _tag(self._files.info(path))
                for path, info in found.items()
            }

        return self._within(PATIENCE_S, find)

    def _walk(self, folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yields all files below a folder. What cannot be listed is an error, which fsspec's own `walk` passes over."""
        for info in self._files.ls(folder, detail=True):
            path = str(info["name"]).rstrip("/")
            if info["type"] != "directory":
                yield path, info
            elif path != folder and is_plain_name(path.rpartition("/")[2]):
                yield from self._walk(path)

    def fetch(self, path: str, file: Path, tag: str) -> None:
        """Writes a remote file to a local one.

        Args:
            path: in the repository.
            tag: of the file.

        Raises:
            OSError: it cannot be read, the local file cannot be written, or less arrived than the tag tells.
        """
        limit_s = PATIENCE_S + _size(tag) / _BYTES_PER_S
        self._within(limit_s, lambda: self._files.get_file(f"{self._root}/{path}", str(file)))
        if not is_whole(file, tag):
            raise OSError(f"only the first {file.stat().st_size} bytes of {path} arrived")

    def write(self, path: str, content: bytes) -> None:
        """Writes a remote file, which appears whole or not at all, as object stores do.

        Raises:
            OSError: it cannot be written.
        """

        def put() -> None:
            self._files.pipe_file(f"{self._root}/{path}", content)
            self._files.invalidate_cache()

        self._within(PATIENCE_S, put)

    def _within(self, limit_s: float, call: Callable[[], T]) -> T:
        """Calls the store on a thread, which is left behind if it takes too long. No other starts then for a while.

        Libraries try again for minutes, while a server could start from its copy.

        Raises:
            OSError: any error of the store, or no answer.
        """
        with self._lock, _as_os_errors():
            is_recent = time.monotonic() < self._left_at + _ABANDON_S
            if self._left is not None and not self._left.done() and is_recent:
                raise TimeoutError("it does not answer")
            future: Future[T] = Future()

            def work() -> None:
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)

            threading.Thread(target=work, name="remote", daemon=True).start()
            if not wait([future], limit_s).done:
                self._left, self._left_at = future, time.monotonic()
                raise TimeoutError("it does not answer")
            return future.result()


def is_whole(file: Path, tag: str) -> bool:
    """Returns whether a local file is there, and not shorter than a tag tells. A store may send more than it lists.

    Raises:
        OSError: that is unknown.
    """
    return is_file(file) and file.stat().st_size >= _size(tag)


def _size(tag: str) -> int:
    """Returns the size of a file, as far as its tag tells."""
    size = tag.partition("|")[0]
    return int(size) if size.isdecimal() else 0


def _tag(info: Mapping[str, Any]) -> str:
    """Returns the size of a file, and what else differs when its content does; empty if the store tells nothing."""
    tags = [str(info[key]) for key in _TAGS if info.get(key) is not None]
    size = info.get("size")
    return "|".join(["" if size is None else str(size), *tags]) if tags or size is not None else ""


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
