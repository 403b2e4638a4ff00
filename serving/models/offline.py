"""Shows and changes which versions of a model repository serve, without a server: in the folder alone.

A running server follows with its next poll, or when it is started again. It does not load a version that is damaged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from convoy.promotion import (
    Promotion,
    PromotionError,
    pin,
    promote,
    read_promotion,
    roll_back,
    served_before,
    unpin,
    write_promotion,
)
from protos.models_pb2 import ModelState, VersionState
from serving.errors import InvalidArgument, LoadError, NotFound, Unavailable, quote
from serving.models.config import read_config
from serving.models.files import describe
from serving.models.manifest import read_manifest, verify_digests
from serving.models.scanner import check_name, has_model, scan_model, scan_repository
from serving.models.spec import VersionPolicy, version_policy


@dataclass(frozen=True, slots=True)
class OfflineModel:
    """A model as its folder describes it.

    Args:
        present: its versions, sorted.
        serving: the version that a server would serve if it loads; None if there is none.
    """

    folder: Path
    policy: VersionPolicy
    promotion: Promotion | None
    present: tuple[int, ...]
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
        candidates = [version for version in policy.candidates(files.versions, promotion) if version in files.versions]
        return cls(folder, policy, promotion, tuple(sorted(files.versions)), candidates[0] if candidates else None)

    def state(self) -> ModelState:
        """Returns the model's state in the words of a server. Which versions load is not known."""
        before = served_before(self.promotion, self.serving, self.present)
        state = ModelState(
            name=self.folder.name,
            serving=self.serving or 0,
            before=before[0] if before else 0,
            versions=[VersionState(version=version) for version in self.present],
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
            choice = self._choose(verb, version)
            if verb != "unpin":
                self._check(choice.version)
            write(self.folder, choice)
        except (PromotionError, LoadError) as error:
            raise InvalidArgument(f"model {quote(self.folder.name)}: {error}") from error
        except OSError as error:
            raise Unavailable(f"{self.folder} cannot be written: {describe(error)}") from error

    def _choose(self, verb: str, version: int) -> Promotion:
        match verb:
            case "promote":
                return promote(self.promotion, version, self.serving, self.present)
            case "pin":
                return pin(self.promotion, version, self.serving, self.present)
            case "unpin":
                return unpin(self.promotion)
        for before in served_before(self.promotion, self.serving, self.present):
            return roll_back(self.promotion, before, self.serving, self.present)
        raise PromotionError("there is no version to roll back to")

    def _check(self, version: int) -> None:
        if version not in self.present:
            known = ", ".join(map(str, self.present)) or "none"
            raise NotFound(f"model {quote(self.folder.name)} has no version {version}: it has {known}")
        if self.policy.versions is not None and version not in self.policy.versions:
            allowed = ", ".join(map(str, self.policy.versions))
            raise PromotionError(f"the version policy allows only {allowed}, not version {version}")
        folder = self.folder / str(version)
        verify_digests(folder, read_manifest(folder))


def find_models(repository: Path, name: str = "") -> list[OfflineModel]:
    """Returns one model of a repository; all, if `name` is empty.

    Raises:
        NotFound: there is no such model or repository.
        Unavailable: the repository cannot be read.
    """
    if name:
        check_name(name)
        return [OfflineModel.read(repository / name)]
    try:
        names = scan_repository(repository).models
    except FileNotFoundError as error:
        raise NotFound(f"there is no model repository {repository}") from error
    except OSError as error:
        raise Unavailable(f"{repository} cannot be read: {describe(error)}") from error
    return [OfflineModel.read(repository / model) for model in names]
