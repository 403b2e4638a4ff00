"""A local copy of a remote model repository: fetches what has changed, and what a server could need of it.

A version appears by one rename, after the digests of its manifest are verified, or not at all. What cannot be listed or
fetched changes nothing: an error is no answer, and neither is an address that holds nothing any more. Only what is gone
from the address, or has not been needed for a day, is deleted. Several processes may share the copy.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from convoy.promotion import PROMOTION_FILE, Promotion, PromotionError, read_promotion, to_bytes
from convoy.promotion import write_promotion as write_locally
from serving.errors import LoadError, TransientLoadError
from serving.models.config import read_config
from serving.models.copy_index import CopyIndex, Tags, forget_version, of_version, staging
from serving.models.files import describe
from serving.models.manifest import MANIFEST_FILE, read_manifest, verify_digests
from serving.models.remote import RemoteModel, RemoteRepository, is_address, is_whole
from serving.models.scanner import WARMUP_FOLDER, FileStats, scan_version, version_number
from serving.models.slot import Standing
from serving.models.spec import version_policy

logger = logging.getLogger(__name__)

_LOCK = ".lock"

Known = Callable[[str], tuple[int | None, Collection[int]]]
"""Returns the version of a model that serves, and those that do not load."""

OWN = 0
"""In place of a version: the files beside the versions."""

_FIRST_PAUSE_S = 60.0
_MAX_PAUSE_S = 6 * 3600.0
"""Before files are fetched again that arrived damaged: on the way, or because they are so at the address."""

_SETTLE_S = 2.0
"""In which no file of a version without a manifest changes that a new server takes: it may still be being uploaded."""

_KEEP_S = 24 * 3600.0
"""For how long a version stays in the copy that no process has needed."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Of the copy's disk, whichever library writes to it."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why files that are at the address are not in the copy.

    Args:
        files: that this holds for.
        pause_s: before they are fetched again; 0 for the next time.
        retry_at: on the clock of `time.monotonic`.
    """

    files: Tags
    reason: str
    pause_s: float = 0.0
    retry_at: float = 0.0


class Mirror:
    """A remote repository, and the folder that is its copy. Thread-safe.

    Args:
        folder: of the copy; created.
    """

    def __init__(self, remote: RemoteRepository, folder: Path) -> None:
        self.folder = folder
        self.address = remote.address
        self._remote = remote
        self._index = CopyIndex(folder, remote.address)
        self._lock = threading.RLock()
        self._seen: dict[tuple[str, int], Tags] = {}
        """The files of versions without a manifest that the last listing found, which may still be being uploaded."""
        self._refusals: dict[str, dict[int, _Refusal]] = {}
        """By model and version, of what the last listing found."""
        self._checked: dict[tuple[str, int], FileStats] = {}
        """The files of versions that do not load, whose digests are right all the same."""
        self._listed_at = 0.0
        self._is_first = True

    def sync(self, name: str = "", version: int = 0, known: Known = lambda name: (None, ())) -> None:
        """Brings the copy to the state of the address. What cannot be fetched is in `missing` afterwards.

        Args:
            name: of a model of which one more version is needed.
            version: that version; 0 for none.
            known: returns the version of a model that serves, None for none, and those that do not load.

        Raises:
            OSError: the address or the copy cannot be read or written. What is in the copy stays.
        """
        state = self._index.state()
        models = self._remote.list()  # before the lock: an address that does not answer holds up no other process
        with self._exclusively():
            if self._index.state() != state:
                models = self._remote.list()  # another one has seen what may be newer
            self._listed_at = time.monotonic()
            fetched = self._index.read()
            folders = [path for path in self.folder.iterdir() if path.is_dir()]
            if not models and folders:
                raise OSError(f"{self.address} holds no models any more")
            self._forget_all_but(models)
            for each, model in models.items():
                extra = version if each == name else 0
                before = dict(fetched.setdefault(each, {}))
                try:
                    self._sync_model(each, model, fetched[each], extra, *known(each))
                    self._refusals[each].pop(OWN, None)
                except OSError as error:
                    self._refuse(each, OWN, {}, self._describe(error))
                if fetched[each] != before:
                    self._index.write(fetched)
            for folder in [folder for folder in folders if folder.name not in models]:
                self._remove(folder)
                fetched.pop(folder.name, None)
                self._index.write(fetched)
                logger.info("%s: gone from %s", folder.name, self.address)
            self._is_first = False

    def describe(self, error: OSError) -> str:
        """Returns why the copy was not brought to the state of the address."""
        return f"{'' if self._is_local(error) else 'the remote repository cannot be read: '}{self._describe(error)}"

    def _describe(self, error: OSError | LoadError) -> str:
        reason = describe(error) if isinstance(error, OSError) else str(error)
        return f"the copy {self.folder} cannot be written: {reason}" if self._is_local(error) else reason

    def _is_local(self, error: Exception) -> bool:
        """Returns whether the copy, not the address, is the reason of an error."""
        is_inside = Path(os.fsdecode(getattr(error, "filename", None) or "/")).is_relative_to(self.folder)
        return is_inside or getattr(error, "errno", None) in _DISK_ERRORS

    def missing(self) -> dict[str, dict[int, str]]:
        """Returns why versions, or files beside them, are not in the copy as they were at the address, by model."""
        with self._lock:
            return {
                name: {
                    version: f"{f'version {version}' if version else 'its configuration'} is not fetched from "
                    f"{self.address}: {refusal.reason}"
                    for version, refusal in sorted(refusals.items())
                }
                for name, refusals in self._refusals.items()
                if refusals
            }

    def write_promotion(self, folder: Path, promotion: Promotion) -> None:
        """Makes the operator's choice durable, at the address first.

        Raises:
            OSError: it cannot be written.
        """
        with self._exclusively(), staging(folder) as staged:
            write_locally(staged, promotion)  # a full disk is found before the address has the choice
            self._remote.write(f"{folder.name}/{PROMOTION_FILE}", to_bytes(promotion))
            (staged / PROMOTION_FILE).replace(folder / PROMOTION_FILE)
            with contextlib.suppress(OSError):  # the choice is made
                self._index.write(self._index.read())  # `sync` lists again if its listing is older than the choice

    def _forget_all_but(self, models: Mapping[str, RemoteModel]) -> None:
        """Forgets what is known of files that have changed or are gone."""
        now = {(name, number): files for name, model in models.items() for number, files in model.versions.items()}
        self._seen = {key: files for key, files in self._seen.items() if now.get(key) == files}
        self._refusals = {
            name: {
                version: refusal
                for version, refusal in self._refusals.get(name, {}).items()
                if version == OWN or now.get((name, version)) == refusal.files
            }
            for name in models
        }

    def _sync_model(
        self,
        name: str,
        model: RemoteModel,
        fetched: Tags,
        extra: int,
        serving: int | None,
        failed: Collection[int],
    ) -> None:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".*"):  # of a process that was killed: no other one is here now
            self._remove(left)
        self._fetch_own(name, model.own, fetched)
        usable, tried = dict(model.versions), set[int]()
        while wanted := [version for version in _wanted(folder, usable, extra, serving) if version not in tried]:
            tried.update(wanted)
            for version in wanted:
                if version in failed and of_version(fetched, version) and self._is_damaged(name, version):
                    forget_version(fetched, version)
                is_there = self._has_version(name, version, model.versions[version], fetched, version == extra)
                if not is_there or version in failed:
                    del usable[version]  # others take its place
        for version in self._refusals[name].keys() - tried - {OWN}:
            del self._refusals[name][version]
        unknown = {version for version, refusal in self._refusals[name].items() if not refusal.pause_s}
        if any(version in unknown or (name, version) in self._seen for version in tried):
            return  # what is gone serves until it is known what may take its place
        has_all = not self._is_first and bool(tried - {extra})
        self._remove_versions(folder, model.versions, tried | {serving}, fetched, has_all=has_all)

    def _remove_versions(
        self, folder: Path, listed: Collection[int], needed: Collection[int | None], fetched: Tags, *, has_all: bool
    ) -> None:
        """Removes versions that are gone from the address, and those that no process has needed for long.

        Args:
            needed: by this process; others may share the copy, and need others.
            has_all: whether these are known to be all that this process needs.
        """
        for version in {version_number(path.name) for path in folder.iterdir()} - {0}:
            path = folder / str(version)
            if version in needed:
                os.utime(path)
            is_old = time.time() > path.stat().st_mtime + _KEEP_S
            if version not in listed or (has_all and is_old):
                self._remove(path)
                forget_version(fetched, version)

    def _fetch_own(self, name: str, files: Tags, fetched: Tags) -> None:
        """Fetches the files beside the versions, all or none, and removes those that are gone from the address."""
        folder = self.folder / name
        changed = [file for file, tag in files.items() if fetched.get(file) != tag or not is_whole(folder / file, tag)]
        with staging(folder) as staged:
            for file in changed:
                self._fetch_file(f"{name}/{file}", staged / file, files[file])
            for file in changed:
                (folder / file).parent.mkdir(exist_ok=True)
                (staged / file).replace(folder / file)
                fetched[file] = files[file]
        for left in [*folder.iterdir(), *(folder / WARMUP_FOLDER).rglob("*")]:
            path = str(left.relative_to(folder))
            if left.is_file() and path not in files:
                left.unlink()
                fetched.pop(path, None)

    def _has_version(self, name: str, version: int, files: Tags, fetched: Tags, is_asked_for: bool) -> bool:
        """Brings a version to the state of the address. Returns whether that can be loaded, as far as is known.

        Args:
            is_asked_for: it is fetched without a pause after the last failure.
        """
        folder = self.folder / name / str(version)
        if of_version(fetched, version) == files and all(is_whole(folder / file, tag) for file, tag in files.items()):
            self._forget_version(name, version)  # another process may have fetched it
            return True
        if MANIFEST_FILE not in files and not self._is_first and self._seen.get((name, version)) != files:
            self._seen[name, version] = files  # it may still be being uploaded
            return True
        refusal = self._refusals[name].get(version)
        if refusal is not None and time.monotonic() < refusal.retry_at and not is_asked_for:
            return False
        try:
            self._fetch_version(name, version, files, fetched, of_version(fetched, version) if refusal is None else {})
        except (OSError, TransientLoadError) as error:
            self._refuse(name, version, files, self._describe(error))
        except LoadError as error:
            pause_s = min(2 * refusal.pause_s or _FIRST_PAUSE_S, _MAX_PAUSE_S) if refusal else _FIRST_PAUSE_S
            self._refuse(name, version, files, str(error), pause_s)
        else:
            self._forget_version(name, version)
            return True
        return False

    def _is_damaged(self, name: str, version: int) -> bool:
        """Returns whether a version does not load because its files in the copy are others than those fetched."""
        folder = self.folder / name / str(version)
        try:
            files = scan_version(folder)
            if self._checked.get((name, version)) != files:
                verify_digests(folder, read_manifest(folder))
                self._checked[name, version] = files
        except (OSError, LoadError) as error:
            is_known = isinstance(error, LoadError) and not isinstance(error, TransientLoadError)
            if is_known:
                logger.warning("%s version %d in the copy is fetched again: %s", name, version, error)
            return is_known
        return False

    def _forget_version(self, name: str, version: int) -> None:
        self._refusals[name].pop(version, None)
        self._seen.pop((name, version), None)

    def _fetch_version(self, name: str, version: int, files: Tags, fetched: Tags, known: Tags) -> None:
        """Fetches a version, which appears by one rename.

        Args:
            known: files of the copy that need not be fetched again.

        Raises:
            OSError: a file cannot be read or written, or has changed meanwhile.
            LoadError: the digests of its manifest are others.
        """
        folder, began = self.folder / name / str(version), time.monotonic()
        with staging(folder.parent) as staged:
            num_fetched = 0
            for file, tag in files.items():
                if known.get(file) == tag and is_whole(folder / file, tag):
                    (staged / file).parent.mkdir(parents=True, exist_ok=True)
                    os.link(folder / file, staged / file)
                else:
                    self._fetch_file(f"{name}/{version}/{file}", staged / file, tag)
                    num_fetched += 1
            verify_digests(staged, read_manifest(staged))
            if MANIFEST_FILE not in files:
                if self._is_first:
                    time.sleep(max(0.0, self._listed_at + _SETTLE_S - time.monotonic()))
                if self._remote.list_version(name, version) != files:
                    raise OSError("its files changed while they were fetched")
            self._remove(folder)
            staged.rename(folder)
        forget_version(fetched, version)
        fetched |= {f"{version}/{file}": tag for file, tag in files.items()}
        logger.info("%s version %d: %d files fetched in %.2f s", name, version, num_fetched, time.monotonic() - began)

    def _fetch_file(self, path: str, file: Path, tag: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._remote.fetch(path, file, tag)

    def _refuse(self, name: str, version: int, files: Tags, reason: str, pause_s: float = 0.0) -> None:
        """Notes why something was not fetched, and logs it once for each reason."""
        before = self._refusals[name].get(version)
        if before is None or before.reason != reason:
            what = f"{name} version {version}" if version else name
            logger.warning("%s is not fetched from %s: %s", what, self.address, reason)
        self._refusals[name][version] = _Refusal(files, reason, pause_s, time.monotonic() + pause_s)

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
    users = os.environ.get("XDG_CACHE_HOME", "")
    caches = Path(users if os.path.isabs(users) else os.path.expanduser("~/.cache"))
    folder = (cache or caches / "convoy/repositories") / name
    return folder, Mirror(remote, folder)


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
