"""Finds files of known names and digests in folders, compressed, and inside archives.

The digest decides whether a file is the right one. MNIST and Fashion-MNIST use the same file names, so the search
continues after a file with another digest.
"""

import gzip
import hashlib
import os
import tarfile
import zipfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from trainer.data.published.errors import MissingFilesError, SourceError
from trainer.data.staging import TEMPORARY_PREFIX

_TAR_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A published file, uncompressed."""

    name: str
    digest: str
    """"sha256:..." or "md5:...", in hex."""
    size_bytes: int


def collect_files(roots: Iterable[Path], files: Collection[KnownFile], into: Path) -> dict[str, Path]:
    """Copies files out of folders and archives, uncompressed and verified.

    Args:
        roots: folders, which are searched to any depth, and files.
        files: the files to find.
        into: the folder for the copies.

    Returns:
        The path of each copy by the file's name.

    Raises:
        MissingFilesError: files are missing.
        SourceError: files are missing, and others are damaged or have another digest.
    """
    wanted = {file.name: file for file in files}
    found: dict[str, Path] = {}
    problems: list[str] = []
    for root in roots:
        for name, location, stream in _candidates(root, wanted.keys(), problems):
            if name not in found:
                try:
                    _copy_verified(stream, wanted[name], into / name)
                    found[name] = into / name
                except SourceError as error:
                    problems.append(f"{location} {error}")
    missing = [name for name in wanted if name not in found]
    if missing and problems:
        raise SourceError("; ".join(problems[:3]))
    if missing:
        all_missing = len(missing) == len(wanted)
        raise MissingFilesError("none of the files is there" if all_missing else f"{', '.join(missing)} not there")
    return found


def _candidates(root: Path, names: Collection[str], problems: list[str]) -> Iterator[tuple[str, str, IO[bytes]]]:
    """Yields (name, location, open stream) of each file under `root` that has one of the names, with or without .gz."""
    paths = sorted(_files_under(root)) if root.is_dir() else [root]
    for path in paths:
        try:
            if path.name.endswith(_TAR_ENDINGS):
                yield from _in_tar(path, names)
            elif path.suffix == ".zip":
                yield from _in_zip(path, names)
            elif (name := path.name.removesuffix(".gz")) in names:
                with path.open("rb") as stream:
                    yield name, str(path), stream
        except Exception as error:  # of every kind, for a damaged or an encrypted archive
            problems.append(f"{path} cannot be read ({error})")


def _files_under(root: Path) -> Iterator[Path]:
    """Yields all files except our own unfinished ones, in case `root` is the data folder."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(TEMPORARY_PREFIX)]
        yield from (path for name in files if not (path := Path(folder, name)).is_fifo())  # reading a pipe would block


def _in_tar(path: Path, names: Collection[str]) -> Iterator[tuple[str, str, IO[bytes]]]:
    with tarfile.open(path) as archive:
        for member in archive:
            name = PurePosixPath(member.name).name.removesuffix(".gz")
            if name in names and (stream := archive.extractfile(member)) is not None:
                yield name, f"{path}:{member.name}", stream


def _in_zip(path: Path, names: Collection[str]) -> Iterator[tuple[str, str, IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = PurePosixPath(member.filename).name.removesuffix(".gz")
            if name in names:
                with archive.open(member) as stream:
                    yield name, f"{path}:{member.filename}", stream


def _copy_verified(stream: IO[bytes], known: KnownFile, target: Path) -> None:
    """Copies and uncompresses, but no more than the known size: a small file could unpack to fill the disk."""
    algorithm, _, expected = known.digest.partition(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    size_bytes = 0
    with target.open("wb") as out:
        for chunk in _uncompressed_chunks(stream):
            size_bytes += len(chunk)
            if size_bytes > known.size_bytes:
                raise SourceError(f"is longer than {known.size_bytes} bytes")
            digest.update(chunk)
            out.write(chunk)
    if size_bytes < known.size_bytes:
        raise SourceError(f"has {size_bytes} bytes instead of {known.size_bytes}")
    if digest.hexdigest() != expected:
        raise SourceError(f"has the wrong digest ({algorithm} {digest.hexdigest()[:12]}, not {expected[:12]})")


def _uncompressed_chunks(stream: IO[bytes]) -> Iterator[bytes]:
    try:
        head = stream.read(2)
        stream.seek(0)
        source = gzip.GzipFile(fileobj=stream) if head == b"\x1f\x8b" else stream
        while chunk := source.read(_CHUNK_BYTES):
            yield chunk
    except Exception as error:
        raise SourceError(f"cannot be read ({error})") from error
