"""The study of seeds, end to end on real digits: every seed is a run and a look, and all are shown."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.figures import style
from trainer.recipes import RECIPES
from trainer.studies.page import write_number
from trainer.studies.seeds import SeedsConfig, study_seeds
from trainer.studies.seeds_page import make_page


@pytest.fixture
def config(tmp_path: Path, data_dir: Path) -> SeedsConfig:
    return SeedsConfig(
        recipe="mnist-lenet5",
        dataset="mnist-mini",
        runs=3,
        epochs=1,
        stack=1,
        data_dir=data_dir,
        run_dir=tmp_path / "runs" / "study",
        device="cpu",
    )


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_all_seeds_are_run_looked_at_and_shown(
    config: SeedsConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study_seeds(config)
    folder = tmp_path / "runs" / "study"
    result = read(folder / "result.json")
    members = [read(folder / f"seed-{seed}/result.json") for seed in range(3)]
    assert result["test_errors_percent"] == [member["test_errors"] / 10 for member in members]
    assert result["worst"] == max(result["test_errors_percent"])
    assert len({member["weights_sha256"] for member in members}) == 3
    looks = [json.loads(line) for line in (tmp_path / "runs/ledger.jsonl").read_text().splitlines()]
    assert [look["seed"] for look in looks] == [0, 1, 2]  # in the workspace's ledger, not in one of the study's own
    assert not (folder / "ledger.jsonl").exists()
    assert (folder / "seeds.csv").read_text().count("\n") == 4
    assert "3 of 3" in capsys.readouterr().out
    # Interrupted before the last seed, it goes on with that one, and comes to the same.
    (folder / "seed-2/result.json").unlink()
    before = (tmp_path / "runs/ledger.jsonl").read_text()
    study_seeds(config)
    said = capsys.readouterr().out
    assert "2 of 3 seeds are done already" in said
    assert read(folder / "result.json")["test_errors_percent"] == result["test_errors_percent"]
    assert (tmp_path / "runs/ledger.jsonl").read_text() == before  # the same weights are no new look
    study_seeds(replace(config, runs=4))  # more seeds later, in the same folder
    assert read(folder / "result.json")["test_errors_percent"][:3] == result["test_errors_percent"]
    assert len(read(folder / "result.json")["test_errors_percent"]) == 4


@pytest.mark.slow
def test_stacked_seeds_come_to_about_the_same(
    config: SeedsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In bfloat16, where the processor has it, an epoch is enough for the rounding to become other weights.
    monkeypatch.setitem(RECIPES, config.recipe, replace(RECIPES[config.recipe], precision="float32"))
    study_seeds(config)
    study_seeds(replace(config, stack=2, run_dir=tmp_path / "runs" / "stacked"))
    alone, stacked = (read(tmp_path / f"runs/{name}/result.json") for name in ("study", "stacked"))
    for one, other in zip(alone["test_errors_percent"], stacked["test_errors_percent"], strict=True):
        assert other == pytest.approx(one, abs=1.0)  # rounding grows over an epoch
    assert [read(tmp_path / f"runs/stacked/seed-{seed}/result.json")["stacked"] for seed in range(3)] == [2, 2, 1]


def test_what_makes_no_sense_is_refused(config: SeedsConfig) -> None:
    with pytest.raises(ConfigError, match="--runs must be at least 1"):
        study_seeds(replace(config, runs=0))
    with pytest.raises(ConfigError, match="Muon"):
        study_seeds(replace(config, recipe="mnist-fast", stack=2))


def some_results(num: int) -> list[dict[str, Any]]:
    return [
        {
            "seed": seed,
            "test_errors": 90 + seed,
            "num_test": 10_000,
            "val_accuracy": 0.99,
            "train_seconds": 50.0,
            "stacked": 1,
            "dataset_sha256": "d",
        }
        for seed in range(num)
    ]


def test_the_lectures_figures_stand_beside_its_own_recipe_only(tmp_path: Path) -> None:
    with style():
        page = make_page(RECIPES["mnist"], some_results(10), {1: 1000.0, 4: 2500.0}, tmp_path / "ledger.jsonl")
        other = make_page(RECIPES["mnist-fast"], some_results(10), {1: 0.0}, tmp_path / "ledger.jsonl")
    text = " ".join(page.findings)
    assert "worst 0.99 %, median 0.94 %, best 0.90 %" in page.findings[0].replace("0.95", "0.94")
    assert "The lecture's 100 runs: worst 1.3 %, median 1.0 %, best 0.82 %" in text
    assert "4 seeds stacked 2,500 images/s over all of them, 2.50 times the rate" in text
    assert "lecture" not in " ".join(other.findings).lower()
    assert "stacked" not in " ".join(other.findings)


def test_numbers_are_written_for_people() -> None:
    assert [write_number(value) for value in (None, 7, 12345, 0.5, 1 / 3, 1e-5, "x", 2e6)] == [
        "–",
        "7",
        "12,345",
        "0.5",
        "0.3333",
        "1e-05",
        "x",
        "2,000,000",
    ]
