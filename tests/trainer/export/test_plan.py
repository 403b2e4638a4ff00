"""Tests of what a run's model is said to be, before it is exported, and of when nothing is left to export."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.trainer.loop.runs import ALONE
from tests.trainer.records.results import RESULT
from tests.trainer.sinks.sink_runs import run_folder
from trainer.config import TrainConfig
from trainer.export.plan import ExportOptions, ExportPlan, check_complete, export_trained, repository_model
from trainer.export.repository import RepositoryModel
from trainer.loop.run import Run
from trainer.recipes.augmentation import Square


@pytest.mark.parametrize(
    ("dataset", "square", "method"),
    [
        ("folder:/data/tools", "crop", "fit"),
        ("folder:/data/tools", "pad", "pad"),
        ("mnist", "pad", "mnist"),  # its images are squares
    ],
)
def test_clients_prepare_files_as_the_run_did(dataset: str, square: Square, method: str) -> None:
    images: Any = SimpleNamespace(shape=(3, 8, 8))
    data = SimpleNamespace(name=dataset, train=images, classes=("a", "b"), significant_bits=None)
    run = cast(Run, SimpleNamespace(dataset=data, recipe=SimpleNamespace(square=square)))
    assert repository_model(run, Path("models"), "tools").preprocessing == method


@pytest.mark.parametrize(
    ("versions", "exported", "options", "is_done"),
    [
        ({}, None, {}, False),
        ({}, None, {"export": False}, True),
        ({}, "/elsewhere/tools/1", {}, True),  # or withdrawn since
        ({"1": RESULT.weights_sha256, "2": "other"}, None, {}, True),  # by `convoy export`
        ({"1": "other", "20": "other"}, None, {}, False),
        ({"1": RESULT.weights_sha256}, None, {"name": "b"}, False),
    ],
)
def test_a_complete_run_is_exported_unless_it_was(
    versions: dict[str, str], exported: str | None, options: dict[str, Any], is_done: bool, tmp_path: Path
) -> None:
    for version, digest in versions.items():
        folder = tmp_path / "models/tools" / version
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"origin": {"weights_sha256": digest}}))
    run = run_folder(tmp_path / "run")
    config = TrainConfig(model_repository=tmp_path / "models", **{"name": "tools", **options})
    lines: list[str] = []
    assert not check_complete(run, config, ALONE, lines.append)
    run.path.mkdir()
    replace(RESULT, exported=exported).write(run.result_path)
    assert check_complete(run, config, ALONE, lines.append) is is_done
    assert lines == [f"{run.path} is complete; nothing to do."] * is_done


def test_a_version_that_a_killed_process_of_the_run_has_published_is_not_published_again(tmp_path: Path) -> None:
    """It was killed between that and `result.json`."""
    for version, run_name in ((1, "run"), (2, "another")):
        folder = tmp_path / f"models/tools/{version}"
        folder.mkdir(parents=True)
        origin = {"weights_sha256": RESULT.weights_sha256, "run": run_name}
        (folder / "manifest.json").write_text(json.dumps({"origin": origin}))
    lines: list[str] = []
    progress = SimpleNamespace(log=lines.append)
    run = cast(Run, SimpleNamespace(folder=run_folder(tmp_path / "run"), progress=progress))
    model = RepositoryModel(repository=tmp_path / "models", name="tools", image_shape=(3, 8, 8), labels=("a", "b"))
    plan = ExportPlan(model=model, options=ExportOptions(device=ALONE.device))
    assert export_trained(run, plan, RESULT).exported == str(tmp_path / "models/tools/1")
    assert len(lines) == 1
