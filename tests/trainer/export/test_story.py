"""Trains a good and then a bad model by the command line: the bad one does not replace the good one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, clean_environment

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Sixty noisy images of three colours."""
    stream = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.array(colour) + stream.integers(-40, 40, size=(32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def convoy(tmp_path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    known = ["--model-repository", str(tmp_path / "models"), "--data-dir", str(tmp_path / "data")]
    return subprocess.run(
        [sys.executable, "-m", "convoy", *arguments, *known],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
def test_a_bad_model_does_not_replace_a_good_one(colours: Path, tmp_path: Path) -> None:
    train = ["train", str(colours), "--recipe", "cifar10-lenet5", "--image-size", "32", "--global-batch-size", "8"]
    train += ["--device", "cpu", "--precision", "float32", "--name", "colours"]
    good = convoy(tmp_path, *train, "--lr-scale", "2", "--epochs", "20", "--run-dir", str(tmp_path / "runs/good"))
    assert good.returncode == 0, good.stdout + good.stderr
    versions = tmp_path / "models/colours"
    manifest = json.loads((versions / "1/manifest.json").read_text())
    assert manifest["metrics"]["val_errors"] == 0
    assert manifest["metrics"]["num_val"] >= 5
    run = tmp_path / "runs/bad"
    # With this seed the network assigns every image to one class before its first step, and never leaves it.
    train_bad = [*train, "--lr-scale", "1e-6", "--seed", "6", "--epochs", "1", "--run-dir", str(run)]
    bad = convoy(tmp_path, *train_bad)
    assert bad.returncode == 6
    assert bad.stderr.startswith("error: colours is not published: it assigns every image to the class 'green', ")
    assert bad.stderr.count("\n") == 1
    assert "--promote publishes it all the same; the run is complete" in bad.stderr
    command = f"python -m trainer export {run} --model-repository {tmp_path / 'models'} --promote"
    assert bad.stderr.endswith(f": {command}\n")
    assert json.loads((run / "result.json").read_text())["exported"] is None
    assert (run / "report.html").exists()
    assert not (versions / "2").exists()
    again = convoy(tmp_path, *train_bad)  # as Kubernetes or a job's retry does
    assert (again.returncode, again.stderr) == (6, bad.stderr)
    assert f"\n{run} is complete but not exported\nexporting colours: " in again.stdout
    assert "epoch 1/" not in again.stdout
    promoted = convoy(tmp_path, *train_bad, "--promote")
    assert promoted.returncode == 0, promoted.stderr
    assert "warning: --promote publishes colours, although it " in promoted.stdout
    quality = json.loads((versions / "2/manifest.json").read_text())["quality"]
    assert (quality["compared_with"], quality["promoted"]) == (1, True)
    assert json.loads((run / "result.json").read_text())["exported"] == str(versions / "2")
    shutil.rmtree(versions / "2")  # withdrawn: it is not published again
    done = convoy(tmp_path, *train_bad)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"\n{run} is complete; nothing to do. Its report: {run}/report.html\n")
    assert not (versions / "2").exists()
