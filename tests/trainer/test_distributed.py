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
from trainer.cli import run_command
from trainer.distributed import Agreement, World
from trainer.errors import DataError

def tell(value):
    sys.stdout.write("TOLD " + json.dumps(value) + "\\n")
    sys.stdout.flush()

def main():
    with World.join(JOIN) as world:
        body(world)

"""


def run_ranks(body: str, ranks: int, tmp_path: Path, *, join: str = '"cpu"') -> "subprocess.CompletedProcess[str]":
    """Run `def body(world)` on that many ranks; `join` are the arguments of `World.join`."""
    script = tmp_path / "script.py"
    script.write_text(PROLOGUE.replace("JOIN", join) + body + "\nrun_command(main)\n")
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
def test_sums_wishes_and_tensors_are_shared(tmp_path: Path) -> None:
    body = """
def body(world):
    ints = world.sum(torch.tensor([world.rank + 1, 2**53 + world.rank]))
    largest = world.max(world.rank * 10)
    main = world.from_main({"rank": world.rank})
    agreement = Agreement(world)
    wishes = [(world.rank == 1 and step == 2, world.rank == 0 and step == 1) for step in range(5)]
    granted = [agreement.ask(stop=stop, save=save) for stop, save in wishes]
    agreement.close()
    copied = [torch.full((2,), float(world.rank + 7))]
    world.copy_from_main(copied)
    added = world.add_up(torch.tensor([float(world.rank + 1), 0.5]))
    told = [granted, copied[0].tolist(), added.tolist(), torch.get_num_threads()]
    tell([world.rank, ints.tolist(), largest, main, *told])
"""
    done = run_ranks(body, 2, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = sorted(told(done), key=str)
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert first[1:] == second[1:]
    ints, largest, main, granted, copied, added, num_threads = first[1:]
    assert ints == [3, 2**54 + 1]
    assert largest == 10
    assert main == {"rank": 0}
    # What was wished at a step is granted to all at the next one.
    assert granted == [[False, False], [False, False], [False, True], [True, False], [False, False]]
    assert copied == [7.0, 7.0]
    assert added == [3.0, 1.0]
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


@pytest.mark.slow
def test_under_virtual_shards_the_ranks_vectors_are_added_in_pairs(tmp_path: Path) -> None:
    """1e8 + 1 is 1e8 in float32, so that any other order than (a + b) + (c + d) gives another sum."""
    body = """
def body(world):
    tell([world.rank, world.add_up(torch.tensor([[1e8, 1.0, -1e8, 1.0][world.rank]])).item()])
"""
    done = run_ranks(body, 4, tmp_path, join='"cpu", 4')
    assert done.returncode == 0, done.stderr
    one = torch.tensor([1e8, 1.0, -1e8, 1.0])
    expected = ((one[0] + one[1]) + (one[2] + one[3])).item()
    assert sorted(told(done), key=str) == [[rank, expected] for rank in range(4)]
    assert expected != ((one[0] + one[2]) + (one[1] + one[3])).item()


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_shards_are_refused_once(tmp_path: Path) -> None:
    done = run_ranks("def body(world):\n    pass\n", 3, tmp_path, join='"cpu", 4')
    assert re.findall("^error: .*", done.stderr, re.MULTILINE) == [
        "error: --virtual-shards 4 with 3 ranks: the number of ranks must divide it, so start 1, 2, 4, … up to 4 ranks"
    ]


def test_alone_nothing_waits() -> None:
    with World.join("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.sum(torch.tensor(3)).item() == 3
        assert world.from_main("x") == "x"
        assert Agreement(world).ask(stop=True, save=False) == (True, False)
        assert world.add_up(torch.ones(2)).tolist() == [1, 1]
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
