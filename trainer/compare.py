"""Compares finished runs in one table, setting by setting. A setting is compared with all its evaluated runs or not."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ConfigError
from trainer.evaluation.intervals import simultaneous_interval
from trainer.evaluation.ledger import Ledger
from trainer.evaluation.views import NUM_VIEWS
from trainer.records.result import Result
from trainer.records.run_folder import RunFolder

_MOST_NAMED = 5
"""How many missing runs the error names."""


@dataclass(frozen=True, slots=True)
class _Run:
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
    def num_views(self) -> int:
        return NUM_VIEWS[self.folder.fingerprint.test_time_views]


def compare_runs(paths: list[Path]) -> list[str]:
    """Returns the lines of the table: worst, median, best and mean test accuracy of each setting, and its std.

    Raises:
        ConfigError: A run is not complete, the runs have different test images, the ledger has runs of a setting that
            `paths` leaves out (the best of a choice says nothing), or entries of the ledger are missing.
    """
    if not paths:
        raise ConfigError("name the folders of the runs to compare")
    # Runs with the same weights are one run, however often they are named.
    runs = list({(run.setting, run.result.weights_sha256): run for run in map(_read, paths)}.values())
    _check_same_test_set(runs)
    ledgers = sorted({run.folder.ledger_path for run in runs})
    for ledger in ledgers:
        _check_ledger(ledger, [run for run in runs if run.folder.ledger_path == ledger])
    settings: dict[str, list[_Run]] = {}
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    header = f"{'setting':24s}  views  runs  worst    median   best     mean     std    test accuracy, %"
    rows = [_row(members[0], _all_accuracies(setting, members)) for setting, members in settings.items()]
    return [header, *rows, *(_describe_ledger(ledger, runs) for ledger in ledgers)]


def _read(path: Path) -> _Run:
    folder = RunFolder.read(path)
    result = folder.result()
    if result is None:
        raise ConfigError(f"{path} has no result yet: let the run end first")
    return _Run(folder, result)


def _check_same_test_set(runs: list[_Run]) -> None:
    test_sets = {run.test_set: run.result.dataset for run in runs}
    if len(test_sets) > 1:
        names = " and ".join(f"{name} ({digest[:8]})" for digest, name in test_sets.items())
        raise ConfigError(f"the runs were tested on different images, {names}: compare runs on one data set")


def _check_ledger(path: Path, runs: list[_Run]) -> None:
    """Raises ConfigError if the ledger holds fewer evaluations than a run counted when it ended."""
    for run in runs:
        held = len(Ledger(path).entries(run.result.dataset_sha256, run.result.test_sha256))
        counted = run.result.num_test_looks or 0
        if held < counted:
            raise ConfigError(
                f"{path} holds {held} evaluation{'s' if held != 1 else ''} on this test set, but {run.folder.path} "
                f"counted {counted}: entries are missing; restore the ledger, or append the one that the run was "
                "recorded in"
            )


def _all_accuracies(setting: str, members: list[_Run]) -> list[float]:
    """Returns the test accuracies of all evaluated weights of a setting.

    A run that was also evaluated before its end has several.

    Raises:
        ConfigError: A ledger has evaluations of runs that are not among the members.
    """
    accuracies = {run.result.weights_sha256: run.result.test_accuracy for run in members}
    names = {run.folder.path.absolute().name for run in members}
    missing = {}
    for path in {run.folder.ledger_path for run in members}:
        for entry in Ledger(path).of_setting(setting):
            if entry.weights_sha256 not in accuracies and entry.run not in names:
                missing[entry.weights_sha256] = f"{entry.run} (seed {entry.seed})"
            accuracies.setdefault(entry.weights_sha256, entry.accuracy)
    if missing:
        named = ", ".join(list(missing.values())[:_MOST_NAMED])
        more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
        raise ConfigError(
            f"{members[0].result.recipe} was also evaluated in {named}{more}: name those runs too, because only all "
            "runs of a setting, of every seed and number of ranks, can be compared"
        )
    return list(accuracies.values())


def _row(run: _Run, accuracies: list[float]) -> str:
    percents = [100 * accuracy for accuracy in accuracies]
    std = f"{statistics.stdev(percents):6.3f}" if len(percents) > 1 else "     –"
    summary = (min(percents), statistics.median(percents), max(percents), statistics.mean(percents))
    columns = "  ".join(f"{number:7.2f}" for number in summary)
    return f"{run.result.recipe[:15]:15s} {run.setting[:8]} {run.num_views:6d} {len(percents):5d}{columns}  {std}"


def _describe_ledger(path: Path, runs: list[_Run]) -> str:
    result = runs[0].result
    count = len(Ledger(path).entries(result.dataset_sha256))
    typical = statistics.median(run.result.test_accuracy for run in runs)
    low, high = simultaneous_interval(round(typical * result.num_test), result.num_test, max(1, count))
    return (
        f"{count} evaluation{'s' if count != 1 else ''} on this test set in {path}: the interval of an accuracy of "
        f"{100 * typical:.2f} % is {100 * low:.2f} to {100 * high:.2f} % (95 % over all evaluations)"
    )
