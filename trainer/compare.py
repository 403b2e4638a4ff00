"""Several finished runs in one table, setting by setting, with every seed that was looked at, or not at all."""

import statistics
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.evaluate import interval_after_looks
from trainer.ledger import Ledger
from trainer.run_folder import RunFolder


def compare_runs(paths: list[Path]) -> list[str]:
    """The table's lines: for each setting (all that decides a result but the seed) worst, median, best and mean.

    Raises:
        ConfigError: a run is not complete, the runs were tested on different images, or seeds are missing that the
            ledger knows of: the best of some seeds says nothing.
    """
    runs = [(RunFolder.read(path), _result(path)) for path in paths]
    tested_on = {result["dataset_sha256"]: result["dataset"] for _, result in runs}
    if len(tested_on) > 1:
        names = " and ".join(f"{name} ({digest[:8]})" for digest, name in tested_on.items())
        raise ConfigError(f"the runs were tested on different images, {names}: compare those of one data set")
    settings: dict[str, list[tuple[RunFolder, dict[str, Any]]]] = {}
    for folder, result in runs:
        settings.setdefault(folder.setting_sha256, []).append((folder, result))
    lines = [f"{'setting':24s} seeds  worst    median   best     mean     deviation  test accuracy, %"]
    for setting, members in settings.items():
        _check_all_seeds(setting, members)
        lines.append(_line(setting, [result for _, result in members]))
    return [*lines, *_about_looks(runs)]


def _result(path: Path) -> dict[str, Any]:
    result = RunFolder.read(path).result()
    if result is None:
        raise ConfigError(f"{path} has no result yet: let the run end first")
    return result


def _check_all_seeds(setting: str, members: list[tuple[RunFolder, dict[str, Any]]]) -> None:
    known: set[int] = set()
    for ledger_path in {folder.ledger_path for folder, _ in members}:
        known |= set(Ledger(ledger_path).seeds(members[0][1]["dataset_sha256"], setting))
    missing = sorted(known - {folder.seed for folder, _ in members})
    if missing:
        named = ", ".join(map(str, missing))
        raise ConfigError(
            f"{members[0][1]['recipe']} was also looked at with seed{'s' if len(missing) > 1 else ''} {named}: "
            "report all seeds of a setting or none; name those runs too"
        )


def _line(setting: str, results: list[dict[str, Any]]) -> str:
    found = [100 * result["test_accuracy"] for result in results]
    spread = f"{statistics.stdev(found):9.3f}" if len(found) > 1 else "        –"
    numbers = "  ".join(f"{n:7.2f}" for n in (min(found), statistics.median(found), max(found), statistics.mean(found)))
    return f"{results[0]['recipe'][:15]:15s} {setting[:8]} {len(found):5d}{numbers}  {spread}"


def _about_looks(runs: list[tuple[RunFolder, dict[str, Any]]]) -> list[str]:
    lines = []
    for path in sorted({folder.ledger_path for folder, _ in runs}):
        num_looks = len(Ledger(path).entries(runs[0][1]["dataset_sha256"]))
        num_test = runs[0][1]["num_test"]
        typical = statistics.median(result["test_accuracy"] for _, result in runs)
        low, high = interval_after_looks(round(typical * num_test), num_test, num_looks)
        lines.append(
            f"{num_looks} look{'s' if num_looks != 1 else ''} at this test set in {path}: an accuracy of "
            f"{100 * typical:.2f} % stands for {100 * low:.2f} to {100 * high:.2f} %"
        )
    return lines
