"""A folder of JPEG files on a GPU: a captured step takes images that another stream copies, or gathers them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.gpu_ranks import ON_A_GPU
from trainer.cli import train_command

pytestmark = [pytest.mark.gpu, *ON_A_GPU]


def put_photographs(folder: Path, number: int) -> None:
    """Writes noise that is red or blue: two classes."""
    stream = np.random.default_rng(len(str(folder)))
    for name, colour in (("red", (90, 0, 0)), ("blue", (0, 0, 90))):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            pixels = stream.integers(0, 160, size=(48, 40 + index % 8, 3)) + colour
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.jpg", quality=95)


def test_streamed_images_train_the_weights_of_resident_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_photographs(tmp_path / "images" / "train", 130)
    put_photographs(tmp_path / "images" / "test", 8)
    digests = []
    for source in ("resident", "streamed"):
        command = ["--recipe", "cifar10-lenet5", "--dataset", f"folder:{tmp_path / 'images'}", "--image-size", "32"]
        command += ["--epochs", "2", "--global-batch-size", "16", "--device", "cuda", "--no-export"]
        command += ["--source", source, "--run-dir", str(tmp_path / source), "--data-dir", str(tmp_path / "data")]
        with pytest.raises(SystemExit) as left:
            train_command(command)
        printed = capsys.readouterr()
        assert left.value.code == 0, printed.err
        assert "no CUDA graph" not in printed.out
        digests.append(json.loads((tmp_path / source / "result.json").read_text())["weights_sha256"])
    assert digests[0] == digests[1]
