"""A local copy of a remote model repository: fetches what has changed, and what a server could need of it.

A version appears by one rename, after the digests of its manifest are verified, or not at all. What cannot be listed or
fetched changes nothing: an error is no answer, and neither is an address that holds nothing any more. Only what is gone
from the address is deleted. Several processes may share the copy.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from convoy.promotion import PROMOTION_FILE, Promotion, PromotionError, read_promotion, to_bytes
from convoy.promotion import write_promotion as write_locally
from serving.errors import LoadError
from serving.models.config import read_config
from serving.models.files import describe
from serving.models.manifest import MANIFEST_FILE, read_manifest, verify_digests
from serving.models.remote import RemoteModel, RemoteRepository, is_address
from serving.models.scanner import WARMUP_FOLDER, version_number
from serving.models.slot import Standing
from serving.models.spec import version_policy

logger = logging.getLogger(__name__)

_INDEX = ".fetched.json"
_LOCK = ".lock"

Tags = dict[str, str]
"""A tag of each file by its path in a model's folder."""


class Mirror:
    """A remote repository, and the folder that is its copy. Thread-safe.

    Args:
        folder: of the copy; created.
    """

    def __init__(self, remote: RemoteRepository, folder: Path) -> None:
        self.folder = folder
        self.address = remote.address
        self._remote = remote
        self._lock = threading.RLock()
        self._seen: dict[tuple[str, int], Tags] = {}
        """The files of versions without a manifest that the last listing found, which may still be being uploaded."""
        self._said: dict[tuple[str, int], tuple[Tags, str]] = {}
        """Why a version was not fetched, and the files that this holds for."""
        self._is_first = True

    def sync(self, name: str = "", version: int = 0, serving: Callable[[str], int | None] = lambda name: None) -> None:
        """Brings the copy to the state of the address.

        Args:
            name: of a model of which one more version is needed.
            version: that version; 0 for none.
            serving: returns the version of a model from which it may be rolled back, which may be older than others
                that do not load; None for the best one.

        Raises:
            OSError: the address or the copy cannot be read or written. What is in the copy stays.
        """
        with self._exclusively():
            fetched = self._read_index()
            models = self._remote.list()
            folders = [path for path in self.folder.iterdir() if path.is_dir()]
            if not models and folders:
                raise OSError(f"{self.address} holds no models any more")
            for each, model in models.items():
                extra = version if each == name else 0
                try:
                    self._sync_model(each, model, fetched.setdefault(each, {}), extra, serving(each))
                    self._said.pop((each, 0), None)
                except OSError as error:
                    self._say(each, 0, {}, describe(error))
                self._write_index(fetched)
            for folder in [folder for folder in folders if folder.name not in models]:
                self._remove(folder)
                fetched.pop(folder.name, None)
                logger.info("%s: gone from %s", folder.name, self.address)
            self._write_index(fetched)
            self._is_first = False

    def refusal(self, name: str, version: int) -> str:
        """Returns why a version is not in the copy; empty if it is, or is not at the address either."""
        if (self.folder / name / str(version)).is_dir() or (name, version) not in self._said:
            return ""
        return f"version {version} is not fetched from {self.address}: {self._said[name, version][1]}"

    def write_promotion(self, folder: Path, promotion: Promotion) -> None:
        """Makes the operator's choice durable, at the address first.

        Raises:
            OSError: it cannot be written.
        """
        with self._exclusively():
            self._remote.write(f"{folder.name}/{PROMOTION_FILE}", to_bytes(promotion))
            write_locally(folder, promotion)

    def _sync_model(self, name: str, model: RemoteModel, fetched: Tags, extra: int, serving: int | None) -> None:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for file, tag in model.own.items():
            if fetched.get(file) != tag or not (folder / file).exists():
                (folder / file).parent.mkdir(exist_ok=True, parents=True)
                self._fetch_file(f"{name}/{file}", folder / file)
                fetched[file] = tag
        self._remove_files(folder, model, fetched)
        usable, tried = model.versions, set[int]()
        while wanted := [version for version in _wanted(folder, usable, extra, serving) if version not in tried]:
            tried.update(wanted)
            for version in wanted:
                files = model.versions[version]
                if _of_version(fetched, version) != files or not (folder / str(version)).is_dir():
                    self._fetch_version(name, version, files, fetched)
            # Others take the places of those that are damaged.
            usable = {version: files for version, files in usable.items() if not self._is_refused(name, version, files)}
        for version in {version_number(path.name) for path in folder.iterdir()} - {0} - model.versions.keys():
            self._remove(folder / str(version))
            _forget(fetched, version)

    def _remove_files(self, folder: Path, model: RemoteModel, fetched: Tags) -> None:
        """Removes files beside the versions that are gone from the address, and what a process left that was killed."""
        for left in folder.glob(".*"):  # no other process is here now
            self._remove(left)
        for file in [*folder.iterdir(), *(folder / WARMUP_FOLDER).rglob("*")]:
            path = str(file.relative_to(folder))
            if file.is_file() and path not in model.own:
                file.unlink()
                fetched.pop(path, None)

    def _fetch_version(self, name: str, version: int, files: Tags, fetched: Tags) -> None:
        """Fetches a version, unless it may still be being uploaded."""
        if MANIFEST_FILE not in files and not self._is_first and self._seen.get((name, version)) != files:
            self._seen[name, version] = files
            return
        if self._is_refused(name, version, files):
            return
        folder, before, began = self.folder / name, _of_version(fetched, version), time.monotonic()
        with _staging(folder) as staged:
            num_fetched = 0
            for file, tag in files.items():
                (staged / file).parent.mkdir(parents=True, exist_ok=True)
                if before.get(file) == tag and (folder / str(version) / file).is_file():
                    os.link(folder / str(version) / file, staged / file)
                else:
                    self._remote.fetch(f"{name}/{version}/{file}", staged / file)
                    num_fetched += 1
            try:
                verify_digests(staged, read_manifest(staged))
            except LoadError as error:
                self._say(name, version, files, str(error))
                return
            self._remove(folder / str(version))
            staged.rename(folder / str(version))
        _forget(fetched, version)
        fetched |= {f"{version}/{file}": tag for file, tag in files.items()}
        self._said.pop((name, version), None)
        logger.info("%s version %d: %d files fetched in %.2f s", name, version, num_fetched, time.monotonic() - began)

    def _is_refused(self, name: str, version: int, files: Tags) -> bool:
        """Returns whether these files of a version have been found to be damaged."""
        return self._said.get((name, version), ({}, ""))[0] == files

    def _say(self, name: str, version: int, files: Tags, reason: str) -> None:
        """Logs why something was not fetched, once for each reason."""
        if self._said.get((name, version)) != (files, reason):
            what = f"{name} version {version}" if version else name
            logger.warning("%s is not fetched from %s: %s", what, self.address, reason)
        self._said[name, version] = (files, reason)

    def _fetch_file(self, path: str, file: Path) -> None:
        staged = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        try:
            self._remote.fetch(path, staged)
            staged.replace(file)
        finally:
            staged.unlink(missing_ok=True)

    def _remove(self, path: Path) -> None:
        """Removes a file or folder, which is gone as soon as this begins."""
        if path.is_file():
            path.unlink()
        elif path.exists():
            hidden = path.with_name(f".removed-{secrets.token_hex(4)}")
            path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Context in which no other thread or process changes the copy."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock, (self.folder / _LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read_index(self) -> dict[str, Tags]:
        try:
            index = json.loads((self.folder / _INDEX).read_bytes())
            return {name: dict(files) for name, files in index["models"].items()} if self._is_ours(index) else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # all is fetched again

    def _is_ours(self, index: dict[str, object]) -> bool:
        return index["address"] == self.address

    def _write_index(self, models: dict[str, Tags]) -> None:
        staged = self.folder / f"{_INDEX}.new"
        staged.write_text(json.dumps({"address": self.address, "models": models}))
        staged.replace(self.folder / _INDEX)


def open_location(location: str | Path, cache: Path | None) -> tuple[Path, Mirror | None]:
    """Returns the folder of a model repository; for one at an address, that of its copy, and what keeps the copy.

    Args:
        cache: folder of all copies; None for the user's.

    Raises:
        StartupError: nothing that is installed opens the address.
    """
    if not is_address(location):
        return Path(location), None
    remote = RemoteRepository(str(location))
    digest = hashlib.sha256(remote.address.encode()).hexdigest()[:8]
    name = f"{re.sub('[^A-Za-z0-9.-]+', '-', remote.address)[-80:].strip('-.')}-{digest}"
    folder = (cache or _user_cache() / "repositories") / name
    return folder, Mirror(remote, folder)


def _user_cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")) / "convoy"


def _wanted(folder: Path, versions: Collection[int], extra: int, serving: int | None) -> list[int]:
    """Returns the versions to fetch: those that the policy selects, one to fall back to, and one to roll back to.

    Args:
        serving: from which to roll back; None for the best one.
    """
    try:
        policy, promotion = version_policy(read_config(folder)), read_promotion(folder)
    except (LoadError, PromotionError):  # the server says so, and keeps what it has
        return [extra] if extra in versions else []
    candidates = [version for version in policy.candidates(versions, promotion) if version in versions]
    wanted = candidates if policy.num_versions is None else candidates[: policy.num_versions + 1]
    standing = Standing(promotion, tuple(sorted(versions)), folder, policy.versions)
    before = standing.before(serving or next(iter(candidates), None))[:1]
    return [version for version in dict.fromkeys([*wanted, *before, extra]) if version in versions]


def _of_version(fetched: Tags, version: int) -> Tags:
    prefix = f"{version}/"
    return {file[len(prefix) :]: tag for file, tag in fetched.items() if file.startswith(prefix)}


def _forget(fetched: Tags, version: int) -> None:
    for file in [file for file in fetched if file.startswith(f"{version}/")]:
        del fetched[file]


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Yields a new hidden folder, which is removed afterwards unless it was renamed."""
    staged = folder / f".fetching-{secrets.token_hex(4)}"
    staged.mkdir()
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
