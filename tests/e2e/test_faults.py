"""Neither the number of ranks nor any fault changes the weights. `benchmarks/faults.py` injects a hundred faults."""

import functools
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, clean_environment, free_port
from tests.e2e.test_training import ranks_of, result_of, started, wait_for_line
from tests.interpreter import Interpreter

pytestmark = pytest.mark.slow

# Batch norm, Muon, augmentation; 4,500 images make 64 batches of 70 and one of 20: 4 shards divide neither evenly. The
# fields that are set have a state of their own, or draw samples in another way.
OPTIONS = (
    *("--recipe", "mnist-fast", "--global-batch-size", "70", "--epochs", "1", "--virtual-shards", "4", "--set"),
    *("param_groups.vectors.optimizer=adamw", "param_groups.vectors.lr=0.002", "clip_norm=2", "ema_decay=0.9"),
    *("balanced_sampling=true", "keep_best=true"),
)
OFTEN = ("--save-every-steps", "5")


DIFFERING_RANK = """
import os, sys
import torch, trainer.hardware
from trainer.cli import train_command
from trainer.loop.fit import TrainingLoop

is_different = os.environ["RANK"] == "2"
flags = {"hardware": "fpu" if is_different else "fpu amx_bf16"}.get(sys.argv[1], "fpu")
trainer.hardware._cpuinfo = lambda field: flags
if sys.argv[1] == "settings" and is_different:
    sys.argv += ["--seed", "7"]
if sys.argv[1] == "weights" and is_different:
    save_or_stop = TrainingLoop.save_or_stop

    def flip(loop):
        save_or_stop(loop)
        if loop._run.state.step == 20:
            next(loop._run.learner.model.parameters()).detach().view(torch.int32)[0, 0, 0, 0] ^= 1 << 12

    TrainingLoop.save_or_stop = flip
train_command(sys.argv[2:])
"""
"""The trainer, whose last of three ranks differs from the others."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, run_trainer: Callable[..., object]) -> str:
    """Returns the digest of the weights of the undisturbed run on one rank."""
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


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("settings", "MismatchError", "--seed differs between ranks: rank 2 has 7, the others 0;"),
        (
            "hardware",
            "MismatchError",
            "as the hardware has it, differs between ranks: rank 2 has float32, the others bf",
        ),
        ("weights", "DesyncError", "the ranks' weights differ at step 45: rank 2 differs from the others;"),
    ],
)
def test_a_rank_that_differs_from_the_others_is_named_on_the_terminal_and_on_disk(
    what: str,
    kind: str,
    message: str,
    tmp_path: Path,
    trainer_command: Callable[..., list[str]],
    interpreter: Interpreter,
) -> None:
    script, folder = tmp_path / "differing_rank.py", tmp_path / "run"
    script.write_text(DIFFERING_RANK)
    _, *command = trainer_command("--epochs", "2", "--run-dir", str(folder), ranks=3)
    main = command.index(str(ROOT / "trainer" / "main.py"))
    command[main : main + 1] = [str(script), what]
    done = interpreter.run(command, env={**clean_environment(), "PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    (error,) = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert message in error
    record = json.loads((folder / "failure.json").read_text())
    assert (record["error"], record["ranks"], f"error: {record['message']}") == (kind, [2], error)
    assert (folder / "config.json").exists() is (what == "weights")  # else the run has not begun


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


def test_torchrun_restarts_the_ranks_when_one_is_killed(
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


def test_a_rank_that_is_stopped_during_training_is_named(
    tmp_path: Path, trainer_command: Callable[..., list[str]]
) -> None:
    """Also if the others wait for it in the backward pass, as they do with DDP."""
    options = ["--epochs", "1000", "--precision", "float32", "--gradient-reduction", "ddp"]
    options += ["--run-dir", str(tmp_path / "run")]
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
    assert re.search(rf"rank \d \(process {stopped} on .*\) (sent no heartbeat|has not joined)", line)
    assert len(json.loads((tmp_path / "run" / "failure.json").read_text())["ranks"]) == 1


@pytest.mark.minutes
def test_a_rank_killed_on_the_host_of_the_store_is_named_by_the_other_host(tmp_path: Path, data_dir: Path) -> None:
    """Its launcher ends, and with it the store and the other rank there: the second host must blame none of its own."""
    folder, port = tmp_path / "run", free_port()
    options = ["--dataset", "mnist-mini", "--data-dir", str(data_dir), "--device", "cpu", "--no-export"]
    options += ["--epochs", "1000", "--run-dir", str(folder)]
    hosts = ["--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    commands = [
        [sys.executable, "-m", "trainer.launch", *hosts, f"--node-rank={host}", "trainer/main.py", *options]
        for host in range(2)
    ]
    with started(commands[0]) as first, started(commands[1]) as second:
        wait_for_line(first, "epoch 3/1000")
        killed = ranks_of(first)[1]
        os.kill(killed, signal.SIGKILL)
        outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    print(*outputs)
    assert (first.returncode, second.returncode) == (128 + signal.SIGKILL, 1)
    [error] = re.findall(r"^error: .*", "".join(outputs), re.MULTILINE)
    assert f"lost another rank: rank 1 (process {killed} on" in error
    assert json.loads((folder / "failure.json").read_text())["ranks"] == [1]


@pytest.fixture(scope="module")
def eight_shards(tmp_path_factory: pytest.TempPathFactory, run_trainer: Callable[..., object]) -> Callable[[int], str]:
    """Returns a function from a number of ranks to the digest of the weights of their run with eight shards."""

    @functools.cache
    def digest(ranks: int) -> str:
        folder = tmp_path_factory.mktemp("eight") / "run"
        options = ("--recipe", "mnist-fast", "--epochs", "1", "--global-batch-size", "500", "--virtual-shards", "8")
        run_trainer(*options, "--run-dir", str(folder), ranks=ranks)
        return str(result_of(folder)["weights_sha256"])

    return digest


@pytest.mark.minutes
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_eight_shards_give_the_same_bits_on_up_to_eight_ranks(ranks: int, eight_shards: Callable[[int], str]) -> None:
    assert eight_shards(ranks) == eight_shards(1)
