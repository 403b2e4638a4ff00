"""Files of options: they are read, the command line wins, and a run's own trains the same again."""

import json
from pathlib import Path

import pytest

from trainer.cli import parse
from trainer.config import _DECIDE_NO_RESULT, CHANGE_RECIPE, TrainConfig
from trainer.config_file import CommandLine, write_config_file
from trainer.errors import ConfigError
from trainer.train import train

FILE = """
recipe = "mnist-fast"
epochs = 5
virtual-shards = 4
log_to = ["mlflow"]
[set]
augment.shift = 1
label_smoothing = 0.2
widths = [8, 8, 8, 8]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "options.toml"
    path.write_text(FILE)
    return path


def options(*arguments: str) -> TrainConfig:
    line = CommandLine.read(arguments)
    return line.combine(parse(TrainConfig, line.arguments, prog="convoy train", default=line.default))


def test_a_file_has_the_options_of_the_command_line(file: Path) -> None:
    found = options("--config", str(file))
    values = ("augment.shift=1", "label_smoothing=0.2", "widths=[8, 8, 8, 8]")
    expected = TrainConfig(recipe="mnist-fast", epochs=5, virtual_shards=4, log_to=("mlflow",), set=values)
    assert found == expected == options(f"--config={file}")
    assert found.resolve().widths == (8, 8, 8, 8)


def test_the_command_line_wins(file: Path) -> None:
    """An option takes the place of the file's value for the same field, and the other way round."""
    found = options(
        "--config", str(file), "--shift", "3", "--set", "epochs=7", "label_smoothing=0.1", "--log-to", "wandb"
    )
    assert (found.shift, found.epochs, found.log_to) == (3, None, ("wandb",))
    assert found.set == ("label_smoothing=0.1", "widths=[8, 8, 8, 8]", "epochs=7")
    recipe = found.resolve()
    assert (recipe.augment.shift, recipe.epochs, recipe.label_smoothing) == (3, 7, 0.1)


def test_values_may_be_given_several_times_and_before_other_arguments() -> None:
    found = CommandLine.read(["--set", "a=1", "b=2", "photos", "--log-to", "wandb", "--seed", "3", "--set=a=4", "c=5"])
    assert found.arguments == ["photos", "--seed", "3", "--set", "a=1", "b=2", "a=4", "c=5", "--log-to", "wandb"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch = 5", "no option 'epoch': did you mean epochs"),
        ("epochs = '5'", 'epochs = "5": must be a whole number'),
        ("export = 1", "export = 1: must be true or false"),
        ("log-to = ['stdout']", "log-to = .*must be"),
        ("epochs = ", "is not a TOML file: Invalid value"),
        ("config = 'x'", "no option 'config'"),
        ("a = " + "[" * 5000, "is not a TOML file"),
    ],
)
def test_a_faulty_file_is_one_line(content: str, message: str, file: Path) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        options("--config", str(file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "3", "--set", "epochs=4"], "--epochs 3 and --set epochs=4: give one"),
        (["--no-mirror", "--set", "augment.flip=none"], "--no-mirror and --set augment.flip=none: give one"),
        (["--set", "lr_scale=2"], "--set lr_scale=2: this is an option, --lr-scale 2"),
        (["--set", "seed=2"], "--set seed=2: this is an option, --seed 2"),
        (["--set", "--seed", "3"], "--set: write FIELD=VALUE"),
        (["--config", "/nowhere/run.toml"], "cannot read /nowhere/run.toml: No such file or directory"),
        (["--name", "my model"], "--name my model: a model name consists of letters"),
    ],
)
def test_contradictions_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options(*arguments).resolve()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(recipe="mnist-fast"),
        TrainConfig(recipe="cifar10-small", seed=3, epochs=2, global_batch_size=100, lr_scale=0.3, image_size=32),
        TrainConfig(set=("augment.mixup=0.2", "schedule.kind=cosine"), virtual_shards=4, name="mine", mirror=True),
    ],
)
def test_what_a_run_writes_gives_the_same_run(config: TrainConfig, tmp_path: Path) -> None:
    path, recipe = tmp_path / "run.toml", config.resolve()
    write_config_file(path, config, recipe)
    found = options("--config", str(path))
    assert found.resolve() == recipe
    kept = ("seed", "image_size", "virtual_shards", "name")
    assert [getattr(found, name) for name in kept] == [getattr(config, name) for name in kept]


def test_a_network_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    net, path = tmp_path / "net.py", tmp_path / "run.toml"
    net.write_text("class MyNet: ...\n")
    config = TrainConfig(network=f"{net}:MyNet")
    write_config_file(path, config, config.resolve())
    net.write_text("class MyNet: ...  # better\n")
    with pytest.raises(ConfigError, match=r"net\.py:MyNet has changed since .*run\.toml was written"):
        options("--config", str(path)).resolve()
    assert options("--config", str(path), "--network", f"{net}:MyNet").resolve() == config.resolve()


def test_every_option_has_its_place() -> None:
    """An option changes the recipe, decides no result, or is written to run.toml under its own name."""
    others = {"recipe", "image_size", "seed", "virtual_shards"}
    known = CHANGE_RECIPE | _DECIDE_NO_RESULT | others
    assert {name for name in TrainConfig.__dataclass_fields__ if name not in known} <= WRITTEN_TOO


WRITTEN_TOO = {"compile", "grad_accumulation", "gradient_reduction", "source", "skip_bad_images"}
"""Options of other parts, which decide the result and are no field of the recipe."""


def test_a_runs_own_file_trains_the_same_weights(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--set", "augment.shift=1", "widths=8,8,8,8", "global_batch_size=500", "--epochs=1", "--seed=5"]
    where = ["--data-dir", str(data_dir), "--device=cpu", "--no-export"]
    train(options("--recipe", "mnist-fast", "--dataset=mnist-mini", *changes, *where, "--run-dir", f"{tmp_path}/first"))
    assert "500 images per step (the recipe: 250; learning rates are scaled by 1.41)" in capsys.readouterr().out
    train(options("--config", f"{tmp_path}/first/run.toml", "--run-dir", f"{tmp_path}/second"))
    first, second = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("first", "second"))
    assert first["weights_sha256"] == second["weights_sha256"]
