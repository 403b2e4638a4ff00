"""Whole runs in one process: the view of the headline, and warnings about a bad training in report and result."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, clean_environment
from trainer.compare import compare_runs
from trainer.config import EvaluateConfig, TrainConfig
from trainer.data.decoded_file import open_decoded
from trainer.data.folder.options import FolderOptions
from trainer.loop.run import restore
from trainer.prepare import load
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.recipes import RECIPES, Augment
from trainer.records.mistakes import read_mistakes
from trainer.records.run_folder import RunFolder
from trainer.reopen import evaluate_run
from trainer.studies.seeds import SeedsConfig, study_seeds
from trainer.train import setup, train

HEAVY = (
    "PIL",
    "grpc",
    "jinja2",
    "matplotlib",
    "mlflow",
    "networkx",
    "onnx",
    "onnxruntime",
    "pandas",
    "scipy",
    "serving",
    "starlette",
    "sympy",
    "tensorboard",
    "timm",
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "torchvision",
    "triton",
    "wandb",
)
"""Packages that a training on a CPU needs after its last step, if at all."""
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), num_threads=2)


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def predictions(folder: Path, data_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The exported network's predictions, of one view, for the test images, and their labels."""
    read = RunFolder.read(folder)
    recipe = read.fingerprint.recipe
    dataset = load(recipe, FolderOptions(), data_dir, ALONE, print)
    run = setup(recipe, dataset, read, ALONE, Progress(is_main=False))
    assert restore(run)
    assert dataset.path is not None
    test = open_decoded(dataset.path, expected_sha256=dataset.sha256, verify=False).content.test
    model = run.learner.model.eval()
    with torch.inference_mode():
        return torch.cat([model(chunk).argmax(dim=1) for chunk in test.images.split(500)]), test.labels


def test_nothing_heavy_is_imported_before_the_first_step(tmp_path: Path, data_dir: Path) -> None:
    code = (
        "import sys, trainer.train\nfrom trainer.cli import train_command\n"
        f"trainer.train.fit = lambda *_: sys.exit(str([name for name in {HEAVY} if name in sys.modules]))\n"
        "train_command(sys.argv[1:])"
    )
    options = ["--dataset", "mnist-mini", "--num-validation", "0", "--device", "cpu"]
    folders = {"--data-dir": data_dir, "--run-dir": tmp_path / "run", "--model-repository": tmp_path / "models"}
    given = [str(part) for option in folders.items() for part in option]
    command = [sys.executable, "-c", code, *options, *given]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.stderr == "[]\n"


def test_the_headline_is_of_one_view_and_the_figure_with_views_follows_it(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ledger = tmp_path / "runs/views", tmp_path / "runs/ledger.jsonl"
    known = {"data_dir": data_dir, "device": "cpu"}
    config = TrainConfig(
        recipe="mnist-fast",
        dataset="mnist-mini",
        epochs=1,
        run_dir=folder,
        export=False,
        **known,  # type: ignore[arg-type]
    )
    train(config)
    last = capsys.readouterr().out.splitlines()[-2]
    result = result_of(folder)
    predicted, labels = predictions(folder, data_dir)
    errors, with_views = int((predicted != labels).sum()), result["test_errors_with_views"]
    assert result["test_errors"] == errors != with_views
    assert result["test_accuracy"] == pytest.approx(1 - errors / 1000)
    assert result["val_accuracy"] == read_validation(folder) != result["val_accuracy_with_views"]
    figures = rf"test accuracy \d+\.\d+ % \({errors} of 1,000 wrong; .*\), \d+\.\d+ % with 5 views of each image "
    assert re.match(rf"{figures}\({with_views} wrong\), evaluation 1 of 1", last)
    (kept,) = read_mistakes(folder)
    assert kept["epoch"] == 1
    assert len(kept["mistakes"]) == min(16, round(500 * (1 - read_validation(folder))))
    assert {(len(base64.b64decode(one["pixels"])), one["height"]) for one in kept["mistakes"]} == {(784, 28)}
    (line,) = ledger.read_text().splitlines()
    entry = json.loads(line)
    assert (entry["num_errors"], entry["num_errors_with_views"]) == (errors, with_views)
    evaluate = EvaluateConfig(run=folder, split="test", **known)  # type: ignore[arg-type]
    evaluate_run(evaluate)
    assert f"{last}, recorded earlier" in capsys.readouterr().out
    evaluate_run(replace(evaluate, split="validation"))
    assert "of 500 wrong; 95 % interval" in (validation := capsys.readouterr().out)
    assert "with 5 views of each image" in validation

    # As version 0.1 left it: the figures with views alone.
    of_views = {"accuracy": 1 - with_views / 1000, "num_errors": with_views}
    old = {name: value for name, value in entry.items() if not name.endswith("_with_views") and name != "sha256"}
    ledger.write_text(json.dumps(old | of_views) + "\n")
    old_result = {name: value for name, value in result.items() if not name.endswith("_with_views")}
    headline = {"test_accuracy": of_views["accuracy"], "test_errors": with_views}
    (folder / "result.json").write_text(json.dumps(old_result | headline))
    assert "evaluated by version 0.1, with 5 views alone" in "\n".join(compare_runs([folder]))
    evaluate_run(evaluate)
    assert f"({errors} of 1,000 wrong" in (again := capsys.readouterr().out)
    assert "evaluation 2 of 2" in again
    evaluate_run(evaluate)
    assert "evaluation 2 of 2" in (again := capsys.readouterr().out)
    assert "recorded earlier" in again
    assert [row.split()[2:5] for row in compare_runs([folder])[1:3]] == [
        ["1", "1", f"{100 - errors / 10:.2f}"],
        ["5", "1", f"{100 - with_views / 10:.2f}"],
    ]


def read_validation(folder: Path) -> float:
    """The accuracy of the last epoch's validation, which is of one view."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return float(next(line for line in reversed(lines) if line["kind"] == "epoch")["val_accuracy"])


def test_a_constant_predictor_for_unbalanced_classes_is_reported(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve images against 160: such a set "reached" 94 %."""
    random = np.random.default_rng(0)
    for part, few, many in (("train", 8, 120), ("test", 4, 40)):
        for name, number in (("few", few), ("many", many)):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / part / name / f"{index}.png")
    recipe = RECIPES["mnist-resnet18"]
    groups = {kind: replace(group, lr=1e-9) for kind, group in recipe.param_groups.items()}
    constant = replace(recipe, name="constant", network="lenet5", param_groups=groups, epochs=2, precision="float32")
    constant = replace(constant, augment=Augment(flip="alternating"))
    monkeypatch.setitem(RECIPES, "constant", constant)
    folder = tmp_path / "runs/constant"
    train(
        TrainConfig(
            recipe="constant",
            dataset=f"folder:{tmp_path / 'set'}",
            image_size=32,
            data_dir=data_dir,
            run_dir=folder,
            device="cpu",
            export=False,
        )
    )
    output, result = capsys.readouterr().out, result_of(folder)
    advice, epochs = (
        output.index("\nconstant mirrors images at random; if left and right matter"),
        output.index("\nepoch 1/2"),
    )
    assert advice < output.index("steps in all are few for constant") < epochs
    recalls = result["recall_by_class"]
    assert result["balanced_accuracy"] == pytest.approx((recalls["few"] + recalls["many"]) / 2)
    worst = min(recalls, key=lambda name: float(recalls[name]))
    assert f"balanced accuracy {100 * result['balanced_accuracy']:.2f} % (worst class: {worst!r}, recall" in output
    assert [text.split(":")[0][:35] for text in result["warnings"]] == [
        "the network predicts no better than",
        "the network predicts the class 'few",
    ]
    page = " ".join((folder / "report.html").read_text().split())
    for text in result["warnings"]:
        assert f"warning: epoch 2: {text}" in output
        assert text.replace("'", "&#39;") in page
    assert page.index("Warning:") < page.index("test accuracy")


def test_names_of_255_bytes_that_are_not_utf_8_go_through_every_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux allows such names; they come from archives of other systems and servers with Latin-1 names."""
    runs, data_dir, name = (tmp_path / os.fsdecode(kind + 254 * b"\xe9") for kind in (b"r", b"d", b"n"))
    folder = runs / name.name
    written = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")  # as convoy.processes does
    monkeypatch.setattr("sys.stdout", written)
    known = {"data_dir": data_dir, "device": "cpu"}
    train(TrainConfig(dataset="mnist-mini", epochs=1, run_dir=folder, export=False, **known))  # type: ignore[arg-type]
    assert result_of(folder)["test_look"] == 1
    assert next((folder / "tensorboard").iterdir()).stat().st_size > 0
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads((runs / "ledger.jsonl").read_text())["run"] == name.name
    evaluate_run(EvaluateConfig(run=folder, split="test", **known))  # type: ignore[arg-type]
    assert len(compare_runs([folder])) == 3
    study_seeds(
        SeedsConfig(dataset="mnist-mini", runs=1, epochs=1, run_dir=runs / f"s{name.name[1:]}", **known)  # type: ignore[arg-type]
    )
    assert len((runs / "ledger.jsonl").read_text().splitlines()) == 1  # the study has the same weights
    written.flush()
    assert b"recorded earlier" in written.buffer.getvalue()  # type: ignore[attr-defined]
