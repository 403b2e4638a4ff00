"""Trains the recipe of a family of networks on a folder of images, up to a model that a server can load."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, clean_environment
from tests.e2e.test_training import started, wait_for_line

pytestmark = pytest.mark.slow
NUM_TRAIN, NUM_TEST = 40, 10


def put_images(folder: Path, number: int, seed: int) -> None:
    """Writes noisy stripes, along or across: two classes."""
    stream = np.random.default_rng(seed)
    stripes = np.tile(np.repeat([0.0, 120.0], 4), (32, 4))
    for name, picture in (("across", stripes), ("along", stripes.T)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for _ in range(number):
            noisy = picture[..., None] + stream.uniform(0, 120, size=(32, 32, 3))
            path = folder / name / f"{seed}-{len(list((folder / name).iterdir()))}.png"
            Image.fromarray(noisy.astype(np.uint8)).save(path)


def start(*command: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    known = {"env": environment, "capture_output": True, "text": True, "timeout": 240, "check": False}
    return subprocess.run([sys.executable, *command], cwd=cwd, **known)  # type: ignore[call-overload, no-any-return]


def train(
    tmp_path: Path, name: str, *arguments: str, epochs: int = 1, dataset: str | None = None, cwd: Path | None = None
) -> dict[str, Any]:
    """Trains with the recipe of LeNet-5, and returns the result."""
    folder = tmp_path / "runs" / name
    dataset = dataset or f"folder:{tmp_path / 'images'}"
    known = ["--recipe", "cifar10-lenet5", "--dataset", dataset, "--image-size", "32", "--run-dir", str(folder)]
    known += ["--epochs", str(epochs), "--global-batch-size", "8", "--lr-scale", "2"]
    known += ["--device", "cpu", "--data-dir", str(tmp_path / "data")]
    done = start(str(ROOT / "trainer/main.py"), *known, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_a_network_learns_a_folder_of_images_and_is_published(tmp_path: Path) -> None:
    put_images(tmp_path / "images/train", NUM_TRAIN, seed=0)
    put_images(tmp_path / "images/test", NUM_TEST, seed=1)
    # Six epochs are enough to learn: a network that predicts one class is not published.
    result = train(tmp_path, "first", "--model-repository", str(tmp_path / "models"), epochs=6)
    assert (result["num_test"], result["test_look"]) == (2 * NUM_TEST, 1)
    version = tmp_path / "models/images/1"
    assert result["exported"] == str(version)
    assert (tmp_path / "models/images/labels.txt").read_text().split() == ["across", "along"]
    parity = json.loads((version / "manifest.json").read_text())["parity"]
    assert set(parity["formats"]) == {"model.onnx", "model.pt", "model.pt2"}
    # With one more training image the data set is another one, but not the test set: the ledger counts on.
    put_images(tmp_path / "images/train", 1, seed=2)
    again = train(tmp_path, "second", "--no-export", "--source", "streamed")  # nor does the source change it
    assert again["dataset_sha256"] != result["dataset_sha256"]
    assert (again["test_look"], again["num_test_looks"]) == (2, 2)


def test_a_folder_may_be_named_from_any_working_directory_and_moved(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    elsewhere.mkdir()
    put_images(images, NUM_TRAIN, seed=0)
    first = train(tmp_path, "run", "--no-export", dataset="folder:images", cwd=tmp_path)
    run, data = tmp_path / "runs/run", ("--data-dir", str(tmp_path / "data"))

    def evaluate(*arguments: str, cwd: Path = elsewhere) -> "subprocess.CompletedProcess[str]":
        return start("-m", "trainer", "evaluate", str(run), "--device", "cpu", *data, *arguments, cwd=cwd)

    assert "validation accuracy" in evaluate().stdout
    for spelling in ("folder:../images/", f"folder:{images}"):  # the same run: it is complete
        assert train(tmp_path, "run", "--no-export", dataset=spelling, cwd=elsewhere) == first
    images.rename(tmp_path / "moved")
    done = evaluate()
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {images} does not exist: name the place of the run's images with --dataset folder:PATH\n",
    )
    assert "validation accuracy" in evaluate("--dataset", "folder:../moved").stdout
    assert train(tmp_path, "run", "--no-export", dataset="folder:../moved", cwd=elsewhere) == first
    config = json.loads((run / "config.json").read_text())
    config["fingerprint"]["recipe"]["dataset"] = "folder:moved"  # as older versions wrote it
    (run / "config.json").write_text(json.dumps(config))
    assert "validation accuracy" in evaluate(cwd=tmp_path).stdout
    put_images(tmp_path / "moved", 1, seed=1)
    done = evaluate("--dataset", "folder:../moved")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: folder:{tmp_path / 'moved'} is not what {run} was trained on")


def test_a_study_continues_with_another_path_of_its_folder(tmp_path: Path) -> None:
    put_images(tmp_path / "images", NUM_TRAIN, seed=0)
    known = ["--recipe", "cifar10-lenet5", "--image-size", "32", "--runs", "1", "--epochs", "1", "--device", "cpu"]
    known += ["--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "study")]
    for dataset, line in (("folder:images", "1 of 1"), (f"folder:{tmp_path}/images/", "1 of 1 seeds are done already")):
        done = start("-m", "trainer", "study", "seeds", "--dataset", dataset, *known, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert line in done.stdout


def test_a_file_that_vanishes_while_ranks_train_is_one_line(tmp_path: Path) -> None:
    put_images(tmp_path / "images", NUM_TRAIN, seed=0)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "trainer/main.py"),
    ]
    command += ["--recipe", "cifar10-lenet5", "--dataset", f"folder:{tmp_path / 'images'}", "--source", "streamed"]
    command += ["--image-size", "32", "--epochs", "100000", "--global-batch-size", "8", "--device", "cpu"]
    command += ["--no-export", "--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run")]
    with started(command) as process:
        wait_for_line(process, "^epoch 1/")
        for path in (tmp_path / "images/along").iterdir():
            path.unlink()
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.fullmatch(rf"error: {tmp_path}/images/along/.*\.png is gone since the data set was opened: .*", errors[0])
    assert any("exitcode: 3" in line for line in lines)  # torchrun's own report follows
    assert json.loads((tmp_path / "run/failure.json").read_text())["error"] == "DataError"
