"""What the service tells of a training's options, beside what the training's own parser says of them."""

import subprocess
import sys

import pytest

from trainer.errors import ConfigError
from trainer.service.options import MAX_SHOWN, check_options
from trainer.service.submission import read_training


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--epochz 3", "no option '--epochz': did you mean --epochs"),
        ("--no-epochs", "no option '--no-epochs'"),
        ("--epochs x", "--epochs x: must be a whole number"),
        ("--epochs", "--epochs needs a whole number"),
        ("--lr-scale --seed 1", "--lr-scale needs a number"),
        ("--epochs=0", "--epochs 0: must be at least 1"),
        ("--global_batch_size 1.5", "--global-batch-size 1.5: must be a whole number"),
        ("--precision float16", "--precision float16: must be float32 or tf32 or bfloat16"),
        ("--scale 1", "--scale 1: must be 0 to 0.9"),
        ("--recipe minst", "no recipe 'minst': did you mean mnist"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_options(line.split())
    assert str(caught.value).startswith(message)
    with pytest.raises(ConfigError):
        read_training(line.split())


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--epochs x --epochs 3 --seed=7",
        "--no-export --compile --mirror --no-allow-shared-gpu",
        "--set augment.shift=2 clip_norm=.5 --log-to wandb mlflow --name 5 --lr-scale .5",
        "--shift None --data-dir /nowhere --image-size 32 --dataset folder:/nowhere --rotate-degrees 1e1",
    ],
)
def test_what_a_training_reads_is_accepted(line: str) -> None:
    check_options(line.split())
    read_training(line.split())


def test_files_are_left_to_the_training() -> None:
    for line in ("--recipe gone.py:recipe", "--recipe gone/run.toml", "--network gone.py:Net --weights gone.pth"):
        check_options(line.split())


def test_a_huge_name_or_value_is_cut() -> None:
    for arguments in (["--" + "a\n" * 500_000], ["--epochs", "x\n" * 500_000], ["--recipe", "r" * 1_000_000]):
        with pytest.raises(ConfigError) as caught:
            check_options(arguments)
        assert len(str(caught.value)) < MAX_SHOWN + 200
        assert "\n" not in str(caught.value)


def test_the_check_imports_no_torch() -> None:
    code = "import sys; from trainer.service.options import check_options as c; c(['--epochs', '3'])"
    code += "; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
