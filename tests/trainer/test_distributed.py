"""What ranks say to each other, in real processes under torchrun."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, clean_environment
from trainer.distributed import Agreement, World
from trainer.errors import ConfigError

PROLOGUE = """
import json, os, sys, time
import torch
from torch import nn
from trainer.cli import run_command
from trainer.distributed import Agreement, World
from trainer.errors import DataError

def tell(value):
    sys.stdout.write("TOLD " + json.dumps(value) + "\\n")
    sys.stdout.flush()

def main():
    with World.join("cpu") as world:
        body(world)

"""


def run_ranks(body: str, ranks: int, tmp_path: Path) -> "subprocess.CompletedProcess[str]":
    """Run `def body(world)` on that many ranks."""
    script = tmp_path / "script.py"
    script.write_text(PROLOGUE + body + "\nrun_command(main)\n")
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(script)],
        env={**clean_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def told(done: "subprocess.CompletedProcess[str]") -> list[object]:
    return [json.loads(line.removeprefix("TOLD ")) for line in re.findall("TOLD .*", done.stdout)]


@pytest.mark.slow
def test_sums_wishes_and_statistics_are_shared(tmp_path: Path) -> None:
    body = """
def body(world):
    ints = world.sum(torch.tensor([world.rank + 1, 2**53 + world.rank]))
    largest = world.max(world.rank * 10)
    main = world.from_main({"rank": world.rank})
    agreement = Agreement(world)
    wishes = [(world.rank == 1 and step == 2, world.rank == 0 and step == 1) for step in range(5)]
    granted = [agreement.ask(stop=stop, save=save) for stop, save in wishes]
    agreement.close()
    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(float(world.rank))
    norm.running_var.fill_(2.0)
    world.merge_batch_norm(nn.Sequential(norm))
    merged = [norm.running_mean.item(), norm.running_var.item()]
    tell([world.rank, ints.tolist(), largest, main, granted, merged, torch.get_num_threads()])
"""
    done = run_ranks(body, 2, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = sorted(told(done), key=str)
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert first[1:] == second[1:]
    ints, largest, main, granted, merged, num_threads = first[1:]
    assert ints == [3, 2**54 + 1]
    assert largest == 10
    assert main == {"rank": 0}
    # What was wished at a step is granted to all at the next one.
    assert granted == [[False, False], [False, False], [False, True], [True, False], [False, False]]
    # Two halves with means 0 and 1 and variance 2 have, together, mean 1/2 and variance 2 + 1/4.
    assert merged == [0.5, 2.25]
    assert num_threads >= 1


@pytest.mark.slow
def test_the_first_rank_to_fail_is_the_one_that_speaks(tmp_path: Path) -> None:
    body = """
def body(world):
    if world.rank == 2:
        time.sleep(0.3)
        raise DataError("rank 2 has a damaged disk")
    world.sum(torch.zeros(1))
"""
    done = run_ranks(body, 3, tmp_path)
    assert done.returncode == 1
    assert re.findall("^error: .*", done.stderr, re.MULTILINE) == ["error: rank 2 has a damaged disk"]


@pytest.mark.slow
def test_the_same_mistake_on_all_ranks_is_said_once(tmp_path: Path) -> None:
    done = run_ranks('def body(world):\n    raise DataError("no such thing")\n', 3, tmp_path)
    assert re.findall("^error: .*", done.stderr, re.MULTILINE) == ["error: no such thing"]


@pytest.mark.slow
def test_a_defect_on_one_rank_shows_its_traceback_and_no_other(tmp_path: Path) -> None:
    body = """
def body(world):
    if world.rank == 1:
        raise ZeroDivisionError("a defect")
    world.sum(torch.zeros(1))
"""
    done = run_ranks(body, 2, tmp_path)
    assert done.returncode == 1
    before_torchruns_summary = done.stderr.partition("torch/distributed/elastic")[0]
    assert before_torchruns_summary.count("ZeroDivisionError: a defect") == 1
    assert "Connection closed by peer" not in before_torchruns_summary


def test_alone_nothing_waits() -> None:
    with World.join("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.sum(torch.tensor(3)).item() == 3
        assert world.from_main("x") == "x"
        assert Agreement(world).ask(stop=True, save=False) == (True, False)
        model = torch.nn.Linear(1, 1)
        assert world.wrap(model) is model
        assert not torch.distributed.is_initialized()


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="this host has 2 GPUs: use at most 2"), World.join("auto"):
        pass


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="no CUDA device"), World.join("cuda"):
        pass


@pytest.mark.slow
def test_the_main_rank_may_work_alone_for_longer_than_a_collective_waits(tmp_path: Path) -> None:
    body = """
import datetime, trainer.distributed
trainer.distributed.TIMEOUT = datetime.timedelta(seconds=1)

def body(world):
    world.wait_for_all()
    if world.is_main:
        time.sleep(2.5)
    world.wait_for_main(lambda: False)
    tell(world.rank)
"""
    done = run_ranks(body, 2, tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(told(done), key=str) == [0, 1]


@pytest.mark.slow
def test_who_waits_for_the_main_rank_leaves_with_it(tmp_path: Path) -> None:
    body = """
def body(world):
    if world.is_main:
        raise DataError("the main rank's disk is full")
    world.wait_for_main(lambda: False)
    tell("not reached")
"""
    done = run_ranks(body, 2, tmp_path)
    assert done.returncode == 1
    assert re.findall("^error: .*", done.stderr, re.MULTILINE) == ["error: the main rank's disk is full"]
    assert told(done) == []
