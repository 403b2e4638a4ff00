"""The versions of one model: which should be served, which are, and why the others are not.

A version is loaded and proven beside the one that serves, then takes its place, then the old one finishes what it was
given and goes. What fails to load never takes the place of what works. Of `latest` versions the newest good ones count:
a broken version 3 leaves version 2 in service, also after a restart.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from protos.model_config_pb2 import ModelConfig
from serving.errors import LoadError
from serving.models.config import VersionPolicy, check_supported, parse_json, read_config, version_policy
from serving.models.loader import LoadSettings, Model, load_version
from serving.models.manifest import MANIFEST_FILE
from serving.models.scanner import Signature, scan_model, scan_version

logger = logging.getLogger(__name__)

State = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]

_BEING_WRITTEN = "its files are still being written"
_NO_FOLDER = "the version policy asks for it, and there is no such folder"
_NOT_WANTED = "the version policy keeps others"


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """How a version stands. The version is empty where none of the model is known."""

    name: str
    version: str
    state: State
    reason: str


@dataclass(frozen=True, slots=True)
class _Fingerprint:
    """What a version is loaded from: a caller's configuration, the model's own files, the version's files."""

    override: str | None
    model_files: Signature
    version_files: Signature

    @property
    def has_manifest(self) -> bool:
        return any(file[0] == MANIFEST_FILE for file in self.version_files)


@dataclass(slots=True)
class _Slot:
    """A version that is, was or should be served.

    Args:
        reason: why it is not ready; or, beside a model that serves, why its newer files were refused.
        tried: what the last attempt to load it was made from, successful or not.
        is_missing: the last scan found no folder.
    """

    state: State = "UNAVAILABLE"
    reason: str = ""
    model: Model | None = None
    tried: _Fingerprint | None = None
    is_missing: bool = False


class ModelVersions:
    """One model of a repository. Used by one thread at a time.

    Args:
        publish: called after every change of `ready` or `entries`.
    """

    def __init__(self, folder: Path, settings: LoadSettings, publish: Callable[[], None]) -> None:
        self.name = folder.name
        self._folder = folder
        self._settings = settings
        self._publish = publish
        self._slots: dict[int, _Slot] = {}
        self._seen: dict[int, _Fingerprint] = {}
        self._state: State = "UNAVAILABLE"
        self._reason = "not loaded"
        self._warned: set[str] = set()

    def ready(self) -> dict[int, Model]:
        """The versions that serve."""
        return {version: slot.model for version, slot in self._slots.items() if slot.model is not None}

    def entries(self) -> list[IndexEntry]:
        """At least one."""
        if not self._slots:
            return [IndexEntry(self.name, "", self._state, self._reason)]
        slots = sorted(self._slots.items())
        return [IndexEntry(self.name, str(version), slot.state, slot.reason) for version, slot in slots]

    def announce(self) -> None:
        """Say that loading is about to begin."""
        self._state, self._reason = "LOADING", ""

    def try_again(self) -> None:
        """Have the next update try what has failed, changed or not."""
        for slot in self._slots.values():
            slot.tried = None if slot.reason else slot.tried

    def update(self, *, settled: bool, override: str | None = None) -> list[str]:
        """Bring what is served up to date with the folder.

        Args:
            settled: take the files as they are. Else, because they may still be being written: only what two scans in
                a row found the same, unless it is new and has a manifest; and what is gone only at the second scan,
                because folders that are exchanged by hand are gone for a moment.
            override: a configuration as JSON in place of the file's.

        Returns:
            what is wrong with what should be served.
        """
        found = self._scan(override, settled)
        config = self._read_config(override)
        policy = self._policy(config, found)
        candidates = policy.candidates(found)
        good: list[int] = []
        failures = []
        for at, version in enumerate(candidates):
            if len(good) == policy.num_versions:
                candidates = candidates[:at]
                break
            slot = self._slots.setdefault(version, _Slot())
            self._consider(version, slot, found.get(version), config, settled)
            good += [version] if slot.model is not None else []
            failures += [f"version {version}: {slot.reason}"] if slot.reason else []
        self.drop(_NOT_WANTED, keep=good)
        self._forget(candidates, found)
        self._seen = found
        if not candidates:
            self._state = "UNAVAILABLE"
            self._reason = str(config) if isinstance(config, LoadError) else "there is no version in its folder"
            failures.append(self._reason)
            self._publish()
        return failures

    def drop(self, reason: str, keep: Collection[int] = ()) -> None:
        """Take versions out of service; returns when they have finished what they were given."""
        leaving = {v: slot for v, slot in self._slots.items() if slot.model is not None and v not in keep}
        models = [slot.model for slot in leaving.values()]
        for slot in leaving.values():
            slot.state, slot.reason, slot.model, slot.tried = "UNLOADING", "", None, None
        if not leaving:
            return
        self._publish()
        for model in models:
            assert model is not None
            model.batcher.close()
            logger.info("%s version %s is unloaded: %s", self.name, model.version, reason)
        for slot in leaving.values():
            slot.state, slot.reason = "UNAVAILABLE", reason
        self._publish()

    def _scan(self, override: str | None, settled: bool) -> dict[int, _Fingerprint]:
        """The versions in the folder, and those that serve and may be back in a moment."""
        files = scan_model(self._folder)
        versions = {} if files is None else files.versions
        found = {
            version: _Fingerprint(override, files.signature if files else (), signature)
            for version, signature in versions.items()
        }
        for version, slot in self._slots.items():
            was_missing, slot.is_missing = slot.is_missing, version not in found
            if slot.is_missing and slot.model is not None and slot.tried and not (settled or was_missing):
                found[version] = slot.tried
        return found

    def _read_config(self, override: str | None) -> ModelConfig | LoadError:
        try:
            config = read_config(self._folder) if override is None else parse_json(override, self.name)
            for warning in check_supported(config):
                if warning not in self._warned:
                    self._warned.add(warning)
                    logger.warning("%s: %s", self.name, warning)
            return config
        except LoadError as error:
            return error

    def _policy(self, config: ModelConfig | LoadError, found: Collection[int]) -> VersionPolicy:
        """Without a configuration that can be read, what serves is kept."""
        if isinstance(config, ModelConfig):
            return version_policy(config)
        serving = tuple(version for version in self.ready() if version in found)
        return VersionPolicy(num_versions=None, versions=serving or tuple(sorted(found)[-1:]))

    def _consider(
        self,
        version: int,
        slot: _Slot,
        found: _Fingerprint | None,
        config: ModelConfig | LoadError,
        settled: bool,
    ) -> None:
        """Load a version if that has not been tried with these files, and they are whole as far as one can see."""
        if found is None:
            slot.reason = _NO_FOLDER
        elif slot.tried == found:
            return
        elif settled or self._seen.get(version) == found or (found.has_manifest and slot.tried is None):
            slot.tried = found
            self._load(version, slot, found, config)
        elif slot.model is None:
            slot.reason = _BEING_WRITTEN

    def _load(self, version: int, slot: _Slot, found: _Fingerprint, config: ModelConfig | LoadError) -> None:
        old = slot.model
        if old is None:
            slot.state, slot.reason = "LOADING", ""
            self._publish()
        try:
            model = self._loaded(version, found, config)
        except LoadError as error:
            slot.state, slot.reason = "UNAVAILABLE" if old is None else "READY", str(error)
            self._publish()
            logger.warning("%s version %d is refused: %s", self.name, version, error)
            return
        slot.state, slot.reason, slot.model = "READY", "", model
        self._publish()
        logger.info("%s version %d is ready, loaded in %.2f s", self.name, version, model.load_s)
        if old is not None:
            old.batcher.close()

    def _loaded(self, version: int, found: _Fingerprint, config: ModelConfig | LoadError) -> Model:
        """The new model.

        Raises:
            LoadError: whatever went wrong.
        """
        if isinstance(config, LoadError):
            raise config
        try:
            model = load_version(self._folder, version, config, self._settings)
        except LoadError:
            raise
        except Exception as error:  # a backend's, or a defect: either way this version's failure and nobody else's
            logger.exception("%s version %d could not be loaded", self.name, version)
            raise LoadError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
        if scan_version(self._folder / str(version)) != found.version_files:
            model.batcher.close()
            raise LoadError("its files changed while they were read")
        return model

    def _forget(self, candidates: Collection[int], found: Collection[int]) -> None:
        """Of versions that are not to be served, keep those that there are, and say why."""
        for version, slot in list(self._slots.items()):
            if version not in candidates and slot.model is None:
                if version in found:
                    slot.state, slot.reason, slot.tried = "UNAVAILABLE", _NOT_WANTED, None
                else:
                    del self._slots[version]
        self._publish()
