"""Networks of the user's that cannot be exported are refused before their training, by the command line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.models import register_model
from torch import nn

from convoy import cli

NETWORK = """
from torch import nn

class MyNet(nn.Module):
    calls = 0

    def __init__(self, num_classes):
        super().__init__()
        self.convolution, self.maximum = nn.Conv2d(3, 8, 3), nn.AdaptiveMaxPool2d(5)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images):
        x = self.convolution(images)
        {code}
        return self.head(x.amax((2, 3)))
"""


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("self.calls += 1; x = x * self.calls", "model.pt at batch size 256 returns logit 0 = "),
        ("x = x - x.mean((0, 2, 3), keepdim=True)", "no random numbers, earlier calls or other images of the batch"),
        (
            "x = x if x.sum() > 0 else -x",
            "line 14, in forward: its code depends on the values of tensors, as with `if`",
        ),
        ("x = x[[index for index in range(len(x))]]", "cannot be exported: its code is for one number of images"),
        (
            "x = self.maximum(x)",
            "cannot be exported: No ONNX function found for <OpOverload(op='aten.adaptive_max_pool2d'",
        ),
    ],
)
def test_what_cannot_be_exported_is_told_before_the_training(
    code: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_net.py").write_text(NETWORK.format(code=code))
    network = f"{tmp_path / 'my_net.py'}:MyNet"
    with pytest.raises(SystemExit) as left:
        cli.run(train_line(tmp_path, network))
    output, errors = capsys.readouterr()
    assert left.value.code == 6
    assert problem in errors
    assert errors.startswith("error: ")
    assert errors.endswith("; to train without publishing, pass --no-export\n")
    assert errors.count("\n") == 1
    assert output.endswith(f"trying the export of {network}\n")
    assert not (tmp_path / "run").exists()


def test_networks_of_timm_are_tried_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This one is registered with timm, as packages beside it do."""

    @register_model
    def networkthatonnxlacks(num_classes: int, in_chans: int, **_options: object) -> nn.Module:
        maximum = nn.AdaptiveMaxPool2d(5)  # ONNX has none
        return nn.Sequential(maximum, nn.Flatten(), nn.Linear(in_chans * 25, num_classes))

    line = train_line(tmp_path, "timm:networkthatonnxlacks")
    with pytest.raises(SystemExit) as left:
        cli.run(line)
    assert left.value.code == 6
    errors = capsys.readouterr().err
    assert errors.startswith("error: timm:networkthatonnxlacks cannot be exported: No ONNX function found for ")
    assert errors.endswith("; to train without publishing, pass --no-export\n")
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def train_line(folder: Path, network: str) -> list[str]:
    """Returns a command line that trains a network on generated images."""
    stream = np.random.default_rng(0)
    for number in range(12):
        images = folder / "images" / "ab"[number % 2]
        images.mkdir(parents=True, exist_ok=True)
        Image.fromarray(stream.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(images / f"{number}.png")
    line = ["train", str(folder / "images"), "--recipe", "any-network", "--network", network]
    line += ["--image-size", "16", "--device", "cpu", "--run-dir", str(folder / "run"), "--name", "mine"]
    return [*line, "--data-dir", str(folder / "data"), "--model-repository", str(folder / "models")]
