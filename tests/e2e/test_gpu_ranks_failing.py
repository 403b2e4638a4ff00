"""Several ranks over NCCL: one that is killed, stands still or diverges is named, and all end."""

import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.e2e.gpu_ranks import FEW, ON_A_GPU, Command, at_once, complete, started_for
from tests.e2e.test_training import ranks_of, wait_for_line

pytestmark = [pytest.mark.gpu, *ON_A_GPU]

FAILS_ON_RANK_1 = """
import os
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(28 * 28, num_classes)
        self.num_calls = 0

    def forward(self, images):
        logits = self.head(images.flatten(1))
        if self.training and os.environ["RANK"] == "1":
            self.num_calls += 1
            if self.num_calls > 5:
                return logits * float("nan")
        return logits
"""


def test_a_rank_that_is_killed_or_stopped_is_named_and_all_exit(tmp_path: Path, gpu_command: Command) -> None:
    options = ("--recipe", "mnist", "--epochs", "100000", *FEW)
    signals = (signal.SIGKILL, signal.SIGSTOP)
    folders = [tmp_path / number.name for number in signals]
    commands = [gpu_command(*options, "--run-dir", str(folder), ranks=2) for folder in folders]
    at_once(*(partial(loses_a_rank, *each) for each in zip(commands, folders, signals, strict=True)))


def loses_a_rank(command: list[str], folder: Path, number: signal.Signals) -> None:
    """Starts a training of two ranks and sends a signal to rank 1."""
    with started_for(120, command) as process:
        wait_for_line(process, "epoch 3/100000")
        pids = ranks_of(process)
        os.kill(pids[1], number)
        began = time.monotonic()
        line = wait_for_line(process, "^error: ")
        named_s = time.monotonic() - began
        assert process.wait(timeout=60) != 0
        wait_for("end of all ranks", lambda: ended(pids))
        assert time.monotonic() - began < 30
    assert f"(process {pids[1]} on " in line
    assert named_s < 12
    record = json.loads((folder / "failure.json").read_text())
    assert len(record["ranks"]) == 1


def ended(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_loss_that_is_not_a_number_on_one_rank_ends_all(tmp_path: Path, gpu_command: Command) -> None:
    (tmp_path / "net.py").write_text(FAILS_ON_RANK_1)
    network = ("--recipe", "any-network", "--network", f"{tmp_path / 'net.py'}:Net", "--global-batch-size", "100")
    done = complete(gpu_command(*network, "--epochs", "1", "--run-dir", str(tmp_path / "run"), ranks=2))
    assert done.returncode != 0, done.stdout
    (error,) = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert re.search(r"training diverged: the loss is nan at step \d+", error)
    assert not (tmp_path / "run" / "result.json").exists()
