"""Several finished runs in one table, setting by setting, with every run that was looked at, or not at all."""

import statistics
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.evaluation.intervals import simultaneous_interval
from trainer.evaluation.ledger import Ledger
from trainer.records.run_folder import RunFolder

_MOST_NAMED = 5
"""Runs that were left out, in the error's one line."""


def compare_runs(paths: list[Path]) -> list[str]:
    """The table's lines: for each setting (all that decides a result but the seed) worst, median, best and mean.

    Raises:
        ConfigError: a run is not complete, the runs were tested on different images, or runs are missing that the
            ledger knows of: the best of some says nothing.
    """
    if not paths:
        raise ConfigError("name the folders of the runs to compare")
    named = [(RunFolder.read(path), _result(path)) for path in paths]
    # The same weights are one run, however often they are named.
    by_weights = {
        (folder.fingerprint.setting_sha256, found["weights_sha256"]): (folder, found) for folder, found in named
    }
    runs = list(by_weights.values())
    tested_on = {result.get("test_sha256", result["dataset_sha256"]): result["dataset"] for _, result in runs}
    if len(tested_on) > 1:
        names = " and ".join(f"{name} ({digest[:8]})" for digest, name in tested_on.items())
        raise ConfigError(f"the runs were tested on different images, {names}: compare those of one data set")
    settings: dict[str, list[tuple[RunFolder, dict[str, Any]]]] = {}
    for folder, result in runs:
        settings.setdefault(folder.fingerprint.setting_sha256, []).append((folder, result))
    lines = [f"{'setting':24s}  runs  worst    median   best     mean     deviation  test accuracy, %"]
    for setting, members in settings.items():
        lines.append(_line(members[0][1]["recipe"], setting, _all_accuracies(setting, members)))
    return [*lines, *_about_looks(runs)]


def _result(path: Path) -> dict[str, Any]:
    result = RunFolder.read(path).result()
    if result is None:
        raise ConfigError(f"{path} has no result yet: let the run end first")
    return result


def _all_accuracies(setting: str, members: list[tuple[RunFolder, dict[str, Any]]]) -> list[float]:
    """Of all weights with this setting that were looked at; a run that was looked at before its end too has several."""
    accuracies = {result["weights_sha256"]: result["test_accuracy"] for _, result in members}
    names = {folder.path.absolute().name for folder, _ in members}
    missing = {}
    for ledger_path in {folder.ledger_path for folder, _ in members}:
        for look in Ledger(ledger_path).of_setting(setting):
            if look["weights_sha256"] not in accuracies and look["run"] not in names:
                missing[look["weights_sha256"]] = f"{look['run']} (seed {look['seed']})"
            accuracies.setdefault(look["weights_sha256"], look["accuracy"])
    if missing:
        named = ", ".join(list(missing.values())[:_MOST_NAMED])
        more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
        raise ConfigError(
            f"{members[0][1]['recipe']} was also looked at in {named}{more}: report all runs of a setting, of every "
            "seed and number of ranks, or none; name those too"
        )
    return list(accuracies.values())


def _line(recipe: str, setting: str, accuracies: list[float]) -> str:
    found = [100 * accuracy for accuracy in accuracies]
    spread = f"{statistics.stdev(found):9.3f}" if len(found) > 1 else "        –"
    numbers = "  ".join(f"{n:7.2f}" for n in (min(found), statistics.median(found), max(found), statistics.mean(found)))
    return f"{recipe[:15]:15s} {setting[:8]} {len(found):5d}{numbers}  {spread}"


def _about_looks(runs: list[tuple[RunFolder, dict[str, Any]]]) -> list[str]:
    lines = []
    for path in sorted({folder.ledger_path for folder, _ in runs}):
        num_looks = len(Ledger(path).entries(runs[0][1]["dataset_sha256"]))
        num_test = runs[0][1]["num_test"]
        typical = statistics.median(result["test_accuracy"] for _, result in runs)
        low, high = simultaneous_interval(round(typical * num_test), num_test, max(1, num_looks))
        lines.append(
            f"{num_looks} look{'s' if num_looks != 1 else ''} at this test set in {path}: an accuracy of "
            f"{100 * typical:.2f} % stands for {100 * low:.2f} to {100 * high:.2f} % (95 % over all looks)"
        )
    return lines
