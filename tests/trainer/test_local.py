"""`convoy train`: what the positional argument stands for, and how several ranks are started."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import clean_environment
from trainer.cli import parse
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.local import LocalTrainConfig, as_arguments, resolve


def resolved(*arguments: str) -> tuple[TrainConfig, str]:
    config = parse(LocalTrainConfig, arguments, prog="convoy train")
    return resolve(config, {argument.partition("=")[0] for argument in arguments if argument.startswith("--")})


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
    ("num_images", "batch_size", "epochs"), [(10, 16, 500), (300, 16, 32), (700, 32, 28), (3000, 128, 27)]
)
def test_a_folder_gets_a_recipe_for_small_images_and_enough_steps(
    num_images: int, batch_size: int, epochs: int, tmp_path: Path
) -> None:
    put_images(tmp_path / "photos", num_images)
    run, line = resolved(str(tmp_path / "photos"))
    dataset = f"folder:{tmp_path}/photos"
    assert run == TrainConfig(
        recipe="cifar10-small", dataset=dataset, image_size=64, epochs=epochs, global_batch_size=batch_size
    )
    assert line == (
        f"{dataset}: recipe cifar10-small, {epochs} epochs, {batch_size} images per step, images of 64 x 64 pixels "
        "(--recipe, --epochs, --global-batch-size and --image-size choose others)"
    )


def test_a_large_folder_is_trained_as_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_images(tmp_path, 10)
    monkeypatch.setattr("trainer.local._estimate_training_images", lambda _: 30_000)
    run, line = resolved(str(tmp_path))
    assert (run.epochs, run.global_batch_size) == (None, None)
    assert "recipe cifar10-small, 8 epochs, 500 images per step" in line


def test_options_override_the_choice_for_a_folder(tmp_path: Path) -> None:
    put_images(tmp_path, 700)

    def chosen(*options: str) -> tuple[str, int | None, int | None, int | None]:
        run, _ = resolved(str(tmp_path), *options)
        return run.recipe, run.image_size, run.epochs, run.global_batch_size

    assert chosen("--recipe=mnist", "--image-size", "28") == ("mnist", 28, 28, 32)
    assert chosen("--epochs", "5") == ("cifar10-small", 64, 5, None)
    assert chosen("--global-batch-size", "100") == ("cifar10-small", 64, 84, 100)
    assert chosen("--virtual-shards", "64") == ("cifar10-small", 64, 28, 64)
    assert chosen("--recipe=finetune-resnet18", "--image-size=224") == ("finetune-resnet18", 224, 28, 32)


def test_parts_of_a_folder_count_as_they_are(tmp_path: Path) -> None:
    for part, number in (("train", 700), ("val", 4), ("test", 4)):
        put_images(tmp_path / part, number)
    assert resolved(str(tmp_path))[0].epochs == 23  # 22 steps of 32 images each


def test_a_recipe_wins_over_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_images(tmp_path / "mnist", 4)
    monkeypatch.chdir(tmp_path)
    assert resolved("mnist")[0].dataset is None
    assert resolved("./mnist", "--epochs", "1")[0].dataset == "folder:./mnist"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnits"], "no such folder, and no recipe 'mnits': did you mean mnist"),
        (["./photos"], "./photos: no such folder"),
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
    )
    assert parse(TrainConfig, list(as_arguments(run)), prog="") == run
    assert list(as_arguments(TrainConfig())) == []


def test_several_ranks_train_and_exit_with_a_ranks_code(data_dir: Path, tmp_path: Path) -> None:
    """The output has no warning about OMP_NUM_THREADS, and the exit code is not torchrun's 1."""
    options = ["--nproc", "2", "--dataset", "mnist-mini", "--data-dir", str(data_dir), "--device", "cpu", "--no-export"]
    command = [sys.executable, "-m", "convoy", "train", "mnist", *options, "--lr-scale", "1e30"]
    environment = {name: value for name, value in clean_environment().items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, "OMP_NUM_THREADS" in done.stderr) == (5, False), done.stderr
    assert done.stdout.startswith("mnist on mnist-mini: 10 classes")
    assert "2 ranks on cpu" in done.stdout
