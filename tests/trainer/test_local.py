"""`convoy train`: what the positional argument stands for, and how several ranks are started."""

import math
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import clean_environment
from trainer.cli import parse
from trainer.config import TrainConfig
from trainer.config_file import CommandLine
from trainer.errors import ConfigError
from trainer.local import LocalTrainConfig, as_arguments, resolve
from trainer.recipes.folder_choice import FolderFacts


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.local._num_gpus", lambda run: 0)


def resolved(*arguments: str) -> tuple[TrainConfig, str]:
    line = CommandLine.read(arguments)
    config = parse(LocalTrainConfig, line.arguments, prog="convoy train", default=LocalTrainConfig(run=line.default))
    return resolve(replace(config, run=line.combine(config.run)), line.given)


def test_without_an_argument_it_trains_the_default_recipe() -> None:
    assert resolved() == (TrainConfig(), "")


def test_a_recipes_name_is_the_recipe() -> None:
    assert resolved("cifar10-small", "--seed", "3") == (TrainConfig(recipe="cifar10-small", seed=3), "")


def put_images(folder: Path, number: int) -> None:
    for each in range(number):
        path = folder / ("cat" if each % 2 else "dog") / f"{each}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(
    ("num_images", "batch_size", "epochs"), [(10, 16, 75), (150, 16, 75), (300, 16, 75), (700, 32, 67), (1000, 64, 93)]
)
def test_a_folder_gets_a_recipe_for_small_images_and_enough_steps(
    num_images: int, batch_size: int, epochs: int, tmp_path: Path
) -> None:
    put_images(tmp_path / "photos", num_images)
    run, line = resolved(str(tmp_path / "photos"))
    dataset = f"folder:{tmp_path}/photos"
    assert run == TrainConfig(
        recipe="photos", dataset=dataset, image_size=160, epochs=epochs, global_batch_size=batch_size
    )
    chosen, command = line.splitlines()
    assert chosen.startswith(
        f"{dataset}: about {math.ceil(num_images * 0.9**2):,} training images, no GPU: recipe photos: "
    )
    assert chosen.endswith(f"; {epochs} epochs, {batch_size} images per step, 160 x 160 pixels")
    assert resolved(*shlex.split(command.removeprefix("the same as: convoy train "))) == (run, "")


def test_a_large_folder_is_trained_as_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_images(tmp_path, 10)
    facts = FolderFacts(num_training=30_000, short_side=375, has_gpu=False)
    monkeypatch.setattr("trainer.local._look_at_folder", lambda _: facts)
    run, line = resolved(str(tmp_path))
    assert (run.epochs, run.global_batch_size) == (None, None)
    assert "30,000 training images of about 375 pixels, no GPU: recipe photos: " in line
    assert "; 30 epochs, 64 images per step" in line


def test_options_override_the_choice_for_a_folder(tmp_path: Path) -> None:
    put_images(tmp_path, 700)

    def chosen(*options: str) -> tuple[str, int | None, int | None, int | None]:
        run, _ = resolved(str(tmp_path), *options)
        return run.recipe, run.image_size, run.epochs, run.global_batch_size

    assert chosen("--recipe=mnist", "--image-size", "28") == ("mnist", 28, 28, 32)
    assert chosen("--epochs", "5") == ("photos", 160, 5, None)
    assert "; 1 epoch, 64 images per step" in resolved(str(tmp_path), "--epochs", "1")[1]
    assert chosen("--global-batch-size", "100") == ("photos", 160, 200, 100)
    assert chosen("--virtual-shards", "64") == ("photos", 160, 134, 64)
    assert chosen("--nproc", "48") == ("photos", 160, 100, 48)  # each rank needs an image of a batch
    assert chosen("--recipe=finetune-resnet18", "--image-size=224") == ("finetune-resnet18", 224, 28, 32)
    assert chosen("--set", "epochs=5") == ("photos", 160, None, None)


def test_the_size_of_the_images_is_looked_at(tmp_path: Path) -> None:
    for number, size in enumerate([(28, 28), (28, 40), (30, 200), (300, 300)]):
        path = tmp_path / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", size).save(path)
    run, line = resolved(str(tmp_path))
    assert run.image_size == 32
    assert "about 4 training images of about 29 pixels, no GPU: recipe cifar10-small: a small network for small" in line


def test_weights_at_hand_are_fine_tuned(tmp_path: Path) -> None:
    put_images(tmp_path / "photos", 100)
    (tmp_path / "net.safetensors").write_bytes(b"")
    run, line = resolved(str(tmp_path / "photos"), "--weights", str(tmp_path / "net.safetensors"))
    assert (run.recipe, run.image_size) == ("finetune-efficientnet-lite0", 224)
    assert "recipe finetune-efficientnet-lite0: EfficientNet-Lite0 is fine-tuned from your weights; " in line


def test_a_file_of_options_holds_for_a_folder(tmp_path: Path) -> None:
    put_images(tmp_path / "photos", 700)
    (tmp_path / "options.toml").write_text('recipe = "mnist"\nimage-size = 28\nepochs = 3\n[set]\naugment.shift = 1\n')
    config = ["--config", str(tmp_path / "options.toml")]
    run, _ = resolved(str(tmp_path / "photos"), *config)
    assert (run.recipe, run.image_size, run.epochs, run.set) == ("mnist", 28, 3, ("augment.shift=1",))
    assert resolved(str(tmp_path / "photos"), *config, "--epochs=4", "--set", "augment.shift=2")[0].set == (
        "augment.shift=2",
    )


def test_parts_of_a_folder_count_as_they_are(tmp_path: Path) -> None:
    for part, number in (("train", 700), ("val", 4), ("test", 4)):
        put_images(tmp_path / part, number)
    assert resolved(str(tmp_path))[0].epochs == 55  # 22 steps of 32 images each


def test_a_recipe_wins_over_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_images(tmp_path / "mnist", 4)
    monkeypatch.chdir(tmp_path)
    assert resolved("mnist")[0].dataset is None
    assert resolved("./mnist", "--epochs", "1")[0].dataset == f"folder:{tmp_path / 'mnist'}"


def test_photos_is_the_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^photos: no such folder; .*: convoy train FOLDER --recipe photos$"):
        resolved("photos")
    put_images(tmp_path / "photos", 4)
    assert resolved("photos", "--epochs", "1")[0].dataset == f"folder:{tmp_path / 'photos'}"
    run, _ = resolved("photos", "--dataset", "folder:others")
    assert (run.recipe, run.dataset) == ("photos", "folder:others")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnits"], "no such folder, and no recipe 'mnits': did you mean mnist"),
        (["./photos"], "./photos: no such folder"),
        (["mnits", "--recipe", "cifar10"], "no such folder, and no recipe 'mnits': did you mean mnist"),
        (["/dev/null"], "/dev/null is a file: give the folder that holds one folder of images for each class"),
        (["run.toml"], "run.toml: give a file of options with --config run.toml"),
        (["mnist", "--recipe", "cifar10"], "mnist and --recipe cifar10: give one recipe"),
        ([".", "--dataset", "cifar10"], ". and --dataset cifar10: give one data set"),
        (["--nproc", "0"], "--nproc 0: must be at least 1"),
    ],
)
def test_contradictions_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(*arguments)
    assert str(caught.value).startswith(message)


def test_ranks_get_a_command_line_that_gives_the_same_run(tmp_path: Path) -> None:
    run = TrainConfig(
        recipe="mnist-fast",
        dataset="folder:/a b",
        image_size=28,
        run_dir=tmp_path,
        lr_scale=0.5,
        virtual_shards=4,
        precision="float32",
        export=False,
        mirror=False,
        shift=0,
        set=("augment.fill=zero", "widths=[1, 2]"),
        log_to=("wandb",),
        name="my-model",
    )
    assert parse(TrainConfig, list(as_arguments(run)), prog="") == run
    assert list(as_arguments(TrainConfig())) == []


def test_several_ranks_train_and_exit_with_a_ranks_code(data_dir: Path, tmp_path: Path) -> None:
    """The errors are the rank's line alone, without torchrun's, and the exit code is not torchrun's 1."""
    options = ["--nproc", "2", "--dataset", "mnist-mini", "--data-dir", str(data_dir), "--device", "cpu", "--no-export"]
    command = [sys.executable, "-m", "convoy", "train", "mnist", *options, "--lr-scale", "1e30"]
    environment = {name: value for name, value in clean_environment().items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout.startswith("mnist on mnist-mini: 10 classes")
    assert "2 ranks on cpu" in done.stdout
