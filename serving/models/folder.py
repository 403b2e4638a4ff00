"""The folder that holds all models: which are in it, or why that is unknown. It may be the copy of a remote one."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from convoy.promotion import Promotion, write_promotion
from serving.errors import StartupError
from serving.models.files import describe
from serving.models.mirror import OWN, Known, Mirror
from serving.models.scanner import RepositoryFolders, check_repository, has_model, scan_repository

logger = logging.getLogger(__name__)


class RepositoryFolder:
    """The folder of a repository. One thread at a time may scan it.

    Args:
        on_change: called when `unreadable` has changed.
        mirror: keeps the folder as a copy of a remote repository; None if it is none.
        known: as of `Mirror.sync`.

    Attributes:
        place: the folder, or the address of what it is a copy of.
        unreadable: why the last scan could not read the folder, or what it is a copy of; empty if it could.
        missing: why versions are not in a copy as they were at the address, by model; as `Mirror.missing` has it.
    """

    def __init__(
        self,
        path: Path,
        on_change: Callable[[], None],
        mirror: Mirror | None = None,
        known: Known = lambda name: (None, ()),
    ) -> None:
        self.path = path
        self.place = str(path) if mirror is None else mirror.address
        self.unreadable = ""
        self.missing: Mapping[str, Mapping[int, str]] = {}
        self._on_change = on_change
        self._mirror = mirror
        self._known = known
        self._device: int | None = None
        """The file system that models were on. A mount that is lost leaves an empty folder of another one."""

    def check(self) -> RepositoryFolders:
        """Checks that this can be a model repository, and returns its folders.

        A remote one that cannot be reached is served from its copy.

        Raises:
            StartupError: it does not exist, cannot be read, or is a single model.
        """
        problem = self.fetch()
        if self._mirror is not None and (reasons := [problem] if problem else self._reasons()):
            try:
                has_models = bool(scan_repository(self.path).models)
            except OSError:
                has_models = False
            if not has_models:
                raise StartupError(reasons[0])
        self._note(problem)
        return self._with_missing(check_repository(self.path))

    def scan(self) -> RepositoryFolders | None:
        """Returns the folders in it; None if they are unknown, which the log says when it changes."""
        problem = self.fetch()
        try:
            folders = self._with_missing(scan_repository(self.path))
            if folders.models:
                self._device = folders.device
            elif self._device not in (None, folders.device):
                raise OSError("its file system is not mounted")
        except OSError as error:
            self._note(problem or f"the repository cannot be read: {describe(error)}")
            return None
        self._note(problem)
        return None if problem and not folders.models else folders

    def has_model(self, name: str) -> bool:
        """Returns whether a model of this name exists. The name must have passed `check_name`.

        Raises:
            OSError: that is unknown.
        """
        if not has_model(self.path, name):
            if name in self.missing:
                raise OSError("; ".join(self.missing[name].values()))
            return False
        return True

    def _with_missing(self, folders: RepositoryFolders) -> RepositoryFolders:
        """Adds models that could not be fetched yet: they are at the address."""
        missing = {name: "; ".join(each.values()) for name, each in self.missing.items() if name not in folders.models}
        return replace(folders, unreadable={**folders.unreadable, **missing})

    def _reasons(self) -> list[str]:
        return [f"model '{name}': {reason}" for name, each in self.missing.items() for reason in each.values()]

    def refresh(self) -> None:
        """Fetches what has changed in the remote repository, if this is a copy. If that fails, the log says so."""
        if self._mirror is not None:
            self._note(self.fetch())

    def fetch(self, name: str = "", version: int = 0) -> str:
        """Fetches what has changed in the remote repository. Returns why that failed; empty if it did not.

        Args:
            name, version: as of `Mirror.sync`.
        """
        if self._mirror is None:
            return ""
        try:
            self._mirror.sync(name, version, self._known)
        except OSError as error:
            return self._mirror.describe(error)
        finally:
            before, self.missing = self.missing, self._mirror.missing()
            if self.missing != before:
                self._on_change()
        missing = self.missing.get(name, {})
        is_there = not version or (self.path / name / str(version)).is_dir()
        return "" if is_there else missing.get(version) or missing.get(OWN, "")

    def write_promotion(self, folder: Path, promotion: Promotion) -> None:
        """Makes the operator's choice for the model in a folder durable.

        Raises:
            OSError: it cannot be written.
        """
        (self._mirror.write_promotion if self._mirror is not None else write_promotion)(folder, promotion)

    def _note(self, unreadable: str) -> None:
        if unreadable == self.unreadable:
            return
        self.unreadable = unreadable
        if unreadable:
            logger.warning("%s: %s; the models that serve keep serving", self.place, unreadable)
        else:
            logger.info("%s: the repository can be read again", self.place)
        self._on_change()
