"""Trains the recipe of a family of networks on a folder of images, up to a model that a server can load."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.e2e.test_training import started, wait_for_line
from trainer.cli import COMMANDS

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


@pytest.fixture
def run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """A function that runs a command line in this process. It returns the exit code, the output and the errors."""

    def run(verb: str, *arguments: str, cwd: Path = tmp_path) -> tuple[int, str, str]:
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            COMMANDS[verb]([*arguments, "--device", "cpu", "--data-dir", str(tmp_path / "data")], verb)
        assert isinstance(left.value.code, int)
        return left.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def train(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> Callable[..., dict[str, Any]]:
    """A function that trains with the recipe of LeNet-5, and returns the result."""

    def train(name: str, *arguments: str, epochs: int = 1, dataset: str = "", cwd: Path = tmp_path) -> dict[str, Any]:
        folder = tmp_path / "runs" / name
        dataset = dataset or f"folder:{tmp_path / 'images'}"
        known = ["--recipe", "cifar10-lenet5", "--dataset", dataset, "--image-size", "32", "--run-dir", str(folder)]
        known += ["--epochs", str(epochs), "--global-batch-size", "8", "--lr-scale", "2"]
        code, _, errors = run("train", *known, *arguments, cwd=cwd)
        assert code == 0, errors
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result

    return train


def test_a_network_learns_a_folder_of_images_and_is_published(
    tmp_path: Path, train: Callable[..., dict[str, Any]]
) -> None:
    put_images(tmp_path / "images/train", NUM_TRAIN, seed=0)
    put_images(tmp_path / "images/test", NUM_TEST, seed=1)
    # Six epochs are enough to learn: a network that predicts one class is not published.
    result = train("first", "--model-repository", str(tmp_path / "models"), epochs=6)
    assert (result["num_test"], result["test_look"]) == (2 * NUM_TEST, 1)
    version = tmp_path / "models/images/1"
    assert result["exported"] == str(version)
    assert (tmp_path / "models/images/labels.txt").read_text().split() == ["across", "along"]
    parity = json.loads((version / "manifest.json").read_text())["parity"]
    assert set(parity["formats"]) == {"model.onnx", "model.pt", "model.pt2"}
    # With one more training image the data set is another one, but not the test set: the ledger counts on.
    put_images(tmp_path / "images/train", 1, seed=2)
    again = train("second", "--no-export", "--source", "streamed")  # nor does the source change it
    assert again["dataset_sha256"] != result["dataset_sha256"]
    assert (again["test_look"], again["num_test_looks"]) == (2, 2)


def test_a_folder_may_be_named_from_any_working_directory_and_moved(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], train: Callable[..., dict[str, Any]]
) -> None:
    images, elsewhere, folder = tmp_path / "images", tmp_path / "elsewhere", tmp_path / "runs/run"
    elsewhere.mkdir()
    put_images(images, NUM_TRAIN, seed=0)
    first = train("run", "--no-export", dataset="folder:images")

    def evaluate(*arguments: str, cwd: Path = elsewhere) -> tuple[int, str, str]:
        return run("evaluate", str(folder), *arguments, cwd=cwd)

    assert "validation accuracy" in evaluate()[1]
    for spelling in ("folder:../images/", f"folder:{images}"):  # the same run: it is complete
        assert train("run", "--no-export", dataset=spelling, cwd=elsewhere) == first
    images.rename(tmp_path / "moved")
    code, _, errors = evaluate()
    assert (code, errors) == (
        2,
        f"error: {images} does not exist: name the place of the run's images with --dataset folder:PATH\n",
    )
    assert "validation accuracy" in evaluate("--dataset", "folder:../moved")[1]
    assert train("run", "--no-export", dataset="folder:../moved", cwd=elsewhere) == first
    config = json.loads((folder / "config.json").read_text())
    config["fingerprint"]["recipe"]["dataset"] = "folder:moved"  # as older versions wrote it
    (folder / "config.json").write_text(json.dumps(config))
    assert "validation accuracy" in evaluate(cwd=tmp_path)[1]
    put_images(tmp_path / "moved", 1, seed=1)
    code, _, errors = evaluate("--dataset", "folder:../moved")
    assert code == 2
    assert errors.startswith(f"error: folder:{tmp_path / 'moved'} is not what {folder} was trained on")


def test_a_study_continues_with_another_path_of_its_folder(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    put_images(tmp_path / "images", NUM_TRAIN, seed=0)
    known = ["--recipe", "cifar10-lenet5", "--image-size", "32", "--runs", "1", "--epochs", "1"]
    known += ["--run-dir", str(tmp_path / "study")]
    for dataset, line in (("folder:images", "1 of 1"), (f"folder:{tmp_path}/images/", "1 of 1 seeds are done already")):
        code, output, errors = run("study", "seeds", "--dataset", dataset, *known)
        assert code == 0, errors
        assert line in output


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
