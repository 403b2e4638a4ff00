"""Gets a data set that has a name from its sources in turn, or from files that the user has."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from trainer.data.content import DatasetContent
from trainer.data.published.collect import collect_files
from trainer.data.published.download import DownloadLimits, DownloadProgress
from trainer.data.published.errors import MissingFilesError, SourceError, TooSlowError
from trainer.data.published.formats import decode_npz
from trainer.data.published.info import DatasetInfo
from trainer.data.published.progress import LineProgress
from trainer.data.published.sources import FetchOptions, Source
from trainer.data.staging import explain_disk_errors, staging
from trainer.errors import DataError

_PEAK_DISK_USE = 2
"""Disk space that fetching takes, in sizes of the decoded data set: an archive and its files are there together."""


def fetch_dataset(
    info: DatasetInfo,
    data_dir: Path,
    *,
    log: Callable[[str], None],
    progress: DownloadProgress | None = None,
    limits: DownloadLimits | None = None,
) -> DatasetContent:
    """Gets a data set from the first source that has all of it.

    A source below the floor on throughput is tried again, without the floor, when no other source has the files.

    Args:
        info: the data set.
        data_dir: folder in which data sets are kept; its folder for this one exists.
        log: receives a line for each source that fails, and for the one that does not.
        progress: receives the progress of downloads; None to log a line every ten seconds.
        limits: beyond which a download gives up on a server.

    Raises:
        DataError: no source has the data set (the message names each source and its reason), or the disk is full.
    """
    if info.generate is not None:
        return info.content(info.generate())
    options = FetchOptions(
        data_dir=data_dir,
        max_bytes=info.size_bytes + (1 << 20),
        limits=limits or DownloadLimits(),
        progress=progress or LineProgress(log),
    )
    patient = replace(options, limits=replace(options.limits, min_bytes_per_s=0))
    waiting = [(source, options) for source in info.sources]
    failures: list[str] = []
    while waiting:
        source, source_options = waiting.pop(0)
        try:
            started = time.monotonic()
            content = _fetch_from(source, info, source_options)
        except SourceError as error:
            failures.append(f"{source.label}: {error}")
            if isinstance(error, TooSlowError):
                waiting.append((source, patient))
            following = f"; trying {waiting[0][0].label}" if waiting else ""
            log(f"{info.name}: {failures[-1]}{following}")
        else:
            log(f"{info.name}: taken from {source.label} in {time.monotonic() - started:.1f} s, verified")
            return content
    raise DataError(
        f"{info.name} cannot be fetched from any source ({' | '.join(failures)}). If you have the files, "
        f"`convoy data import {info.name} PATH` takes them from a folder or an archive"
    )


def import_dataset(info: DatasetInfo, path: Path, data_dir: Path) -> DatasetContent:
    """Decodes a data set from the user's files, which stay as they are.

    Args:
        info: the data set.
        path: a folder, an archive or a .npz file.
        data_dir: folder in which data sets are kept; its folder for this one exists.

    Raises:
        DataError: the data set's files are not all there.
    """
    if path.suffix == ".npz":
        return info.content(decode_npz(path))
    with staging(data_dir / info.name) as work:
        try:
            return _decode(info, [path], work)
        except SourceError as error:
            raise DataError(f"{info.name} cannot be taken from {path}: {error}") from error


def _fetch_from(source: Source, info: DatasetInfo, options: FetchOptions) -> DatasetContent:
    folder = options.data_dir / info.name
    with explain_disk_errors(folder, _PEAK_DISK_USE * info.size_bytes), staging(folder) as work:
        arrived = work / "arrived"
        arrived.mkdir()
        return _decode(info, source.fetch(arrived, options), work)


def _decode(info: DatasetInfo, roots: list[Path], work: Path) -> DatasetContent:
    """Decodes the first format whose files are all there.

    Raises:
        SourceError: no format is complete. The reason is that of the first one with files that are not good, else that
            of the first one.
    """
    errors: list[SourceError] = []
    for file_format in info.formats:
        try:
            return info.content(file_format.decode(collect_files(roots, file_format.files, work)))
        except SourceError as error:
            errors.append(error)
    raise next((error for error in errors if not isinstance(error, MissingFilesError)), errors[0])
