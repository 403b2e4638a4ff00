"""Bits that neither the number of ranks nor any fault changes. `benchmarks/faults.py` does the same a hundred times."""

import functools
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.test_training import ranks_of, result_of, started, wait_for_line

pytestmark = pytest.mark.slow

# Batch norm, Muon, augmentation; 4,500 images make 64 batches of 70 and one of 20: neither is a multiple of 4 shards.
OPTIONS = ("--recipe", "mnist-fast", "--global-batch-size", "70", "--epochs", "1", "--virtual-shards", "4")
OFTEN = ("--save-every-steps", "5")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, run_trainer: Callable[..., object]) -> str:
    """The digest of the undisturbed run on one rank."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    run_trainer(*OPTIONS, "--run-dir", str(folder))
    return str(result_of(folder)["weights_sha256"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_number_of_ranks_gives_the_same_bits(
    ranks: int, tmp_path: Path, reference: str, run_trainer: Callable[..., object]
) -> None:
    run_trainer(*OPTIONS, "--run-dir", str(tmp_path / "run"), ranks=ranks)
    result = result_of(tmp_path / "run")
    assert (result["world_size"], result["virtual_shards"]) == (ranks, 4)
    assert result["weights_sha256"] == reference


def test_after_a_kill_another_number_of_ranks_gives_the_same_bits(
    tmp_path: Path, reference: str, trainer_command: Callable[..., list[str]], run_trainer: Callable[..., object]
) -> None:
    arguments = (*OPTIONS, *OFTEN, "--run-dir", str(tmp_path / "run"))
    with started(trainer_command(*arguments, ranks=2)) as process:
        wait_for_line(process, "2 ranks on cpu")
        while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "run" / "result.json").exists()
    run_trainer(*arguments)
    assert result_of(tmp_path / "run")["weights_sha256"] == reference


def test_torchrun_starts_the_ranks_again_when_one_is_killed(
    tmp_path: Path, reference: str, trainer_command: Callable[..., list[str]]
) -> None:
    command = trainer_command(*OPTIONS, *OFTEN, "--run-dir", str(tmp_path / "run"), ranks=2)
    command.insert(command.index("--standalone"), "--max-restarts=2")
    with started(command) as process:
        wait_for_line(process, "2 ranks on cpu")
        while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
            assert process.poll() is None
        os.kill(random.choice(ranks_of(process)), signal.SIGKILL)
        wait_for_line(process, r"at step \d+ of 65, saved")
        assert process.stdout is not None
        process.stdout.read()
        assert process.wait() == 0
    record = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert record["error"] == "LostRank"
    assert re.search(r"rank \d \(process \d+ on .*\), which was killed", record["message"])
    assert result_of(tmp_path / "run")["weights_sha256"] == reference


def test_a_rank_that_is_stopped_in_mid_training_is_named(
    tmp_path: Path, trainer_command: Callable[..., list[str]]
) -> None:
    options = ("--epochs", "1000", "--precision", "float32", "--run-dir", str(tmp_path / "run"))
    with started(trainer_command(*options, ranks=2)) as process:
        wait_for_line(process, "epoch 3/1000")
        stopped, other = ranks_of(process)
        os.kill(stopped, signal.SIGSTOP)
        stopped_at = time.monotonic()
        line = wait_for_line(process, "^error: ")
        assert time.monotonic() - stopped_at < 10
        assert process.wait(timeout=60) != 0
        assert not Path(f"/proc/{other}").exists()
        assert not Path(f"/proc/{stopped}").exists()
    assert re.search(rf"rank \d \(process {stopped} on .*\) (gave no sign of life|has not come)", line)
    assert len(json.loads((tmp_path / "run" / "failure.json").read_text())["ranks"]) == 1


@pytest.fixture(scope="module")
def eight_shards(tmp_path_factory: pytest.TempPathFactory, run_trainer: Callable[..., object]) -> Callable[[int], str]:
    """The digest of a run of eight shards, by its number of ranks."""

    @functools.cache
    def digest(ranks: int) -> str:
        folder = tmp_path_factory.mktemp("eight") / "run"
        options = ("--recipe", "mnist-fast", "--epochs", "1", "--global-batch-size", "500", "--virtual-shards", "8")
        run_trainer(*options, "--run-dir", str(folder), ranks=ranks)
        return str(result_of(folder)["weights_sha256"])

    return digest


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_eight_shards_give_the_same_bits_on_up_to_eight_ranks(ranks: int, eight_shards: Callable[[int], str]) -> None:
    assert eight_shards(ranks) == eight_shards(1)
