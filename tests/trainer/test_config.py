"""Command lines: their help, and the recipes that they resolve to."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro

from trainer.config import CompareConfig, EvaluateConfig, ExportConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.local import as_arguments
from trainer.recipes import RECIPES, Augment
from trainer.records.fingerprint import Fingerprint


@pytest.mark.parametrize("config", [TrainConfig, EvaluateConfig, ExportConfig, CompareConfig])
def test_the_help_shows_each_option_with_one_default(config: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(config, args=["--help"], prog="convoy")
    text = " ".join(re.sub("[╭─╮│╰╯]", " ", capsys.readouterr().out).split())
    assert text.count("(default: ") + text.count("(required)") == len(dataclasses.fields(config))
    assert "None" not in text
    assert "[default" not in text


def test_ranks_compare_the_options_that_decide_the_result() -> None:
    """A new option is compared unless it is known to change nothing in the result."""
    assert list(TrainConfig(epochs=3, run_dir=Path("run")).options_of_result().items()) == [
        ("--recipe", "mnist"),
        ("--set", "()"),
        ("--dataset", "None"),
        ("--freeze-until", "None"),
        ("--head-lr", "None"),
        ("--image-size", "None"),
        ("--source", "auto"),
        ("--skip-bad-images", "0"),
        ("--seed", "0"),
        ("--epochs", "3"),
        ("--global-batch-size", "None"),
        ("--num-validation", "None"),
        ("--mirror", "None"),
        ("--shift", "None"),
        ("--rotate-degrees", "None"),
        ("--scale", "None"),
        ("--lr-scale", "1.0"),
        ("--precision", "None"),
        ("--virtual-shards", "None"),
        ("--grad-accumulation", "1"),
        ("--compile", "False"),
        ("--gradient-reduction", "auto"),
    ]


def test_command_lines_are_parsed_without_torch() -> None:
    """A faulty command line, and `--help`, need not wait for torch."""
    script = "import sys, trainer.config; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "False\n"
    )


def test_the_command_line_changes_the_recipe() -> None:
    arguments = ["--epochs", "3", "--dataset", "mnist-mini", "--global-batch-size", "50", "--lr-scale", "0.5"]
    recipe = tyro.cli(TrainConfig, args=arguments).resolve()
    assert (recipe.epochs, recipe.dataset, recipe.global_batch_size) == (3, "mnist-mini", 50)
    assert recipe.param_groups["filters"].lr == pytest.approx(0.1 * 0.5 * 0.5**0.5)
    assert TrainConfig().resolve() == RECIPES["mnist"]


@pytest.mark.parametrize(
    ("arguments", "augment"),
    [
        ([], Augment(shift=2, rotate_degrees=10, scale=0.1)),
        (["--mirror"], Augment(flip="alternating", shift=2, rotate_degrees=10, scale=0.1)),
        (["--no-mirror", "--shift", "0"], Augment(rotate_degrees=10, scale=0.1)),
        (["--rotate-degrees", "0.0", "--scale=0.2"], Augment(shift=2, scale=0.2)),
    ],
)
def test_the_command_line_changes_the_augmentation(arguments: list[str], augment: Augment) -> None:
    """The fingerprint records it, and is the same without an option as if there were none."""
    config = tyro.cli(TrainConfig, args=["--recipe", "mnist-fast", *arguments])
    recipe = config.resolve()
    assert recipe.augment == augment
    assert list(as_arguments(config))[2:] == [part for argument in arguments for part in argument.split("=")]
    known: dict[str, Any] = {"seed": 0, "image_size": None, "dataset_sha256": "", "virtual_shards": None}
    of_recipe = Fingerprint.of(RECIPES["mnist-fast"], **known)
    assert (Fingerprint.of(recipe, **known).sha256 == of_recipe.sha256) == (not arguments)


@pytest.mark.parametrize("spelling", ["photos", "./photos/", "sub/../photos"])
def test_a_folder_is_named_for_every_working_directory(spelling: str) -> None:
    assert TrainConfig(dataset=f"folder:{spelling}").resolve().dataset == f"folder:{Path.cwd() / 'photos'}"
    with pytest.raises(ConfigError, match="folder: needs a path"):
        TrainConfig(dataset="folder:").resolve()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(epochs=0), "--epochs 0"),
        (TrainConfig(global_batch_size=-1), "--global-batch-size -1"),
        (TrainConfig(image_size=0), "--image-size 0"),
        (TrainConfig(lr_scale=0), "--lr-scale 0"),
        (TrainConfig(shift=-1), "--shift -1: must be 0 or more pixels"),
        (TrainConfig(rotate_degrees=200), "--rotate-degrees 200: must be 0 to 180"),
        (TrainConfig(rotate_degrees=float("nan")), "--rotate-degrees nan"),
        (TrainConfig(scale=1), "--scale 1: must be 0 to 0.9"),
        (TrainConfig(lr_scale=float("nan")), "--lr-scale nan"),
        (TrainConfig(hang_timeout_s=-1.0), "--hang-timeout-s -1"),
        (TrainConfig(metrics_address="8007"), "--metrics-address 8007: must be HOST:PORT"),
        (TrainConfig(recipe="cifar"), "did you mean cifar10"),
        (TrainConfig(recipe="MNIST"), "did you mean mnist"),
        (TrainConfig(virtual_shards=4, gradient_reduction="ddp"), "a fixed order, which DDP does not keep"),
    ],
)
def test_values_that_make_no_sense_are_refused(config: TrainConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.resolve()


@pytest.mark.parametrize(("number", "message"), [(3, "a power of two"), (0, "a power of two"), (128, "batch of 100")])
def test_shards_that_make_no_sense_are_refused(number: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(virtual_shards=number).resolve()
    assert TrainConfig(virtual_shards=4).resolve().global_batch_size == 100
