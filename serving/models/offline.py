"""Shows and changes which versions of a model repository serve, without a server: in the folder alone.

A running server follows with its next poll, or when it is started again. It does not load a version that is damaged.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from convoy.promotion import (
    Promotion,
    PromotionError,
    pin,
    promote,
    read_promotion,
    roll_back,
    unpin,
    write_promotion,
)
from protos.models_pb2 import ModelState, VersionState
from serving.errors import InvalidArgument, LoadError, NotFound, Unavailable, quote
from serving.models.config import read_config
from serving.models.files import describe
from serving.models.manifest import read_manifest, verify_digests
from serving.models.scanner import FileStats, check_name, has_model, scan_model, scan_repository, scan_version
from serving.models.slot import Standing
from serving.models.spec import VersionPolicy, version_policy


@dataclass(frozen=True, slots=True)
class OfflineModel:
    """A model as its folder describes it.

    Args:
        present: its versions, sorted.
        damaged: why versions before `serving` cannot be loaded.
        serving: the best version that is not damaged, which a server would serve if it loads; None if there is none.
    """

    folder: Path
    policy: VersionPolicy
    promotion: Promotion | None
    present: tuple[int, ...]
    damaged: Mapping[int, str]
    serving: int | None

    @classmethod
    def read(cls, folder: Path) -> "OfflineModel":
        """Reads a model's folder.

        Raises:
            NotFound: there is no such model.
            Unavailable: the folder cannot be read.
            InvalidArgument: its configuration or its `serving.json` is invalid.
        """
        try:
            if not has_model(folder.parent, folder.name) or (files := scan_model(folder)) is None:
                raise NotFound(f"there is no model {quote(folder.name)} in {folder.parent}")
            policy, promotion = version_policy(read_config(folder)), read_promotion(folder)
        except OSError as error:
            raise Unavailable(f"{folder} cannot be read: {describe(error)}") from error
        except (LoadError, PromotionError) as error:
            raise InvalidArgument(f"model {quote(folder.name)}: {error}") from error
        damaged: dict[int, str] = {}
        serving = None
        for version in policy.candidates(files.versions, promotion):
            if version not in files.versions:
                continue
            if not (damage := _damage(folder / str(version))):
                serving = version
                break
            damaged[version] = damage
        return cls(folder, policy, promotion, tuple(sorted(files.versions)), damaged, serving)

    def state(self) -> ModelState:
        """Returns the model's state in the words of a server. Of what does not load, only damaged files are known."""
        undamaged = (version for version in self._before() if not _damage(self.folder / str(version)))
        state = ModelState(
            name=self.folder.name,
            serving=self.serving or 0,
            before=next(undamaged, 0),
            versions=[self._version_state(version) for version in self.present],
        )
        if self.promotion is not None:
            state.promoted, state.pinned = self.promotion.version, self.promotion.pinned
            state.choice, state.time = self.promotion.describe(), self.promotion.time
        return state

    def change(self, verb: str, version: int, write: Callable[[Path, Promotion], None] = write_promotion) -> None:
        """Promotes, pins, unpins or rolls back.

        Args:
            verb: promote, pin, unpin or rollback.
            version: of promote and pin.
            write: makes the choice durable, in the model's folder.

        Raises:
            NotFound: there is no such version.
            InvalidArgument: the change is not possible, or the version is damaged.
            Unavailable: the folder cannot be read or written.
        """
        try:
            write(self.folder, self._roll_back() if verb == "rollback" else self._choose(verb, version))
        except (PromotionError, LoadError) as error:
            raise InvalidArgument(f"model {quote(self.folder.name)}: {error}") from error
        except OSError as error:
            raise Unavailable(f"{self.folder} cannot be written: {describe(error)}") from error

    def _version_state(self, version: int) -> VersionState:
        reason = self.damaged.get(version, "")
        return VersionState(version=version, state="UNAVAILABLE" if reason else "", reason=reason)

    def _choose(self, verb: str, version: int) -> Promotion:
        if verb == "unpin":
            return unpin(self.promotion)
        choice = (promote if verb == "promote" else pin)(self.promotion, version, self.serving, self.present)
        self._check_allowed(version)
        if damage := _damage(self.folder / str(version)):
            raise LoadError(damage)
        return choice

    def _roll_back(self) -> Promotion:
        """Returns the choice of the first version to roll back to that is not damaged."""
        failures = []
        for version in self._before():
            if not (damage := _damage(self.folder / str(version))):
                return roll_back(self.promotion, version, self.serving, self.present)
            failures.append(f"version {version}: {damage}")
        raise PromotionError("; ".join(failures) or "there is no version to roll back to")

    def _before(self) -> list[int]:
        return Standing(self.promotion, self.present, self.folder, self.policy.versions).before(self.serving)

    def _check_allowed(self, version: int) -> None:
        if version not in self.present:
            known = ", ".join(map(str, self.present)) or "none"
            raise NotFound(f"model {quote(self.folder.name)} has no version {version}: it has {known}")
        if self.policy.versions is not None and version not in self.policy.versions:
            allowed = ", ".join(map(str, self.policy.versions))
            raise PromotionError(f"the version policy allows only {allowed}, not version {version}")


def _damage(folder: Path) -> str:
    """Returns why the files of a version cannot be loaded; empty if its manifest finds no fault."""
    try:
        return _compare(folder, scan_version(folder))
    except OSError as error:
        return f"its folder cannot be read: {describe(error)}"


@cache
def _compare(folder: Path, files: FileStats) -> str:
    """As `_damage`. Reads files once until they change: a change asks before and after, and a model may have a GB."""
    try:
        verify_digests(folder, read_manifest(folder))
    except LoadError as error:
        return str(error)
    return ""


def find_model(repository: Path, name: str) -> OfflineModel:
    """Returns one model of a repository.

    Raises:
        NotFound: there is no such model.
        Unavailable: its folder cannot be read.
        InvalidArgument: its name, its configuration or its `serving.json` is invalid.
    """
    check_name(name)
    return OfflineModel.read(repository / name)


def list_models(repository: Path) -> list[ModelState]:
    """Returns the states of all models of a repository, of invalid ones with the reason.

    Raises:
        NotFound: there is no such repository.
        Unavailable: the repository cannot be read.
    """
    try:
        names = scan_repository(repository).models
    except FileNotFoundError as error:
        raise NotFound(f"there is no model repository {repository}") from error
    except OSError as error:
        raise Unavailable(f"{repository} cannot be read: {describe(error)}") from error
    return [_state(repository / model) for model in names]


def _state(folder: Path) -> ModelState:
    """Returns a model's state. Every version of an invalid model is unavailable for the same reason."""
    try:
        return OfflineModel.read(folder).state()
    except (InvalidArgument, Unavailable) as error:
        cause = error.__cause__
        reason = f"its folder cannot be read: {describe(cause)}" if isinstance(cause, OSError) else str(cause)
        try:
            files = scan_model(folder)
        except OSError:
            files = None
        versions = sorted(files.versions) if files is not None else []
        states = [VersionState(version=version, state="UNAVAILABLE", reason=reason) for version in versions]
        return ModelState(name=folder.name, versions=states, reason=reason)
