"""Finished runs in one table: all evaluated runs of a setting, or none."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.records.results import make_result
from trainer.compare import compare_runs
from trainer.errors import ConfigError
from trainer.evaluation.entry import LedgerEntry
from trainer.evaluation.ledger import Ledger
from trainer.records.run_folder import RunFolder


def make_run(
    runs: Path,
    seed: int,
    num_errors: int,
    *,
    dataset: str = "d" * 64,
    ranks: int = 1,
    with_views: int | None = None,
    **recipe: float | str,
) -> Path:
    """A finished run. `ranks` decides its weights, but is not part of its setting; `with_views` are errors."""
    recipe = {"name": "mnist", "lr": 0.1} | recipe
    folder = runs / f"lr{recipe['lr']}-s{seed}-{dataset[0]}-{ranks}"
    folder.mkdir(parents=True)
    fingerprint = {"recipe": recipe, "seed": seed, "image_size": None, "dataset_sha256": dataset}
    (folder / "config.json").write_text(json.dumps({"fingerprint": fingerprint, "started_with": {}}))
    opened = RunFolder.read(folder)
    recorded = Ledger(opened.ledger_path).record(
        LedgerEntry(
            dataset="pets",
            dataset_sha256=dataset,
            weights_sha256=folder.name,
            run=folder.name,
            setting_sha256=opened.fingerprint.setting_sha256,
            seed=seed,
            accuracy=1 - num_errors / 1000,
            num_errors=num_errors,
            num_images=1000,
            num_errors_with_views=with_views,
            accuracy_with_views=None if with_views is None else 1 - with_views / 1000,
        )
    )
    result = make_result(
        dataset_sha256=dataset,
        seed=seed,
        weights_sha256=folder.name,
        test_errors=num_errors,
        num_test=1000,
        test_accuracy=1 - num_errors / 1000,
        test_errors_with_views=with_views,
        test_accuracy_with_views=None if with_views is None else 1 - with_views / 1000,
        test_look=recorded.number,
        num_test_looks=recorded.num_evaluations,
    )
    result.write(folder / "result.json")
    return folder


def test_the_table_has_a_row_for_each_setting(tmp_path: Path) -> None:
    paths = [make_run(tmp_path, seed, errors) for seed, errors in enumerate((10, 30, 20))]
    paths.append(make_run(tmp_path, 0, 5, lr=0.2))
    lines = compare_runs(paths)
    assert len(lines) == 5
    assert lines[1].split()[2:] == ["1", "3", "97.00", "98.00", "99.00", "98.00", "1.000"]
    assert lines[2].split()[2:] == ["1", "1", "99.50", "99.50", "99.50", "99.50", "–"]
    first, second = (line.split()[1] for line in lines[1:3])
    assert lines[3] == f"mnist {second} differs from {first}: lr 0.2 (not 0.1)"
    assert lines[4].startswith("4 evaluations on this test set in ")
    assert lines[4].endswith("(95 % over all evaluations)")


def test_a_recipe_with_views_has_a_row_for_one_view_and_one_for_all(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, seed, 20 + seed, with_views=10 + seed, test_time_views="shifted") for seed in (0, 2)]
    header, one_view, with_views, _ = compare_runs(runs)
    assert header.split()[:3] == ["setting", "views", "runs"]
    assert one_view.split()[2:7] == ["1", "2", "97.80", "97.90", "98.00"]
    assert with_views.split()[2:7] == ["5", "2", "98.80", "98.90", "99.00"]


def test_runs_of_version_0_1_have_the_accuracy_of_their_views_alone(tmp_path: Path) -> None:
    views = {"test_time_views": "shifted"}
    old, new = make_run(tmp_path, 0, 10, **views), make_run(tmp_path, 1, 20, with_views=12, **views)
    _, one_view, with_views, note, _ = compare_runs([old, new])
    assert one_view.split()[2:5] == ["1", "1", "98.00"]
    assert with_views.split()[2:6] == ["5", "2", "98.80", "98.90"]
    assert note.startswith(f"{old}: evaluated by version 0.1, with 5 views alone")
    assert note.endswith(f"convoy evaluate {old} --split test")
    # That command records an evaluation of one view, and the result stays as it was.
    ledger = Ledger(RunFolder.read(old).ledger_path)
    first = ledger.all_entries()[0]
    again = replace(first, num_errors=25, accuracy=0.975, num_errors_with_views=10, accuracy_with_views=0.99)
    assert ledger.record(again).number == 3
    _, one_view, with_views, _ = compare_runs([old, new])
    assert one_view.split()[2:5] == ["1", "2", "97.50"]
    assert with_views.split()[2:6] == ["5", "2", "98.80", "98.90"]


def test_runs_that_ended_with_a_warning_are_named(tmp_path: Path) -> None:
    good, bad = make_run(tmp_path, 0, 10), make_run(tmp_path, 1, 900)
    result = json.loads((bad / "result.json").read_text())
    (bad / "result.json").write_text(json.dumps(result | {"warnings": ["it predicts one class"]}))
    lines = compare_runs([good, bad])
    assert [line for line in lines if "warning" in line] == [f"warning: {bad}: it predicts one class"]


def test_the_best_of_several_seeds_alone_is_refused(tmp_path: Path) -> None:
    paths = [make_run(tmp_path, seed, errors) for seed, errors in enumerate((10, 30, 20))]
    left_out = r"also evaluated in lr0.1-s1-d-1 \(seed 1\), lr0.1-s2-d-1 \(seed 2\): name those runs too"
    with pytest.raises(ConfigError, match=left_out):
        compare_runs(paths[:1])


def test_each_ledger_counts_the_evaluations_on_the_test_images(tmp_path: Path) -> None:
    """The training images of one folder of runs are others than those of the other."""
    runs = [make_run(tmp_path / name, 0, 30, dataset=name * 64) for name in "ab"]
    for run in runs:
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(result | {"test_sha256": "t"}))
        ledger = Ledger(RunFolder.read(run).ledger_path)
        (entry,) = ledger.all_entries()
        ledger.path.write_text(replace(entry, test_sha256="t").to_line() + "\n")
    lines = compare_runs(runs)
    assert [line[:13] for line in lines[-2:]] == ["1 evaluation "] * 2


def test_figures_are_those_of_the_ledger(tmp_path: Path) -> None:
    """Nothing notices a change of `result.json`."""
    run = make_run(tmp_path, 0, 30)
    before = compare_runs([run])
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"test_accuracy": 0.999, "test_errors": 1}))
    assert compare_runs([run]) == before
    assert " is 95.60 to 97.97 % " in before[-1]  # Wilson's interval of 970 of 1,000 at 96.96 %


def test_the_best_number_of_ranks_alone_is_refused(tmp_path: Path) -> None:
    worst, best = make_run(tmp_path, 0, 30, ranks=1), make_run(tmp_path, 0, 10, ranks=4)
    for one, other in ((worst, best), (best, worst)):
        with pytest.raises(ConfigError, match=f"also evaluated in {other.name}"):
            compare_runs([one])
    assert compare_runs([best, worst])[1].split()[3:6] == ["2", "97.00", "98.00"]


def test_a_run_that_is_named_more_than_once_counts_once(tmp_path: Path) -> None:
    best, worst = make_run(tmp_path, 0, 10), make_run(tmp_path, 1, 30)
    assert compare_runs([best, best, best, worst])[:-1] == compare_runs([worst, best])[:-1]
    assert compare_runs([best, best, best, worst])[1].split()[3:7] == ["2", "97.00", "98.00", "99.00"]


def test_an_evaluation_before_a_runs_end_is_one_of_its_setting(tmp_path: Path) -> None:
    run = make_run(tmp_path, 0, 30)
    ledger = Ledger(RunFolder.read(run).ledger_path)
    ledger.record(replace(ledger.all_entries()[0], weights_sha256="early", accuracy=0.99))
    assert compare_runs([run])[1].split()[3:7] == ["2", "97.00", "98.00", "99.00"]


def test_a_ledger_with_fewer_entries_than_a_run_counted_is_refused(tmp_path: Path) -> None:
    paths = [make_run(tmp_path, seed, 10 + seed) for seed in range(3)]
    ledger = RunFolder.read(paths[0]).ledger_path
    first, second, third = ledger.read_text().splitlines(keepends=True)
    expected = rf"holds 2 evaluations on this test set, but {paths[2]} counted 3: entries are missing"
    for left in (first + second, first + third):
        ledger.write_text(left)
        with pytest.raises(ConfigError, match=expected):
            compare_runs(paths)
    ledger.write_text(second + first + third)
    assert compare_runs(paths)[1].split()[3] == "3"


def test_the_runs_of_two_machines_are_compared_after_their_ledgers_are_merged(tmp_path: Path) -> None:
    here = make_run(tmp_path / "here", 0, 10)
    there = [make_run(tmp_path / "there", seed, errors) for seed, errors in ((1, 20), (2, 30))]
    moved = [Path(shutil.copytree(path, tmp_path / "here" / path.name)) for path in there]
    with pytest.raises(ConfigError, match=r"holds 1 evaluation on this test set, but .* counted 2"):
        compare_runs([here, *moved])
    with (tmp_path / "here/ledger.jsonl").open("a") as ledger:
        ledger.write((tmp_path / "there/ledger.jsonl").read_text())
    assert compare_runs([here, *moved])[1].split()[3:7] == ["3", "97.00", "98.00", "99.00"]


def test_other_training_images_are_compared_on_the_same_test_images(tmp_path: Path) -> None:
    paths = [make_run(tmp_path, 0, 10), make_run(tmp_path, 0, 5, dataset="e" * 64)]
    for path in paths:
        result = json.loads((path / "result.json").read_text())
        (path / "result.json").write_text(json.dumps(result | {"test_sha256": "t"}))
    lines = compare_runs(paths)
    assert len(lines) == 5
    assert lines[3].endswith(": dataset_sha256 eeeeeeee (not dddddddd)")


def test_all_that_a_workspace_holds_is_compared(tmp_path: Path) -> None:
    study = tmp_path / "study-seeds"
    study.mkdir()
    (study / "study.json").write_text("{}")
    seeds = [make_run(study, seed, errors) for seed, errors in ((1, 20), (2, 30), (3, 30))]
    runs = [make_run(tmp_path, 0, 10), make_run(tmp_path, 0, 40, lr=0.2)]
    for unfinished in (seeds[2], runs[1]):
        (unfinished / "result.json").unlink()
    ledger = (tmp_path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_text("".join(ledger[:2] + ledger[3:4]))  # neither of them was evaluated
    for path in (runs[0], *seeds[:2]):
        result = json.loads((path / "result.json").read_text())
        (path / "result.json").write_text(json.dumps(result | {"num_test_looks": 3}))
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "failure.json").write_text("{}")
    lines = compare_runs(sorted(tmp_path.iterdir()))
    assert lines[1].split()[3:7] == ["3", "97.00", "98.00", "99.00"]
    assert lines[-1] == f"left out, as they have no test result: {failed}, {runs[1]}, {study}"
    assert compare_runs([runs[0], study])[1] == lines[1]


def test_runs_with_other_test_images_are_in_another_table(tmp_path: Path) -> None:
    one, other = make_run(tmp_path, 0, 10), make_run(tmp_path, 0, 20, dataset="e" * 64)
    first, second = compare_runs([one]), compare_runs([other])
    both = ["tested on pets (dddddddd)", *first, "", "tested on pets (eeeeeeee)", *second]
    assert compare_runs([one, other]) == both
    config = json.loads((other / "config.json").read_text())
    config["fingerprint"]["image_size"] = 32
    (other / "config.json").write_text(json.dumps(config))
    assert "tested on pets at 32 x 32 pixels (eeeeeeee)" in compare_runs([one, other])


def test_unfinished_runs_alone_are_refused(tmp_path: Path) -> None:
    one = make_run(tmp_path, 0, 10)
    with pytest.raises(ConfigError, match="name the folders"):
        compare_runs([])
    (one / "result.json").unlink()
    with pytest.raises(ConfigError, match=f"no run has a test result: {one}; a run has one at its end"):
        compare_runs([one])
    with pytest.raises(ConfigError, match="nowhere does not exist: a run's folder has a config"):
        compare_runs([tmp_path / "nowhere"])
