"""The examples run as documented: one short training by a script, and one server for the clients."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, clean_environment, wait_for
from trainer.data import Dataset

EXAMPLES = ROOT / "examples"
RECIPE, MODEL = "mnist-fast", "my-images"
CLASSES = 2


def environment(data_dir: Path) -> dict[str, str]:
    """Returns the environment after `. .venv/bin/activate`, with the tests' own cache of data sets."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return clean_environment() | {"PATH": path, "XDG_CACHE_HOME": str(data_dir)}


def run(data_dir: Path, *command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=environment(data_dir), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder_of_images(mini: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zeros and ones of mnist-mini, in place of a user's own images."""
    folder = tmp_path_factory.mktemp("images")
    for digit in range(CLASSES):
        (folder / str(digit)).mkdir()
        indices = (mini.train.labels == digit).nonzero()[:60, 0].tolist()
        for index in indices:
            Image.fromarray(mini.train.images[index, 0].numpy()).save(folder / str(digit) / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def trained(folder_of_images: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Runs folder_to_server.sh. Returns the model repository and the output."""
    work = tmp_path_factory.mktemp("work")
    script, image = EXAMPLES / "folder_to_server.sh", EXAMPLES / "digits/1.png"
    options = ("--recipe", RECIPE, "--image-size", "28", "--epochs", "16", "--device", "cpu")
    output = run(data_dir, "sh", script, folder_of_images, image, *options, cwd=work)
    return work / "models", output


@pytest.fixture(scope="module")
def ports(trained: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Serves the trained model, and returns the addresses for gRPC and HTTP."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [sys.executable, "-m", "convoy", "serve", "--model-repository", trained[0]]
    command += ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    with log.open("w") as file, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file) as server:
        try:
            wait_for("a server", lambda: "serving on" in log.read_text(), give_up=lambda: server.poll() is not None)
            yield dict(re.findall(r"(grpc|http) (127\.0\.0\.1:\d+)", log.read_text()))
        finally:
            server.terminate()


def test_the_digits_are_made_by_the_documented_command(data_dir: Path, tmp_path: Path) -> None:
    run(data_dir, sys.executable, EXAMPLES / "make_digits.py", tmp_path)
    made, shipped = (sorted(folder.glob("*.png")) for folder in (tmp_path, EXAMPLES / "digits"))
    assert [path.name for path in made] == [path.name for path in shipped] == [f"{digit}.png" for digit in range(10)]
    for ours, theirs in zip(made, shipped, strict=True):
        assert np.array_equal(np.asarray(Image.open(ours)), np.asarray(Image.open(theirs)))


def test_a_folder_of_images_becomes_a_server(trained: tuple[Path, str]) -> None:
    models, output = trained
    assert (models / MODEL / "1/model.onnx").is_file()
    assert re.search(r"digits/1\.png +1 +0\.\d{4}", output), output


def test_the_python_client_classifies(ports: dict[str, str], data_dir: Path) -> None:
    options = ["--target", ports["grpc"], "--model", MODEL]
    output = run(data_dir, sys.executable, EXAMPLES / "classify.py", *options)
    assert re.fullmatch(r"(\S*examples/digits/\d\.png: [01] \(\d+\.\d%\)\n){10}", output), output
    assert "0.png: 0 " in output


def test_curl_classifies(ports: dict[str, str], data_dir: Path) -> None:
    image = EXAMPLES / "digits/1.png"
    output = run(data_dir, "sh", EXAMPLES / "classify.sh", image, ports["http"], MODEL)
    assert re.search(r'"\d\.\d+:1:1"', output), output


def test_the_lectures_polynomial_is_the_same_with_and_without_loops(data_dir: Path) -> None:
    lines = run(data_dir, "python", EXAMPLES / "fit_polynomial.py").splitlines()
    assert lines == ["1.000000, -2.000000, 3.000000"] * 2


@pytest.mark.minutes
def test_the_lectures_script_learns_nothing_as_printed_but_as_written_today(data_dir: Path, mini: Dataset) -> None:
    assert len(mini.train) == 5000  # the data set is on the disk
    printed = run(data_dir, "python", EXAMPLES / "mnist_2018.py")
    today = run(data_dir, "python", EXAMPLES / "mnist_today.py")
    assert 80 < float(printed.split()[-2]) < 98
    assert float(today.split()[-2]) < 6
