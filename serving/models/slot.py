"""The state of one version of a model, its entry in the repository index, and the view of a model for its readers."""

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from convoy.promotion import Promotion, served_before
from serving.errors import LoadError, TransientLoadError
from serving.models.loader import Model
from serving.models.manifest import MANIFEST_FILE
from serving.models.scanner import FileStats

State = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]

_MAX_PAUSE_S = 300.0
"""Between two attempts to load a version after a failure that may pass."""
_CALM_S = 2 * _MAX_PAUSE_S
"""After which a version that breaks again is not the one that has just been mended by loading it."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One entry of the repository index.

    Args:
        version: empty if no version of the model is known.
        cause: why the version is not ready, why its newer files were not loaded, or why they are not known.
        retry_at: when it is loaded again, on the clock of `time.monotonic`; None for not before its files change.
    """

    name: str
    version: str
    state: State
    cause: str = ""
    retry_at: float | None = None

    @property
    def reason(self) -> str:
        """The cause, and the time until the next attempt."""
        if self.retry_at is None:
            return self.cause
        return f"{self.cause}; retry in {max(0, math.ceil(self.retry_at - time.monotonic()))} s"


@dataclass(frozen=True, slots=True)
class Standing:
    """The operator's choice for a model, and what there is to choose from.

    Args:
        promotion: None if there is no choice.
        present: the versions in the folder, sorted.
        folder: of the model; None for a model without one.
        allowed: the only versions that the version policy lets serve; None for any.
        failed: versions whose files did not load.
        unreadable: why the folder's state is unknown, so that all of this is of an earlier one; empty if it is known.
    """

    promotion: Promotion | None = None
    present: tuple[int, ...] = ()
    folder: Path | None = None
    allowed: tuple[int, ...] | None = None
    failed: Collection[int] = ()
    unreadable: str = ""

    def before(self, serving: int | None) -> list[int]:
        """Returns the versions to roll back to, the best first.

        Args:
            serving: the version that requests get which name none; None for none.
        """
        before = served_before(self.promotion, serving, self.present)
        return [version for version in before if self.allowed is None or version in self.allowed]

    def target(self, serving: int | None) -> int | None:
        """Returns the version that a roll-back would go to as far as is known; None if there is none."""
        if self.unreadable:
            return None
        return next((version for version in self.before(serving) if version not in self.failed), None)


@dataclass(frozen=True, slots=True)
class ModelView:
    """The state of a model for its readers.

    Args:
        ready: the versions that serve, by number.
        entries: the model's entries of the repository index, at least one.
        preferred: the versions in the order in which requests that name none should get them; others come last.
    """

    ready: Mapping[int, Model] = field(default_factory=dict)
    entries: tuple[IndexEntry, ...] = ()
    preferred: tuple[int, ...] = ()
    standing: Standing = Standing()

    @property
    def default(self) -> int | None:
        """The version that requests get which name none; None if none is ready."""
        preferred = (version for version in self.preferred if version in self.ready)
        return next(preferred, max(self.ready, default=None))


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything that a version is loaded from; equal if loading again would change nothing.

    Args:
        override: the configuration that a client sent, as JSON.
        model_files: the files beside the versions.
        version_files: the version's own files.
    """

    override: str | None
    model_files: FileStats
    version_files: FileStats

    @property
    def has_manifest(self) -> bool:
        return any(file[0] == MANIFEST_FILE for file in self.version_files)


@dataclass(slots=True)
class Slot:
    """The state of one version that is, was or should be served.

    Args:
        reason: why the version is not ready, or why its newer files were not loaded.
        model: what serves; None for nothing.
        loaded: the files that `model` was loaded from.
        attempted: the files of the last attempt to load it, successful or not.
        is_missing: the last scan found no folder.
        unreadable: why the last scan could not read its folder; empty if it could.
        retry_at: when to load the same files again; None for never.
        pause_s: between the last failure and `retry_at`.
        is_broken: `retry_at` is for a version that is broken, not for files that did not load.
        broke_at: when it was last found to be, on the clock of `time.monotonic`.
    """

    state: State = "UNAVAILABLE"
    reason: str = ""
    model: Model | None = None
    loaded: Fingerprint | None = None
    attempted: Fingerprint | None = None
    is_missing: bool = False
    unreadable: str = ""
    retry_at: float | None = None
    pause_s: float = 0.0
    is_broken: bool = False
    broke_at: float = -_CALM_S

    def entry(self, name: str, version: int, unreadable: str = "") -> IndexEntry:
        """Returns the version's entry of the repository index.

        Args:
            unreadable: why the model's folder could not be read; empty if it could.
        """
        if cause := unreadable or self.unreadable:
            return IndexEntry(name, str(version), self.state, cause)
        return IndexEntry(name, str(version), self.state, self.reason, self.retry_at)

    def has_failed(self) -> bool:
        """Returns whether the files of the last attempt did not load, and nothing serves in their place."""
        return self.model is None and self.attempted is not None and bool(self.reason)

    def is_due(self) -> bool:
        """Returns whether the time has come to load the same files again."""
        return self.retry_at is not None and time.monotonic() >= self.retry_at

    def try_again(self) -> None:
        """Makes the next update load the version even if its files have not changed, unless it serves as it should."""
        is_unhealthy = self.model is not None and not self.model.batcher.is_healthy
        self.attempted = None if self.reason or is_unhealthy else self.attempted

    def begin(self, found: Fingerprint) -> None:
        """Notes an attempt to load the version. After a change of files, pauses begin anew."""
        if self.attempted != found:
            self.pause_s, self.is_broken = 0.0, False
        self.attempted, self.retry_at = found, None
        if self.model is None:
            self.state, self.reason = "LOADING", ""

    def fail(self, error: LoadError, first_pause_s: float | None) -> None:
        """Notes that the attempt failed. If that may pass, the next one is due after a pause that doubles each time.

        Args:
            first_pause_s: None for no further attempt before the files change.
        """
        self.state, self.reason = "UNAVAILABLE" if self.model is None else "READY", to_utf8(str(error))
        if first_pause_s is not None and isinstance(error, TransientLoadError):
            self._retry_later(first_pause_s)

    def plan_reload_if_broken(self, first_pause_s: float) -> None:
        """Plans to load a version again that is broken, and forgets that when it is not any more.

        Why newer files were not loaded is not forgotten: they still are not. One that breaks as soon as it is loaded
        again, whatever its clients do, is loaded with pauses that grow.
        """
        is_broken = self.model is not None and self.model.batcher.num_broken > 0 and not self.model.batcher.is_healthy
        if is_broken and self.retry_at is None:
            now = time.monotonic()
            if now - self.broke_at > _CALM_S:
                self.pause_s = 0.0
            self.is_broken, self.broke_at = True, now
            self._retry_later(first_pause_s)
        elif self.is_broken and not is_broken:
            self.is_broken, self.retry_at = False, None
            self.reason = "" if self.attempted == self.loaded else self.reason

    def _retry_later(self, first_pause_s: float) -> None:
        self.pause_s = min(2 * self.pause_s or first_pause_s, _MAX_PAUSE_S)
        self.retry_at = time.monotonic() + self.pause_s

    def succeed(self, model: Model) -> None:
        """Notes that the version serves."""
        self.pause_s = self.pause_s if self.is_broken else 0.0
        self.state, self.reason, self.model, self.is_broken = "READY", "", model, False
        self.loaded = self.attempted

    def unselect(self, reason: str, found: Fingerprint | None) -> None:
        """Notes that the version is not to serve. If these are the files that did not load, they still do not."""
        self.unreadable = ""
        if not self.has_failed() or self.attempted != found or self.retry_at is not None:
            self.remove("UNAVAILABLE", reason)

    def remove(self, state: State, reason: str) -> None:
        """Notes that the version does not serve. Its files are loaded anew when it should serve again."""
        self.state, self.reason, self.model, self.attempted, self.retry_at = state, reason, None, None, None


def to_utf8(reason: str) -> str:
    """Returns a reason that every protocol can send: names of files, and JSON, may hold what UTF-8 has not."""
    return reason.encode("utf-8", "replace").decode()
