"""Gets a published data set from its sources in turn, or from what the user has at hand."""

import time
from dataclasses import replace
from pathlib import Path

from trainer.data.published.collect import Incomplete, SourceError, collect_files
from trainer.data.published.download import DownloadProgress, Limits, TooSlow
from trainer.data.published.formats import decode_npz
from trainer.data.published.sources import Fetching, NamedSet, Source
from trainer.data.store import Content, Say, explain_disk_errors, staging
from trainer.errors import DataError

_PEAK = 2
"""An archive and what was in it lie side by side for a while: about this many times the set's size, on the disk."""


def obtain(
    named: NamedSet,
    data_dir: Path,
    *,
    say: Say,
    progress: DownloadProgress | None = None,
    limits: Limits | None = None,
) -> Content:
    """Gets a data set from the first source that has it whole, saying each switch in one line.

    Sources that deliver too slowly are gone back to when no other has it. Raises DataError naming every
    source and its reason.
    """
    if named.make is not None:
        return named.content(named.make())
    fetching = Fetching(
        data_dir=data_dir,
        max_bytes=named.size_bytes + (1 << 20),
        limits=limits or Limits(),
        say=say,
        progress=progress or _SparseProgress(say),
    )
    patient = replace(fetching, limits=replace(fetching.limits, floor_bytes_per_s=0))
    waiting = [(source, fetching) for source in named.sources]
    failures: list[str] = []
    while waiting:
        source, terms = waiting.pop(0)
        try:
            return _fetch_from(source, named, terms)
        except SourceError as error:
            failures.append(f"{source.label}: {error}")
            if isinstance(error, TooSlow):
                waiting.append((source, patient))
            following = f"; trying {waiting[0][0].label}" if waiting else ""
            say(f"{named.name}: {failures[-1]}{following}")
    raise DataError(
        f"{named.name} cannot be had from any source ({' | '.join(failures)}). With the files at hand, "
        f"`python -m trainer data import {named.name} PATH` takes them from a folder or an archive"
    )


def import_files(named: NamedSet, path: Path, data_dir: Path) -> Content:
    """Decodes a data set from a folder, an archive or a .npz of the user's. Raises DataError."""
    if path.suffix == ".npz":
        return named.content(decode_npz(path))
    with staging(data_dir / named.name) as work:
        try:
            return _decode(named, [path], work)
        except SourceError as error:
            raise DataError(f"{named.name} cannot be taken from {path}: {error}") from error


def _fetch_from(source: Source, named: NamedSet, fetching: Fetching) -> Content:
    folder = fetching.data_dir / named.name
    with explain_disk_errors(folder, _PEAK * named.size_bytes), staging(folder) as work:
        arrived = work / "arrived"
        arrived.mkdir()
        started = time.monotonic()
        content = _decode(named, source.fetch(arrived, fetching), work)
        fetching.say(f"{named.name}: taken from {source.label} in {time.monotonic() - started:.1f} s, verified")
        return content


def _decode(named: NamedSet, roots: list[Path], work: Path) -> Content:
    """Tries each form; when none is complete, tells of the one that came furthest."""
    reasons: list[SourceError] = []
    for form in named.forms:
        try:
            return named.content(form.decode(collect_files(roots, form.files, work)))
        except SourceError as error:
            reasons.append(error)
    raise next((reason for reason in reasons if not isinstance(reason, Incomplete)), reasons[0])


class _SparseProgress:
    """A line every ten seconds: for logs, and for whoever watches a slow download."""

    def __init__(self, say: Say, interval_s: float = 10.0) -> None:
        self.say = say
        self.interval_s = interval_s
        self.name = ""
        self.started = self.last = 0.0

    def __call__(self, name: str, num_bytes: int, total: int | None) -> None:
        now = time.monotonic()
        if name != self.name:
            self.name, self.started, self.last = name, now, now
        if now - self.last < self.interval_s:
            return
        self.last = now
        share = f"{100 * num_bytes / total:.0f} % of {total / 1e6:.1f} MB" if total else f"{num_bytes / 1e6:.1f} MB"
        self.say(f"{name}: {share}, {num_bytes / 1e6 / (now - self.started):.2f} MB/s")
