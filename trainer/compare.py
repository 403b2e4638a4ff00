"""Compares finished runs in one table, setting by setting. A setting is compared with all its evaluated runs or not."""

import statistics
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Self

from trainer.errors import ConfigError, list_names
from trainer.evaluation.intervals import simultaneous_interval
from trainer.evaluation.ledger import Ledger
from trainer.evaluation.views import NUM_VIEWS, is_headline_averaged
from trainer.paths import FAILURE_FILE, LEDGER_FILE, run_folders
from trainer.recipes import TestTimeViews
from trainer.records.result import Result
from trainer.records.run_folder import RunFolder

_MOST_NAMED = 5
"""Runs that a line names."""


@dataclass(frozen=True, slots=True)
class _ComparedRun:
    folder: RunFolder
    result: Result

    @property
    def setting(self) -> str:
        """The digest of everything that decides the result except the seed."""
        return self.folder.fingerprint.setting_sha256

    @property
    def test_set(self) -> str:
        """The digest of the test images; of the data set in an old result."""
        return self.result.test_sha256 or self.result.dataset_sha256

    @property
    def tested_on(self) -> str:
        size = self.folder.fingerprint.image_size
        return self.result.dataset + ("" if size is None else f" at {size} x {size} pixels")

    @property
    def views(self) -> TestTimeViews:
        return self.folder.fingerprint.test_time_views


@dataclass(frozen=True, slots=True)
class _Accuracies:
    """The test accuracies of one network: of one view of each image, and with the recipe's views where it has several.

    Version 0.1 evaluated recipes with several views with these alone: then the accuracy of one view is unknown.
    """

    one_view: float | None
    with_views: float | None

    @classmethod
    def of(cls, views: TestTimeViews, headline: float, with_views: float | None) -> Self:
        return cls(None, headline) if is_headline_averaged(views, with_views) else cls(headline, with_views)

    @property
    def headline(self) -> float:
        """The accuracy of one view where it is known."""
        found = self.with_views if self.one_view is None else self.one_view
        assert found is not None
        return found


def compare_runs(paths: list[Path]) -> list[str]:
    """Returns the lines of a table: worst, median, best and mean test accuracy of each setting, and its std.

    A setting has a row for one view of each image and, where its recipe has several test-time views, one with them.
    Runs with different test images are in tables of their own.

    Args:
        paths: run folders, folders of studies, which stand for the finished runs in them, and ledgers, which are left
            out: so `runs/*` is all runs of a workspace.

    Raises:
        ConfigError: No run is complete, the ledger has runs of a setting that `paths` leaves out (the best of several
            chosen runs is no estimate), or entries of the ledger are missing.
    """
    if not paths:
        raise ConfigError("name the folders of the runs to compare")
    found_runs, unfinished = _read_all(paths)
    # Runs with the same weights are one run, however often they are named.
    runs = list({(run.setting, run.result.weights_sha256): run for run in found_runs}.values())
    tables: dict[str, list[_ComparedRun]] = {}
    for run in runs:
        tables.setdefault(run.test_set, []).append(run)
    lines: list[str] = []
    for test_set, members in tables.items():
        if len(tables) > 1:
            lines += ["", f"tested on {members[0].tested_on} ({test_set[:8]})"]
        lines += _table(members)
    if unfinished:
        lines += ["", f"left out, as they have no test result: {list_names(unfinished, _MOST_NAMED)}"]
    return lines[1:] if len(tables) > 1 else lines


def _table(runs: list[_ComparedRun]) -> list[str]:
    """Returns the table of runs with the same test images, and notes about them."""
    ledgers = sorted({run.folder.ledger_path for run in runs})
    for ledger in ledgers:
        _check_ledger(ledger, [run for run in runs if run.folder.ledger_path == ledger])
    settings: dict[str, list[_ComparedRun]] = {}
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    header = f"{'setting':24s}  views  runs  worst    median   best     mean     std    test accuracy, %"
    rows, notes, accuracies = [], [], []
    for setting, members in settings.items():
        found = _all_accuracies(setting, members)
        accuracies += [found[run.result.weights_sha256].headline for run in members]
        rows += _rows(members[0], list(found.values()))
        notes += [*_note_averaged(members, found), *_note_warnings(members)]
    return [
        header,
        *rows,
        *_note_differences([members[0] for members in settings.values()]),
        *notes,
        *(_describe_ledger(ledger, runs[0].result, statistics.median(accuracies)) for ledger in ledgers),
    ]


def _read_all(paths: list[Path]) -> tuple[list[_ComparedRun], list[str]]:
    """Returns the finished runs, and the paths with others.

    Raises:
        ConfigError: a path is none of those that `compare_runs` takes, or no run is finished.
    """
    runs: list[_ComparedRun] = []
    unfinished: dict[str, None] = {}
    for path in paths:
        if path.name == LEDGER_FILE and path.is_file():
            continue
        if (path / FAILURE_FILE).exists() and not (path / "config.json").exists():  # it failed before its first step
            unfinished[str(path)] = None
            continue
        for folder in run_folders(path):
            run = RunFolder.read(folder)
            if (result := run.result()) is not None:
                runs.append(_ComparedRun(run, result))
            else:
                unfinished[str(path)] = None
    if not runs:
        names = f": {list_names(list(unfinished), _MOST_NAMED)}" if unfinished else ""
        raise ConfigError(f"no run has a test result{names}; a run has one at its end, those of a sweep have none")
    return runs, list(unfinished)


def _check_ledger(path: Path, runs: list[_ComparedRun]) -> None:
    """Raises ConfigError if the ledger holds fewer evaluations than a run counted when it ended."""
    most: dict[tuple[str, str | None], _ComparedRun] = {}
    for run in sorted(runs, key=lambda run: run.result.num_test_looks or 0):
        most[run.result.dataset_sha256, run.result.test_sha256] = run
    for test_set, run in most.items():
        counted = run.result.num_test_looks or 0
        if missing := Ledger(path).describe_missing(*test_set, run.folder.path, counted):
            raise ConfigError(missing)


def _all_accuracies(setting: str, members: list[_ComparedRun]) -> dict[str, _Accuracies]:
    """Returns the test accuracies of all evaluated weights of a setting, by the digest of the weights.

    They are the ledger's, whose lines cannot be changed unnoticed; those of results for runs from before it. A run that
    was also evaluated before its end has several.

    Raises:
        ConfigError: A ledger has evaluations of runs that are not among the members.
    """
    views = members[0].views
    accuracies: dict[str, _Accuracies] = {}
    weights = {run.result.weights_sha256 for run in members}
    names = {run.folder.path.absolute().name for run in members}
    missing = {}
    for path in {run.folder.ledger_path for run in members}:
        for entry in Ledger(path).of_setting(setting):
            if entry.weights_sha256 not in weights and entry.run not in names:
                missing[entry.weights_sha256] = f"{entry.run} (seed {entry.seed})"
            known = accuracies.get(entry.weights_sha256)
            if known is None or known.one_view is None:
                accuracies[entry.weights_sha256] = _Accuracies.of(views, entry.accuracy, entry.accuracy_with_views)
    if missing:
        named = list_names(list(missing.values()), _MOST_NAMED)
        raise ConfigError(
            f"{members[0].result.recipe} was also evaluated in {named}: name those runs too, because only all runs of "
            "a setting, of every seed and number of ranks, can be compared"
        )
    for run in members:
        found = _Accuracies.of(views, run.result.test_accuracy, run.result.test_accuracy_with_views)
        accuracies.setdefault(run.result.weights_sha256, found)
    return accuracies


def _rows(run: _ComparedRun, accuracies: list[_Accuracies]) -> list[str]:
    one_view = [found.one_view for found in accuracies if found.one_view is not None]
    with_views = [found.with_views for found in accuracies if found.with_views is not None]
    return [_row(run, n, found) for n, found in ((1, one_view), (NUM_VIEWS[run.views], with_views)) if found]


def _row(run: _ComparedRun, num_views: int, accuracies: list[float]) -> str:
    percents = [100 * accuracy for accuracy in accuracies]
    std = f"{statistics.stdev(percents):6.3f}" if len(percents) > 1 else "     –"
    summary = (min(percents), statistics.median(percents), max(percents), statistics.mean(percents))
    columns = "  ".join(f"{number:7.2f}" for number in summary)
    return f"{run.result.recipe[:15]:15s} {run.setting[:8]} {num_views:6d} {len(percents):5d}{columns}  {std}"


def _note_differences(runs: list[_ComparedRun]) -> list[str]:
    """Returns how each setting, of which `runs` has a run, differs from the first one of its recipe."""
    first: dict[str, _ComparedRun] = {}
    notes = []
    for run in runs:
        other = first.setdefault(run.result.recipe, run)
        found = [
            f"{name.removeprefix('recipe.')} {_describe_value(ours)} (not {_describe_value(theirs)})"
            for name, theirs, ours in other.folder.fingerprint.differences(run.folder.fingerprint)
            if name != "seed"
        ]
        if found:
            names = f"{run.result.recipe} {run.setting[:8]}", other.setting[:8]
            notes.append(f"{names[0]} differs from {names[1]}: {list_names(found, _MOST_NAMED)}")
    return notes


def _describe_value(value: object) -> str:
    text = "the default" if value is None else str(value)
    return text[:8] if len(text) == len(sha256().hexdigest()) else text


def _note_averaged(members: list[_ComparedRun], accuracies: dict[str, _Accuracies]) -> list[str]:
    """Returns which runs have no accuracy of one view, and how to get it."""
    runs = [run for run in members if accuracies[run.result.weights_sha256].one_view is None]
    if not runs:
        return []
    paths = [str(run.folder.path) for run in runs]
    return [
        f"{list_names(paths, 1)}: evaluated by version 0.1, with {NUM_VIEWS[runs[0].views]} views alone; for the "
        f"accuracy of one view, as served: convoy evaluate {paths[0]} --split test"
    ]


def _note_warnings(members: list[_ComparedRun]) -> list[str]:
    return [f"warning: {run.folder.path}: {text}" for run in members for text in run.result.warnings]


def _describe_ledger(path: Path, result: Result, accuracy: float) -> str:
    """Returns the number of evaluations on a result's test set, and the interval of an accuracy after that many."""
    count = len(Ledger(path).entries(result.dataset_sha256, result.test_sha256))
    low, high = simultaneous_interval(round(accuracy * result.num_test), result.num_test, max(1, count))
    return (
        f"{count} evaluation{'s' if count != 1 else ''} on this test set in {path}: the interval of an accuracy of "
        f"{100 * accuracy:.2f} % is {100 * low:.2f} to {100 * high:.2f} % (95 % over all evaluations)"
    )
