"""Trainings of several ranks that share the first GPU, each a host of its own for NCCL (`--allow-shared-gpu`).

Times mean nothing here, as the ranks' kernels take turns. Most of a short training is its start, so that tests start
several at the same time. Needs no network, and no package but those of training.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from tests.conftest import ROOT, clean_environment
from tests.e2e.test_training import ranks_of, started

Result = TypeVar("Result")
Completed = "subprocess.CompletedProcess[str]"
Command = Callable[..., list[str]]

ON_A_GPU = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("one_gpu"),
]
SHARED = ("--device", "cuda", "--allow-shared-gpu")
FEW = ("--num-validation", "3000")
"""Of the 5,000 images of `mnist-mini`: 2,000 are trained on."""
PLAIN = ("--recipe", "mnist", "--epochs", "2", "--precision", "float32", "--lr-scale", "0.3", *FEW)
"""At the recipe's own rate, rounding grows to 5 % of the loss in these 40 steps; at this one, to 0.2 %."""
# Batch norm, Muon, AdamW, clipping, an average, two sizes of images; the last batch of an epoch has 20 of 70 images.
EVERYTHING = (
    *("--recipe", "mnist-fast", "--global-batch-size", "70", "--epochs", "2", "--precision", "float32"),
    *("--num-validation", "3580", "--set", "param_groups.vectors.optimizer=adamw", "param_groups.vectors.lr=0.002"),
    *("clip_norm=2", "ema_decay=0.9", "resolutions=[[0.5, 24]]"),
)
SHARDED = (*EVERYTHING, "--virtual-shards", "4", "--save-every-steps", "10")


def first_gpu() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def complete(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Runs a command to its end, and prints what all its ranks print: pytest shows that if the test fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=140, check=False
        )
    except subprocess.TimeoutExpired as error:
        show(command, *(part.decode() for part in (error.stdout, error.stderr) if isinstance(part, bytes)))
        raise
    show(command, done.stdout, done.stderr)
    return done


def show(command: Sequence[str], *printed: str) -> None:
    """Prints a command with its output, as one text: commands that run at the same time print in turn."""
    sys.stdout.write("\n".join([f"$ {' '.join(command)}", *printed, ""]))


def trained(command: Sequence[str], *, may_be_eager: bool = False) -> str:
    """Runs a training to its end, with a CUDA graph, and returns what it prints."""
    done = complete(command)
    assert done.returncode == 0, done.stderr
    assert may_be_eager or "no CUDA graph" not in done.stdout
    return done.stdout


@contextmanager
def started_for(seconds: float, command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """Starts a command as `started` does, and kills it with its ranks after a while: nobody may wait for ever.

    Prints what is left of the output at the end; `wait_for_line` has printed the rest.
    """
    with started(command) as process:
        timer = threading.Timer(seconds, kill_all, [process])
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            kill_all(process)
            assert process.stdout is not None
            show(command, process.stdout.read())


def kill_all(launcher: "subprocess.Popen[str]") -> None:
    """Kills a launcher and its ranks, which have sessions of their own."""
    ranks = ranks_of(launcher)
    launcher.kill()
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()


def at_once(*functions: Callable[[], Result]) -> list[Result]:
    """Calls functions at the same time, each in a thread, and returns their results."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(function) for function in functions]]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train_loss"] for line in lines if line["kind"] == "epoch"]
