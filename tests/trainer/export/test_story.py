"""Trains a good and then a bad model by the command line: the bad one does not replace the good one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoy import cli

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


@pytest.mark.slow
def test_a_bad_model_does_not_replace_a_good_one(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands run in this process: only the first one waits for torch's exporters."""

    def convoy(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.run([*arguments, "--model-repository", str(tmp_path / "models"), "--data-dir", str(tmp_path / "data")])
        assert isinstance(left.value.code, int)
        return left.value.code, *capsys.readouterr()

    train = ["train", str(colours), "--recipe", "cifar10-lenet5", "--image-size", "32", "--global-batch-size", "8"]
    train += ["--device", "cpu", "--precision", "float32", "--name", "colours"]
    code, output, errors = convoy(*train, "--lr-scale", "2", "--epochs", "20", "--run-dir", str(tmp_path / "runs/good"))
    assert code == 0, output + errors
    versions = tmp_path / "models/colours"
    manifest = json.loads((versions / "1/manifest.json").read_text())
    assert manifest["metrics"]["val_errors"] == 0
    assert manifest["metrics"]["num_val"] >= 5
    run = tmp_path / "runs/bad"
    # With this seed the network assigns every image to one class before its first step, and never leaves it.
    train_bad = [*train, "--lr-scale", "1e-6", "--seed", "6", "--epochs", "1", "--run-dir", str(run)]
    code, _, errors = convoy(*train_bad)
    assert code == 6
    assert errors.startswith("error: colours is not published: it assigns every image to the class 'green', ")
    assert errors.count("\n") == 1
    assert "--promote publishes it all the same; the run is complete" in errors
    command = f"convoy export {run} --model-repository {tmp_path / 'models'} --promote"
    assert errors.endswith(f": {command}\n")
    assert json.loads((run / "result.json").read_text())["exported"] is None
    assert (run / "report.html").exists()
    assert not (versions / "2").exists()
    code, output, errors_again = convoy(*train_bad)  # as Kubernetes or a job's retry does
    assert (code, errors_again) == (6, errors)
    assert f"\n{run} is complete but not exported\nexporting colours: " in output
    assert "epoch 1/" not in output
    code, output, errors = convoy(*train_bad, "--promote")
    assert code == 0, errors
    assert "warning: --promote publishes colours, although it " in output
    quality = json.loads((versions / "2/manifest.json").read_text())["quality"]
    assert (quality["compared_with"], quality["promoted"]) == (1, True)
    assert json.loads((run / "result.json").read_text())["exported"] == str(versions / "2")
    shutil.rmtree(versions / "2")  # withdrawn: it is not published again
    code, output, errors = convoy(*train_bad)
    assert (code, errors) == (0, "")
    assert output.endswith(f"\n{run} is complete; nothing to do. Its report: {run}/report.html\n")
    assert not (versions / "2").exists()
