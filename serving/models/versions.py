"""The versions of one model: which should be served, which are, and why the others are not.

A new version is loaded, warmed up and checked beside the serving one and then replaces it; the old one finishes its
requests and is freed. A version that fails to load never replaces one that works. The version policy `latest` counts
versions that load: a broken version 3 leaves version 2 in service, also after a restart.

What cannot be read is not taken for absent: the versions that serve keep serving, and the index says why.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from convoy.promotion import PROMOTION_FILE, Promotion, PromotionError, read_promotion
from protos.model_config_pb2 import ModelConfig
from serving.errors import LoadError, TransientLoadError
from serving.models.bounds import Bounds
from serving.models.changes import LoadTurn
from serving.models.closing import close_model
from serving.models.config import check_supported, parse_json, read_config
from serving.models.files import describe
from serving.models.loader import LoadSettings, Model, load_version
from serving.models.scanner import ModelFiles, scan_model, scan_version
from serving.models.slot import Fingerprint, IndexEntry, ModelView, Slot, Standing, State, to_utf8
from serving.models.spec import VersionPolicy, version_policy

logger = logging.getLogger(__name__)

_BEING_WRITTEN = "its files are still being written"
_GONE = "its folder is gone"
_NO_FOLDER = "it has no folder"
_NO_VERSION = "its folder contains no version"
_NOT_SELECTED = "the version policy selects other versions"
_BYTES_FACTOR = 3
"""Memory that a load may take, as a multiple of its files: what is read, the weights, and batches."""


class ModelVersions:
    """The versions of one model. Not thread-safe, except `view`.

    Args:
        publish: called after every change of `view`.
        turn: taken while a version is loaded.
        retry_s: the pause after a first failure that may pass; None for no further attempt.

    Attributes:
        like: versions to load before all others, and no more than these if they load; the best first.
        override: the configuration of the last update as JSON, in place of `config.pbtxt`.
    """

    def __init__(
        self,
        folder: Path,
        settings: LoadSettings,
        publish: Callable[[], None],
        *,
        turn: LoadTurn | None = None,
        retry_s: float | None = None,
    ) -> None:
        self.name = folder.name
        self.folder = folder
        self._settings = settings
        self._publish = publish
        self._bounds = Bounds(settings.max_queue_size)
        self._turn = turn or LoadTurn()
        self._retry_s = retry_s
        self._slots: dict[int, Slot] = {}
        self._last_scan: dict[int, Fingerprint] = {}
        self._device: int | None = None
        self._state: State = "UNAVAILABLE"
        self._reason = "not loaded"
        self._unreadable = ""
        self._warned: set[str] = set()
        self._preferred: tuple[int, ...] = ()
        self._standing = Standing(folder=folder)
        self.like: Collection[int] = ()
        self.override: str | None = None
        self.view = self._build_view()

    def ready(self) -> dict[int, Model]:
        """Returns the versions that serve, by number."""
        return {version: slot.model for version, slot in self._slots.items() if slot.model is not None}

    def entries(self) -> list[IndexEntry]:
        """Returns the model's entries of the repository index, at least one."""
        if not self._slots:
            return [IndexEntry(self.name, "", self._state, self._unreadable or self._reason)]
        return [slot.entry(self.name, version, self._unreadable) for version, slot in sorted(self._slots.items())]

    def mark_loading(self) -> None:
        """Shows the state LOADING until the first version is known. Publishes nothing."""
        self._state, self._reason = "LOADING", ""
        self.view = self._build_view()

    def retry_failed(self) -> None:
        """Makes the next update load failed versions again even if their files have not changed."""
        for slot in self._slots.values():
            slot.try_again()

    def check_override(self, override: str) -> None:
        """Checks a configuration that a client sends, before anything changes.

        Raises:
            InvalidArgument: it is invalid, or asks for too much.
        """
        self._bounds.check_json(override, self.folder)

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
        self.override = override
        try:
            files = self._scan()
            promotion = read_promotion(self.folder)
        except OSError as error:
            return self.keep(f"its folder cannot be read: {describe(error)}")
        except PromotionError as error:
            return self.keep(str(error))
        config = self._read_config(override)
        if isinstance(config, TransientLoadError):
            return self.keep(str(config))
        if stable and self.ready() and not (files and (files.versions or files.unreadable)):
            return self.keep(_NO_VERSION if files else _GONE)
        if self._unreadable:
            logger.info("%s: its folder can be read again", self.name)
            self._unreadable = ""
        files_or_none = files or ModelFiles((), {}, {}, 0)
        self._set_standing(self._standing_of(promotion, files_or_none, config))
        failures = self._apply(files_or_none, config, override, stable)
        if not self._slots:
            self._state = "UNAVAILABLE"
            self._reason = to_utf8(str(config)) if isinstance(config, LoadError) else _NO_VERSION if files else _GONE
            failures.append(self._reason)
        self._change()
        return failures

    def read_standing(self) -> Standing:
        """Returns the operator's choice and the versions as they are in the folder now.

        Raises OSError, PromotionError or LoadError if the folder, the choice or the configuration cannot be read.
        """
        files = self._scan() or ModelFiles((), {}, {}, 0)
        config = self._read_config(self.override)
        if isinstance(config, LoadError):
            raise config
        return self._standing_of(read_promotion(self.folder), files, config)

    def prepare(self, version: int) -> str:
        """Loads a version beside those that serve. Returns why what is in its folder does not load; empty if it serves.

        Raises OSError if the folder cannot be read.
        """
        files = self._scan()
        found = self._present(files, self.override, True) if files else {}
        if version not in found:
            return (files.unreadable.get(version) if files else None) or _NO_FOLDER
        slot = self._slots.setdefault(version, Slot())
        slot.try_again()
        self._load_if_changed(version, slot, found[version], self._read_config(self.override), True)
        return slot.reason

    def unload_prepared(self, ready: Collection[int]) -> None:
        """Takes out of service what `prepare` has loaded.

        Args:
            ready: the versions that served before `prepare`.
        """
        self._unload(dict.fromkeys(self.ready().keys() - set(ready), self._why_not_selected()))
        self._change()

    def keep(self, reason: str) -> list[str]:
        """Keeps what serves, because it is unknown what should serve. Returns the reason as a list."""
        reason = to_utf8(reason)
        if reason != self._unreadable:
            serving = ", ".join(map(str, sorted(self.ready())))
            logger.warning(
                "%s: %s; %s", self.name, reason, f"still serving version {serving}" if serving else "not loaded"
            )
        self._unreadable = reason
        if not self._slots:
            self._state = "UNAVAILABLE"
        for slot in self._slots.values():
            slot.is_missing = False
        self._change()
        return [reason]

    def unload(self, reason: str) -> None:
        """Takes all versions out of service. Blocks until their requests are finished."""
        self._unload(dict.fromkeys(self.ready(), reason))
        self.override = None
        if not self._slots:
            self._state, self._reason = "UNAVAILABLE", reason
        self._change()

    def _change(self) -> None:
        self.view = self._build_view()
        self._publish()

    def _build_view(self) -> ModelView:
        failed = tuple(version for version, slot in self._slots.items() if slot.has_failed())
        standing = replace(self._standing, failed=failed, unreadable=self._unreadable)
        return ModelView(self.ready(), tuple(self.entries()), self._preferred, standing)

    def _scan(self) -> ModelFiles | None:
        """Returns the files; None if the folder is gone.

        Raises:
            OSError: it cannot be read, or the file system that it was on is not mounted.
        """
        files = scan_model(self.folder)
        if files is None:
            return None
        if files.versions:
            self._device = files.device
        elif self._device not in (None, files.device):
            raise OSError("its file system is not mounted")
        return files

    def _apply(
        self, files: ModelFiles, config: ModelConfig | LoadError, override: str | None, stable: bool
    ) -> list[str]:
        """Loads and unloads versions. Returns one sentence for each version that was not loaded."""
        found = self._present(files, override, stable)
        present = found.keys() | files.unreadable.keys()
        policy = self._policy(config, present)
        candidates = policy.candidates(present, self._standing.promotion)
        promoted = self._standing.promotion and self._standing.promotion.version
        candidates = [version for version in self.like if version in present] + [
            version for version in candidates if version not in self.like
        ]
        self._preferred = tuple(candidates) if promoted or self.like else ()
        num_versions = len(self.like) or policy.num_versions
        serving: list[int] = []
        failures = []
        for position, version in enumerate(candidates):
            if len(serving) == num_versions:
                candidates = candidates[:position]
                break
            slot = self._slots.setdefault(version, Slot())
            self._note_unreadable(version, slot, files.unreadable.get(version))
            if not slot.unreadable:
                self._load_if_changed(version, slot, found.get(version), config, stable)
            is_gone = not stable and version not in present
            serving += [version] if slot.model is not None and not is_gone else []
            failures += [f"version {version}: {reason}"] if (reason := slot.unreadable or slot.reason) else []
            if version == promoted and version not in serving and (kept := self.ready().keys() & present):
                serving += kept - set(serving)  # what serves, rather than an older version
                break
        if override is not None and not serving and self.ready():  # a client's configuration that serves nothing
            self._remove_slots(self.ready(), present, found)
            return failures or [_NO_VERSION]
        if not serving and failures:  # a version that fails never replaces one that works
            serving += self.ready().keys() & {*present, *candidates}
        not_selected = self.ready().keys() - set(serving)
        why = self._why_not_selected()
        self._unload({version: why if version in present else _GONE for version in not_selected})
        self._remove_slots(candidates, present, found)
        self._last_scan = found
        return failures

    def _present(self, files: ModelFiles, override: str | None, stable: bool) -> dict[int, Fingerprint]:
        """Returns the versions in the folder, and serving versions that only this scan missed."""
        found = {version: Fingerprint(override, files.own, own) for version, own in files.versions.items()}
        for version, slot in self._slots.items():
            was_missing, slot.is_missing = slot.is_missing, version not in found and version not in files.unreadable
            if slot.is_missing and slot.model is not None and slot.attempted and not (stable or was_missing):
                found[version] = slot.attempted
        return found

    def _standing_of(self, promotion: Promotion | None, files: ModelFiles, config: ModelConfig | LoadError) -> Standing:
        allowed = version_policy(config).versions if isinstance(config, ModelConfig) else None
        return Standing(promotion, tuple(sorted(files.versions)), self.folder, allowed)

    def _set_standing(self, standing: Standing) -> None:
        """Notes the operator's choice, and logs it when it changes."""
        before, self._standing = self._standing, standing
        if (promotion := standing.promotion) != before.promotion:
            words = promotion.describe() if promotion else "the version policy alone decides"
            logger.info("%s: %s (%s)", self.name, words, PROMOTION_FILE)

    def _why_selected(self, version: int) -> str:
        promotion = self._standing.promotion
        is_chosen = promotion is not None and promotion.version == version
        return promotion.describe() if promotion is not None and is_chosen else "the version policy lists it"

    def _why_not_selected(self) -> str:
        promotion = self._standing.promotion
        decides = promotion is not None and self._preferred[:1] == (promotion.version,)
        return promotion.describe() if promotion is not None and decides else _NOT_SELECTED

    def _note_unreadable(self, version: int, slot: Slot, reason: str | None) -> None:
        """Shows why a version's folder cannot be read, and logs it when that changes."""
        unreadable = f"its folder cannot be read: {reason}" if reason else ""
        if unreadable != slot.unreadable:
            logger.warning("%s version %d: %s", self.name, version, unreadable or "its folder can be read again")
        slot.unreadable = unreadable

    def _read_config(self, override: str | None) -> ModelConfig | LoadError:
        try:
            config = read_config(self.folder) if override is None else parse_json(override, self.name)
            for warning in check_supported(config) + ([] if override else self._bounds.warnings(config)):
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
        slot: Slot,
        found: Fingerprint | None,
        config: ModelConfig | LoadError,
        stable: bool,
    ) -> None:
        """Loads a version unless these files were already attempted or may be incomplete."""
        if self._retry_s is not None:
            slot.plan_reload_if_broken(self._retry_s)
        if found is None:
            slot.reason = f"{self._why_selected(version)}, but it has no folder"
        elif slot.attempted == found and not slot.is_due():
            return
        elif (
            stable
            or slot.attempted == found
            or self._last_scan.get(version) == found
            or (found.has_manifest and slot.attempted is None)
        ):
            self._load(version, slot, found, config)
        elif slot.model is None:
            slot.reason, slot.retry_at = _BEING_WRITTEN, None

    def _load(self, version: int, slot: Slot, found: Fingerprint, config: ModelConfig | LoadError) -> None:
        old = slot.model
        slot.begin(found)
        self._change()
        try:
            model = self._load_model(version, found, config)
        except LoadError as error:
            slot.fail(error, self._retry_s)
            self._change()
            reason = slot.entry(self.name, version).reason
            logger.warning("%s version %d not loaded: %s", self.name, version, reason)
            return
        model.batcher.on_health_change = self._publish
        slot.succeed(model)
        self._change()
        logger.info("%s version %d ready, loaded in %.2f s", self.name, version, model.load_s)
        if old is not None:
            close_model(old)

    def _load_model(self, version: int, found: Fingerprint, config: ModelConfig | LoadError) -> Model:
        """Loads the version, and checks that its files have not changed meanwhile.

        Raises:
            LoadError: for any failure.
        """
        if isinstance(config, LoadError):
            raise config
        try:
            num_bytes = _BYTES_FACTOR * sum(size for _, size, _, _ in found.version_files if size > 0)
            with self._turn.take(f"{self.name} version {version}", num_bytes):
                model = load_version(self.folder, version, config, self._settings)
        except LoadError:
            raise
        except Exception as error:  # from a backend, or a bug: other versions and models must not suffer
            logger.exception("%s version %d could not be loaded", self.name, version)
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise TransientLoadError(reason) from error
        try:
            has_changed = scan_version(self.folder / str(version)) != found.version_files
        except OSError as error:
            close_model(model)
            raise TransientLoadError(f"its folder cannot be read: {describe(error)}") from error
        if has_changed:
            close_model(model)
            raise LoadError("its files changed while it was being loaded")
        return model

    def _unload(self, reasons: Mapping[int, str]) -> None:
        """Takes versions out of service, each for its reason."""
        models = []
        for version in reasons:
            slot = self._slots[version]
            models.append(slot.model)
            slot.remove("UNLOADING", "")
        if not models:
            return
        self._change()
        for model in models:
            assert model is not None
            close_model(model)
            logger.info("%s version %s unloaded: %s", self.name, model.version, reasons[int(model.version)])
        for version, reason in reasons.items():
            self._slots[version].remove("UNAVAILABLE", reason)

    def _remove_slots(
        self, candidates: Collection[int], present: Collection[int], found: Mapping[int, Fingerprint]
    ) -> None:
        """Keeps versions that the policy does not select in the index while their folders exist."""
        for version, slot in list(self._slots.items()):
            if version not in candidates and slot.model is None:
                if version in present:
                    slot.unselect(self._why_not_selected(), found.get(version))
                else:
                    del self._slots[version]
