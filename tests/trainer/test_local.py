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


@pytest.mark.parametrize(("num_images", "epochs"), [(300, 60), (900, 30), (5000, 8)])
def test_a_folder_is_the_data_set_with_a_recipe_for_small_images(num_images: int, epochs: int, tmp_path: Path) -> None:
    for number in range(num_images):
        path = tmp_path / "photos" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run, line = resolved(str(tmp_path / "photos"))
    dataset = f"folder:{tmp_path}/photos"
    assert run == TrainConfig(recipe="cifar10-small", dataset=dataset, image_size=64, epochs=epochs)
    assert line == (
        f"{dataset}: recipe cifar10-small, {epochs} epochs, images of 64 x 64 pixels "
        "(--recipe, --epochs and --image-size choose others)"
    )


def test_options_override_the_choice_for_a_folder(tmp_path: Path) -> None:
    run, _ = resolved(str(tmp_path), "--recipe=mnist", "--image-size", "28")
    assert run == TrainConfig(recipe="mnist", dataset=f"folder:{tmp_path}", image_size=28)


def test_a_recipe_wins_over_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnist").mkdir()
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
    )
    assert parse(TrainConfig, list(as_arguments(run)), prog="") == run
    assert list(as_arguments(TrainConfig())) == []


def test_several_ranks_train_and_exit_with_a_ranks_code(data_dir: Path, tmp_path: Path) -> None:
    """Without torchrun's warning of OMP_NUM_THREADS, and without torchrun's own exit code, 1."""
    options = ["--nproc", "2", "--dataset", "mnist-mini", "--data-dir", str(data_dir), "--device", "cpu", "--no-export"]
    command = [sys.executable, "-m", "convoy", "train", "mnist", *options, "--lr-scale", "1e30"]
    environment = {name: value for name, value in clean_environment().items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, "OMP_NUM_THREADS" in done.stderr) == (5, False), done.stderr
    assert done.stdout.startswith("mnist on mnist-mini: 10 classes")
    assert "2 ranks on cpu" in done.stdout
