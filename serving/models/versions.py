"""The versions of one model: which should be served, which are, and why the others are not.

A new version is loaded, warmed up and checked beside the serving one and then replaces it; the old one finishes its
requests and is freed. A version that fails to load never replaces one that works. The version policy `latest` counts
versions that load: a broken version 3 leaves version 2 in service, also after a restart.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from protos.model_config_pb2 import ModelConfig
from serving.errors import LoadError
from serving.models.config import check_supported, parse_json, read_config
from serving.models.loader import LoadSettings, Model, load_version
from serving.models.manifest import MANIFEST_FILE
from serving.models.scanner import FileStats, scan_model, scan_version
from serving.models.spec import VersionPolicy, version_policy

logger = logging.getLogger(__name__)

State = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]

_BEING_WRITTEN = "its files are still being written"
_NO_FOLDER = "the version policy lists it, but it has no folder"
_NOT_SELECTED = "the version policy selects other versions"


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One entry of the repository index.

    Args:
        version: empty if no version of the model is known.
        reason: why the version is not ready, or why its newer files were not loaded.
    """

    name: str
    version: str
    state: State
    reason: str


@dataclass(frozen=True, slots=True)
class _Fingerprint:
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
class _Slot:
    """The state of one version that is, was or should be served.

    Args:
        reason: why the version is not ready, or why its newer files were not loaded.
        attempted: the files of the last attempt to load it, successful or not.
        is_missing: the last scan found no folder.
    """

    state: State = "UNAVAILABLE"
    reason: str = ""
    model: Model | None = None
    attempted: _Fingerprint | None = None
    is_missing: bool = False


class ModelVersions:
    """The versions of one model. Not thread-safe.

    Args:
        publish: called after every change of `ready` or `entries`.
    """

    def __init__(self, folder: Path, settings: LoadSettings, publish: Callable[[], None]) -> None:
        self.name = folder.name
        self._folder = folder
        self._settings = settings
        self._publish = publish
        self._slots: dict[int, _Slot] = {}
        self._last_scan: dict[int, _Fingerprint] = {}
        self._state: State = "UNAVAILABLE"
        self._reason = "not loaded"
        self._warned: set[str] = set()

    def ready(self) -> dict[int, Model]:
        """Returns the versions that serve, by number."""
        return {version: slot.model for version, slot in self._slots.items() if slot.model is not None}

    def entries(self) -> list[IndexEntry]:
        """Returns the model's entries of the repository index, at least one."""
        if not self._slots:
            return [IndexEntry(self.name, "", self._state, self._reason)]
        slots = sorted(self._slots.items())
        return [IndexEntry(self.name, str(version), slot.state, slot.reason) for version, slot in slots]

    def mark_loading(self) -> None:
        """Shows the state LOADING until the first version is known."""
        self._state, self._reason = "LOADING", ""

    def retry_failed(self) -> None:
        """Makes the next update load failed versions again even if their files have not changed."""
        for slot in self._slots.values():
            slot.attempted = None if slot.reason else slot.attempted

    def update(self, *, stable: bool, override: str | None = None) -> list[str]:
        """Loads and unloads versions as the folder and the version policy demand.

        Args:
            stable: the files are complete. If False, they may still be being written: a version is loaded once two
                scans in a row find the same files, or at once if it is new and has a manifest, whose digests show
                whether it is complete. A missing version is unloaded after the second scan, because a folder that
                someone exchanges by hand is missing for a moment.
            override: a configuration as JSON, in place of `config.pbtxt`.

        Returns:
            One sentence for each version that should be served and was not loaded as it is in the folder.
        """
        found = self._scan(override, stable)
        config = self._read_config(override)
        policy = self._policy(config, found)
        candidates = policy.candidates(found)
        serving: list[int] = []
        failures = []
        for position, version in enumerate(candidates):
            if len(serving) == policy.num_versions:
                candidates = candidates[:position]
                break
            slot = self._slots.setdefault(version, _Slot())
            self._load_if_changed(version, slot, found.get(version), config, stable)
            serving += [version] if slot.model is not None else []
            failures += [f"version {version}: {slot.reason}"] if slot.reason else []
        self.unload(_NOT_SELECTED, keep=serving)
        self._remove_slots(candidates, found)
        self._last_scan = found
        if not candidates:
            self._state = "UNAVAILABLE"
            self._reason = str(config) if isinstance(config, LoadError) else "its folder contains no version"
            failures.append(self._reason)
            self._publish()
        return failures

    def unload(self, reason: str, keep: Collection[int] = ()) -> None:
        """Takes versions out of service. Blocks until their requests are finished."""
        unloading = {v: slot for v, slot in self._slots.items() if slot.model is not None and v not in keep}
        models = [slot.model for slot in unloading.values()]
        for slot in unloading.values():
            slot.state, slot.reason, slot.model, slot.attempted = "UNLOADING", "", None, None
        if not unloading:
            return
        self._publish()
        for model in models:
            assert model is not None
            model.batcher.close()
            logger.info("%s version %s unloaded: %s", self.name, model.version, reason)
        for slot in unloading.values():
            slot.state, slot.reason = "UNAVAILABLE", reason
        self._publish()

    def _scan(self, override: str | None, stable: bool) -> dict[int, _Fingerprint]:
        """Returns the versions in the folder, and serving versions that only this scan missed."""
        files = scan_model(self._folder)
        found = {} if files is None else {v: _Fingerprint(override, files.own, f) for v, f in files.versions.items()}
        for version, slot in self._slots.items():
            was_missing, slot.is_missing = slot.is_missing, version not in found
            if slot.is_missing and slot.model is not None and slot.attempted and not (stable or was_missing):
                found[version] = slot.attempted
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
        """Returns the configured policy; if the configuration is invalid, one that keeps the serving versions."""
        if isinstance(config, ModelConfig):
            return version_policy(config)
        serving = tuple(version for version in self.ready() if version in found)
        return VersionPolicy(num_versions=None, versions=serving or tuple(sorted(found)[-1:]))

    def _load_if_changed(
        self,
        version: int,
        slot: _Slot,
        found: _Fingerprint | None,
        config: ModelConfig | LoadError,
        stable: bool,
    ) -> None:
        """Loads a version unless these files were already attempted or may be incomplete."""
        if found is None:
            slot.reason = _NO_FOLDER
        elif slot.attempted == found:
            return
        elif stable or self._last_scan.get(version) == found or (found.has_manifest and slot.attempted is None):
            slot.attempted = found
            self._load(version, slot, found, config)
        elif slot.model is None:
            slot.reason = _BEING_WRITTEN

    def _load(self, version: int, slot: _Slot, found: _Fingerprint, config: ModelConfig | LoadError) -> None:
        old = slot.model
        if old is None:
            slot.state, slot.reason = "LOADING", ""
            self._publish()
        try:
            model = self._load_model(version, found, config)
        except LoadError as error:
            slot.state, slot.reason = "UNAVAILABLE" if old is None else "READY", str(error)
            self._publish()
            logger.warning("%s version %d not loaded: %s", self.name, version, error)
            return
        slot.state, slot.reason, slot.model = "READY", "", model
        self._publish()
        logger.info("%s version %d ready, loaded in %.2f s", self.name, version, model.load_s)
        if old is not None:
            old.batcher.close()

    def _load_model(self, version: int, found: _Fingerprint, config: ModelConfig | LoadError) -> Model:
        """Loads the version, and checks that its files have not changed meanwhile.

        Raises:
            LoadError: for any failure.
        """
        if isinstance(config, LoadError):
            raise config
        try:
            model = load_version(self._folder, version, config, self._settings)
        except LoadError:
            raise
        except Exception as error:  # from a backend, or a bug: other versions and models must not suffer
            logger.exception("%s version %d could not be loaded", self.name, version)
            raise LoadError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
        if scan_version(self._folder / str(version)) != found.version_files:
            model.batcher.close()
            raise LoadError("its files changed while it was being loaded")
        return model

    def _remove_slots(self, candidates: Collection[int], found: Collection[int]) -> None:
        """Keeps versions that the policy does not select in the index while their folders exist."""
        for version, slot in list(self._slots.items()):
            if version not in candidates and slot.model is None:
                if version in found:
                    slot.state, slot.reason, slot.attempted = "UNAVAILABLE", _NOT_SELECTED, None
                else:
                    del self._slots[version]
        self._publish()
