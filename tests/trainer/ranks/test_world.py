"""Collectives and failures of ranks, in real processes under torchrun."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.conftest import ROOT, clean_environment
from tests.interpreter import Interpreter
from trainer.errors import ConfigError
from trainer.ranks.stop import StopConsensus
from trainer.ranks.world import World

RunRanks = Callable[..., "subprocess.CompletedProcess[str]"]
ENVIRONMENT = {**clean_environment(), "PYTHONPATH": str(ROOT)}
PROLOGUE = """
import dataclasses, json, os, sys, time
from trainer.cli import run_command
import torch
from trainer.ranks.stop import StopConsensus
from trainer.ranks.world import World
from trainer.errors import DataError

def show(value):
    sys.stdout.write("VALUE " + json.dumps(value) + "\\n")
    sys.stdout.flush()

def main():
    with World.join(JOIN) as world:
        body(world)

"""


def command_of(body: str, ranks: int, folder: Path, *, join: str, torchrun: tuple[str, ...] = ()) -> list[str]:
    """Python's arguments for `def body(world)` on that many ranks; `join` are the arguments of `World.join`."""
    script = folder / "script.py"
    script.write_text(PROLOGUE.replace("JOIN", join) + body + "\nrun_command(main)\n")
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *torchrun, str(script)]


@contextmanager
def start_ranks(body: str, ranks: int, tmp_path: Path, *, join: str) -> "Iterator[subprocess.Popen[str]]":
    """Starts `def body(world)` on that many ranks."""
    with subprocess.Popen(
        [sys.executable, *command_of(body, ranks, tmp_path, join=join)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # its ranks notice that


@pytest.fixture
def run_ranks(tmp_path: Path, interpreter: Interpreter) -> RunRanks:
    """A function that runs `def body(world)` on that many ranks to their end."""

    def run(
        body: str, ranks: int, *, join: str = '"cpu"', torchrun: tuple[str, ...] = ()
    ) -> "subprocess.CompletedProcess[str]":
        command = command_of(body, ranks, tmp_path, join=join, torchrun=torchrun)
        return interpreter.run(command, env=ENVIRONMENT, timeout_s=120)

    return run


def start_without_torchrun(body: str, tmp_path: Path, *, join: str = '"cpu"') -> "list[subprocess.Popen[str]]":
    """Starts `def body(world)` on two ranks, of which rank 0 serves the store."""
    script = tmp_path / "script.py"
    script.write_text(PROLOGUE.replace("JOIN", join) + body + "\nrun_command(main)\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", **address}
    return [
        subprocess.Popen(
            [sys.executable, str(script)], env={**environment, "RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]


def values_of(done: "subprocess.CompletedProcess[str]") -> list[object]:
    return [json.loads(line.removeprefix("VALUE ")) for line in re.findall("VALUE .*", done.stdout)]


def test_a_rank_that_waits_for_a_sum_on_its_gpu_is_known_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's call returns at once, so that a rank that hangs in an evaluation would be noticed after ten minutes."""
    world = World(rank=0, size=2, local_rank=0, device=torch.device("cpu"), num_threads=1)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)

    class OnGpu:
        def cpu(self) -> bool:
            return world.activity.waited_s is not None

    assert world.all_reduce_sum(OnGpu()) is True  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.slow
def test_collectives_give_every_rank_the_same(run_ranks: RunRanks) -> None:
    body = """
def body(world):
    ints = world.all_reduce_sum(torch.tensor([world.rank + 1, 2**53 + world.rank]))
    largest = world.all_reduce_max(world.rank * 10)
    main = world.broadcast_object({"rank": world.rank})
    agreed = []
    for reducer in (world, dataclasses.replace(world, shared_memory=None)):  # in shared memory, and through gloo
        consensus = StopConsensus(reducer)
        for step in range(5):
            assert reducer.all_reduce(torch.tensor([float(world.rank + 1), 0.5])).tolist() == [3.0, 1.0]
            agreed.append(consensus.poll(world.rank == 1 and step == 2))
        consensus.close()
    copied = [torch.full((2,), float(world.rank + 7))]
    world.broadcast(copied)
    ranks = [box.item() for box in world.all_gather(torch.tensor(world.rank))]
    gathered = [world.all_gather_object(f"rank {world.rank}"), ranks]
    results = [agreed, copied[0].tolist(), gathered, torch.get_num_threads()]
    show([world.rank, ints.tolist(), largest, main, *results])
"""
    done = run_ranks(body, 2)
    assert done.returncode == 0, done.stderr
    first, second = sorted(values_of(done), key=str)
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert first[1:] == second[1:]
    ints, largest, main, agreed, copied, gathered, num_threads = first[1:]
    assert ints == [3, 2**54 + 1]
    assert largest == 10
    assert main == {"rank": 0}
    # All ranks agree on a step's request at the next step.
    assert agreed == 2 * [False, False, False, True, False]
    assert copied == [7.0, 7.0]
    assert gathered == [["rank 0", "rank 1"], [0, 1]]
    assert num_threads >= 1


@pytest.mark.slow
def test_only_the_first_rank_to_fail_reports(run_ranks: RunRanks) -> None:
    body = """
def body(world):
    if world.rank == 2:
        time.sleep(0.3)
        raise DataError("rank 2 has a damaged disk")
    world.all_reduce_sum(torch.zeros(1))
"""
    done = run_ranks(body, 3)
    assert done.returncode == 1
    assert re.findall("^error: .*", done.stderr, re.MULTILINE) == ["error: rank 2 has a damaged disk"]


@pytest.mark.slow
def test_the_same_mistake_on_all_ranks_is_reported_once(run_ranks: RunRanks) -> None:
    done = run_ranks('def body(world):\n    raise DataError("no such thing")\n', 3)
    assert re.findall("^error: .*", done.stderr, re.MULTILINE) == ["error: no such thing"]


@pytest.mark.slow
def test_a_defect_on_one_rank_shows_its_traceback_and_no_other(run_ranks: RunRanks) -> None:
    body = """
def body(world):
    if world.rank == 1:
        raise ZeroDivisionError("a defect")
    world.all_reduce_sum(torch.zeros(1))
"""
    done = run_ranks(body, 2)
    assert done.returncode == 1
    before_torchruns_summary = done.stderr.partition("torch/distributed/elastic")[0]
    assert before_torchruns_summary.count("ZeroDivisionError: a defect") == 1
    assert "Connection closed by peer" not in before_torchruns_summary


@pytest.mark.slow
def test_under_virtual_shards_the_ranks_vectors_are_added_in_pairs(run_ranks: RunRanks) -> None:
    """1e8 + 1 is 1e8 in float32, so that any other order than (a + b) + (c + d) gives another sum."""
    body = """
def body(world):
    show([world.rank, world.all_reduce(torch.tensor([[1e8, 1.0, -1e8, 1.0][world.rank]])).item()])
"""
    done = run_ranks(body, 4, join='"cpu", 4')
    assert done.returncode == 0, done.stderr
    one = torch.tensor([1e8, 1.0, -1e8, 1.0])
    expected = ((one[0] + one[1]) + (one[2] + one[3])).item()
    assert sorted(values_of(done), key=str) == [[rank, expected] for rank in range(4)]
    assert expected != ((one[0] + one[2]) + (one[1] + one[3])).item()


@pytest.mark.slow
def test_in_an_elastic_run_an_extra_rank_is_a_spare(run_ranks: RunRanks) -> None:
    """Ranks 0 and 1 compute the shards; rank 2 adds nothing and ends with the same sum."""
    body = """
def body(world):
    share = share_of(100, world.rank, world.num_computing, world.num_shards)
    sums = torch.tensor([float(world.rank + 1) if world.rank < world.num_computing else 0.0])
    show([world.rank, list(share.sizes), world.all_reduce(sums).item()])
"""
    body = "from trainer.loop.shards import share_of\n" + body
    done = run_ranks(body, 3, join='"cpu", 4', torchrun=("--max-restarts=1",))
    assert done.returncode == 0, done.stderr
    assert sorted(values_of(done), key=str) == [[0, [25, 25], 3.0], [1, [25, 25], 3.0], [2, [0], 3.0]]


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_shards_are_refused_once(run_ranks: RunRanks) -> None:
    done = run_ranks("def body(world):\n    pass\n", 3, join='"cpu", 4')
    assert re.findall("^error: .*", done.stderr, re.MULTILINE) == [
        "error: --virtual-shards 4 with 3 ranks: the number of ranks must divide it, so start 1, 2, 4, … up to 4 ranks"
    ]


@pytest.mark.slow
def test_a_rank_that_hangs_reports_its_stack(run_ranks: RunRanks, tmp_path: Path) -> None:
    body = """
def body(world):
    world.failure_context.folder = pathlib.Path(FOLDER)
    world.activity.timeout_s = 1.0
    while True:
        if world.rank == 1:
            def sleep_for_long():
                time.sleep(1000)
            sleep_for_long()
        world.all_reduce_sum(torch.zeros(1))
"""
    began = time.monotonic()
    body = f"import pathlib\nFOLDER = {str(tmp_path)!r}\n" + body
    done = run_ranks(body, 2, join='"cpu", hang_timeout_s=1.0')
    assert done.returncode == 1
    assert time.monotonic() - began < 60
    errors = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert len(errors) == 1
    assert "error: rank 1 hangs: the others have waited" in errors[0]
    record = json.loads((tmp_path / "failure.json").read_text())
    assert (record["ranks"], record["error"], record["world_size"]) == ([1], "Hang", 2)
    assert "in sleep_for_long" in record["traceback"]


@pytest.mark.slow
def test_the_others_name_a_rank_that_is_stopped_without_torchrun_too(tmp_path: Path) -> None:
    body = """
def body(world):
    world.activity.timeout_s = 1.0
    world.all_reduce_sum(torch.zeros(1))
    time.sleep(2)
    if world.rank == 1:
        import signal
        os.kill(os.getpid(), signal.SIGSTOP)
    world.all_reduce_sum(torch.zeros(1))
"""
    main, stopped = start_without_torchrun(body, tmp_path, join='"cpu", hang_timeout_s=1.0')
    _, errors = main.communicate(timeout=100)
    assert re.match(r"error: rank 1 \(process \d+ on .*\) (sent no heartbeat|has not joined)", errors)
    assert errors.count("error:") == 1
    stopped.communicate(timeout=100)
    assert (main.returncode, stopped.returncode) == (1, -signal.SIGKILL)


@pytest.mark.slow
def test_an_idle_rank_that_should_compute_is_named_in_spite_of_a_long_timeout(run_ranks: RunRanks) -> None:
    """The timeout is long in a first step, for example, for ranks that use a processor."""
    body = """
def body(world):
    world.all_reduce_sum(torch.zeros(1))
    with world.activity.computing():
        if world.rank == 1:
            until = time.monotonic() + 4
            while time.monotonic() < until:
                sum(range(1000))
        world.all_reduce_sum(torch.zeros(1))
        show(time.time())
        if world.rank == 1:
            time.sleep(100)
        world.all_reduce_sum(torch.zeros(1))
"""
    done = run_ranks(body, 2, join='"cpu", hang_timeout_s=2.0')
    ended = time.time()
    (error,) = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert re.match(r"error: rank 1 hangs: the others have waited [2-4] s for it", error)
    assert ended - max(float(str(moment)) for moment in values_of(done)) < 20


@pytest.mark.slow
def test_a_rank_without_heartbeats_is_named_and_one_that_has_left_is_not(run_ranks: RunRanks) -> None:
    body = """
import signal
import trainer.ranks.detector

def body(world):
    trainer.ranks.detector.SILENT_AFTER_S = 3.0
    world.all_reduce_sum(torch.zeros(1))
    if world.rank == 2:
        return
    if world.rank == 1:
        time.sleep(5)
        show(time.time())
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(100)
"""
    done = run_ranks(body, 3)
    ended = time.time()
    (error,) = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert re.match(r"error: rank 1 \(process \d+ on .*\) sent no heartbeat for 3 s", error)
    (stopped,) = values_of(done)
    assert ended - float(str(stopped)) < 20


@pytest.mark.slow
def test_ranks_that_were_paused_together_suspect_no_rank(run_ranks: RunRanks) -> None:
    """The whole machine may have been paused."""
    body = """
import subprocess
import trainer.ranks.detector

def body(world):
    trainer.ranks.detector.SILENT_AFTER_S = 3.0
    pids = [str(pid) for pid in world.all_gather_object(os.getpid())]
    if world.is_main:
        pause = 'sleep 1; kill -STOP "$@"; sleep 5; kill -CONT "$@"'
        subprocess.Popen(["sh", "-c", pause, "sh", *pids], start_new_session=True)
    time.sleep(8)
    world.all_reduce_sum(torch.zeros(1))
    show(world.rank)
"""
    done = run_ranks(body, 2)
    assert done.returncode == 0, done.stderr
    assert sorted(values_of(done), key=str) == [0, 1]


@pytest.mark.slow
def test_a_signal_to_one_rank_is_not_reported_as_a_lost_rank(run_ranks: RunRanks) -> None:
    body = """
from trainer.errors import Interrupted

def body(world):
    world.all_reduce_sum(torch.zeros(1))
    if world.is_main:
        raise Interrupted("SIGPIPE", "stopped", 13)
    world.all_reduce_sum(torch.zeros(1))
"""
    done = run_ranks(body, 2)
    assert done.returncode == 1
    assert "lost another rank" not in done.stderr


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(run_ranks: RunRanks, tmp_path: Path) -> None:
    body = """
def body(world):
    world.failure_context.folder = pathlib.Path(FOLDER)
    time.sleep(1.5)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.all_reduce_sum(torch.zeros(1))
"""
    done = run_ranks(f"import pathlib, signal\nFOLDER = {str(tmp_path)!r}\n" + body, 2)
    errors = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert len(errors) == 1
    assert "error: rank 0 lost another rank: rank 1 (process" in errors[0]
    assert errors[0].endswith("; the run can continue from its last checkpoint"), "gloo's own words say nothing more"
    record = json.loads((tmp_path / "failure.json").read_text())
    assert record["ranks"] == [1]
    assert record["traceback"].startswith("Traceback ")


@pytest.mark.slow
def test_the_ranks_exit_when_the_launcher_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    body = """
def body(world):
    show(os.getpid())
    while True:
        world.all_reduce_sum(torch.zeros(1))
        time.sleep(0.05)
"""
    script.write_text(PROLOGUE.replace("JOIN", '"cpu"') + body + "\nrun_command(main)\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(torchrun, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    pids = [int(process.stdout.readline().removeprefix("VALUE ")) for _ in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    printed = process.stderr.read()
    assert "torchrun is gone" in printed
    assert "frame #0" not in printed  # torch's warnings are C++ stacks
    process.stdout.close()
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("is_read", [True, False])
def test_ranks_exit_when_the_launcher_is_killed_while_they_start(is_read: bool, tmp_path: Path) -> None:
    """Otherwise they would wait for its store for five minutes. The reader of their output may be gone, too."""
    script = tmp_path / "script.py"
    first = "import trainer.ranks.launcher\nprint('started', flush=True)\n"
    script.write_text(first + PROLOGUE.replace("JOIN", '"cpu"') + "def body(world):\n    pass\n\nrun_command(main)\n")
    launch = f"""
import os, subprocess, sys
ranks = {{"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9",
         "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}}
reading, unread = os.pipe()
os.close(reading)
pipes = {{"stdout": subprocess.PIPE, "stderr": None if {is_read} else unread}}
rank = subprocess.Popen([sys.executable, {str(script)!r}], env={{**os.environ, **ranks}}, **pipes)
rank.stdout.readline()
print(rank.pid)
"""
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", launch], env=environment, capture_output=True, text=True, check=True)
    pid, deadline = int(done.stdout), time.monotonic() + 100
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ("torchrun is gone" in done.stderr) == is_read


def test_collectives_of_a_single_rank_return_at_once() -> None:
    with World.join("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.all_reduce_sum(torch.tensor(3)).item() == 3
        assert world.broadcast_object("x") == "x"
        assert StopConsensus(world).poll(True)
        assert world.all_reduce(torch.ones(2)).tolist() == [1, 1]
        assert not torch.distributed.is_initialized()


def test_ranks_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but MASTER_ADDR is not set: start the ranks with torchrun"):
        World.join("cpu").__enter__()


@pytest.mark.slow
def test_the_main_rank_may_work_alone_for_longer_than_a_collective_waits(run_ranks: RunRanks) -> None:
    body = """
import trainer.ranks.world
trainer.ranks.world.COLLECTIVE_TIMEOUT_S = 1.0

def body(world):
    world.barrier()
    if world.is_main:
        time.sleep(2.5)
    world.untimed_barrier("end")
    show(world.rank)
"""
    done = run_ranks(body, 2)
    assert done.returncode == 0, done.stderr
    assert sorted(values_of(done), key=str) == [0, 1]


@pytest.mark.slow
def test_without_torchrun_the_main_rank_waits_until_the_others_have_seen_the_end(tmp_path: Path) -> None:
    """Rank 0 serves the store. Rank 1, which looks at it every 2 s, must not lose it."""
    body = """
def body(world):
    sleep = time.sleep
    if world.is_main:
        sleep(1)
    else:
        time.sleep = lambda seconds: sleep(2)
    world.untimed_barrier("end")
"""
    ranks = start_without_torchrun(body, tmp_path)
    assert [(rank.communicate(timeout=100), rank.returncode) for rank in ranks] == [((None, ""), 0)] * 2


@pytest.mark.slow
def test_ranks_that_wait_for_the_main_rank_exit_when_it_fails(run_ranks: RunRanks) -> None:
    body = """
def body(world):
    if world.is_main:
        raise DataError("the main rank's disk is full")
    world.untimed_barrier("end")
    show("not reached")
"""
    done = run_ranks(body, 2)
    assert done.returncode == 1
    assert re.findall("^error: .*", done.stderr, re.MULTILINE) == ["error: the main rank's disk is full"]
    assert values_of(done) == []


@pytest.mark.slow
def test_data_may_be_prepared_for_longer_than_a_collective_or_the_watchdog_waits(run_ranks: RunRanks) -> None:
    """On two hosts, local rank 0 of each prepares the data, one for longer than the other. Rank 0 logs the wait."""
    body = """
import dataclasses, types
import trainer.prepare, trainer.ranks.waiting, trainer.ranks.world
from trainer.data.folder.options import FolderOptions
trainer.ranks.waiting.FIRST_S = 1.0
trainer.ranks.world.COLLECTIVE_TIMEOUT_S = 1.0

def prepare(name, data_dir, options, *, verify=True, log):
    if verify:
        time.sleep(3 * world_here.rank)
    return types.SimpleNamespace(path=f"of rank {world_here.rank}", told=[verify, options.known_path])

def body(world):
    global world_here
    world_here = dataclasses.replace(world, local_rank=world.rank % 2)
    world.activity.timeout_s = 0.5
    trainer.prepare.load_dataset = prepare
    recipe = types.SimpleNamespace(dataset="mnist", global_batch_size=100, square="crop")
    prepared = trainer.prepare.load(recipe, FolderOptions(), None, world_here, print)
    world.activity.timeout_s = 600
    show([world.rank, prepared.told, world.all_gather_object(world.rank)])
"""
    done = run_ranks(body, 3, join='"cpu", hang_timeout_s=0.5')
    assert done.returncode == 0, done.stderr
    told = [[True, None], [False, "of rank 0"], [True, None]]
    assert sorted(values_of(done), key=str) == [[rank, told[rank], [0, 1, 2]] for rank in range(3)]
    # Beside other work, the start may take so long that other ranks log that they wait for rank 0's store.
    waits = re.findall("^rank .* waits .* to load the data set.*", done.stderr, re.MULTILINE)
    assert re.fullmatch(
        r"rank 0 waits for rank 2 \(process \d+ on .*\) to load the data set \(\d+ s so far\)", waits[-1]
    )
    assert all(line.startswith("rank 0 waits for") for line in waits)


@pytest.mark.slow
def test_a_lost_connection_outside_of_a_collective_is_not_a_lost_rank(run_ranks: RunRanks) -> None:
    body = """
def body(world):
    world.barrier()
    if world.rank == 1:
        raise BrokenPipeError("the reader of the output has left")
    world.all_reduce_sum(torch.zeros(1))
"""
    done = run_ranks(body, 2)
    assert done.returncode == 1
    assert "lost another rank" not in done.stderr
    assert "BrokenPipeError: the reader of the output has left" in done.stderr


@pytest.mark.slow
def test_ranks_that_wait_for_each_other_suspect_no_rank(run_ranks: RunRanks, tmp_path: Path) -> None:
    """All ranks are in the same collective, as far as they know, and it does not end."""
    body = """
import pathlib

def body(world):
    world.failure_context.folder = pathlib.Path(FOLDER)
    world.barrier()
    world.activity.timeout_s = 1.0
    with world.activity.collective():
        time.sleep(60)
"""
    began = time.monotonic()
    done = run_ranks(f"FOLDER = {str(tmp_path)!r}\n" + body, 2, join='"cpu", hang_timeout_s=1.0')
    assert time.monotonic() - began < 50
    errors = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert len(errors) == 1
    assert re.match(r"error: all ranks have waited \d+ s for each other", errors[0])
    assert json.loads((tmp_path / "failure.json").read_text())["ranks"] == []


@pytest.mark.slow
def test_without_a_hang_timeout_a_debugger_may_stop_a_rank(tmp_path: Path) -> None:
    body = """
import trainer.ranks.watchdog, trainer.ranks.world
trainer.ranks.activity.SLOW_PHASE_TIMEOUT_S = trainer.ranks.world.COLLECTIVE_TIMEOUT_S = 0.5

def body(world):
    world.activity.timeout_s = 0.5
    world.barrier()
    with world.activity.computing():
        if world.rank == 1:
            print("stopped", flush=True)
            breakpoint()
        total = world.all_reduce_sum(torch.ones(1)).item()
    show(total)
"""
    with start_ranks(body, 2, tmp_path, join='"cpu", hang_timeout_s=0') as process:
        assert process.stdout is not None
        while "stopped" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(4.0)  # with a timeout of 0.5 s the others would name it after 2.5 s
        output, errors = process.communicate("continue\n", timeout=60)
        assert process.returncode == 0, errors
    assert output.count("VALUE 2.0") == 2


@pytest.mark.slow
def test_without_a_hang_timeout_a_killed_rank_is_still_noticed(run_ranks: RunRanks) -> None:
    body = """
import signal

def body(world):
    world.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()
"""
    done = run_ranks(body, 2, join='"cpu", hang_timeout_s=0')
    assert done.returncode == 1
    assert "error: rank 0 lost another rank: rank 1 (process" in done.stderr
