"""The folder that holds all models: which are in it, or why that is unknown."""

import logging
from collections.abc import Callable
from pathlib import Path

from serving.models.files import describe
from serving.models.scanner import RepositoryFolders, scan_repository

logger = logging.getLogger(__name__)


class RepositoryFolder:
    """The folder of a repository. One thread at a time may scan it.

    Args:
        on_change: called when `unreadable` has changed.

    Attributes:
        unreadable: why the last scan could not read the folder; empty if it could.
    """

    def __init__(self, path: Path, on_change: Callable[[], None]) -> None:
        self.path = path
        self.unreadable = ""
        self._on_change = on_change
        self._device: int | None = None
        """The file system that models were on. A mount that is lost leaves an empty folder of another one."""

    def scan(self) -> RepositoryFolders | None:
        """Returns the folders in it; None if they are unknown, which the log says when it changes."""
        try:
            folders = scan_repository(self.path)
            if folders.models:
                self._device = folders.device
            elif self._device not in (None, folders.device):
                raise OSError("its file system is not mounted")
        except OSError as error:
            self._note(f"the repository cannot be read: {describe(error)}")
            return None
        self._note("")
        return folders

    def _note(self, unreadable: str) -> None:
        if unreadable == self.unreadable:
            return
        self.unreadable = unreadable
        if unreadable:
            logger.warning("%s: %s; the models that serve keep serving", self.path, unreadable)
        else:
            logger.info("%s: the repository can be read again", self.path)
        self._on_change()
