"""Several ranks over NCCL: they share the first GPU, each a host of its own for NCCL (`--allow-shared-gpu`).

Times mean nothing here, as the ranks' kernels take turns. Needs no network, and no package but those of training.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, clean_environment, free_port, wait_for
from tests.e2e.test_training import ranks_of, result_of, started, wait_for_line

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Train = Callable[..., "subprocess.CompletedProcess[str]"]
SHARED = ("--device", "cuda", "--allow-shared-gpu")
PLAIN = ("--recipe", "mnist", "--epochs", "2", "--precision", "float32")
# Batch norm, Muon, AdamW, clipping, an average, two sizes of images; the last batch of an epoch has 20 of 70 images.
EVERYTHING = (
    *("--recipe", "mnist-fast", "--global-batch-size", "70", "--epochs", "2", "--precision", "float32", "--set"),
    *("param_groups.vectors.optimizer=adamw", "param_groups.vectors.lr=0.002", "clip_norm=2", "ema_decay=0.9"),
    "resolutions=[[0.5, 24]]",
)
SHARDED = (*EVERYTHING, "--virtual-shards", "4", "--save-every-steps", "10")
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


@pytest.fixture(scope="module")
def command(trainer_command: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """The command line of a training on the GPU; its ranks share one."""

    def make(*arguments: str, ranks: int = 1) -> list[str]:
        words = trainer_command(*arguments, ranks=ranks)
        at = words.index("--device")
        return [*words[:at], *SHARED, *words[at + 2 :]]

    return make


def complete(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Runs a command to its end; on a machine with several GPUs it sees the first one only."""
    environment = {**clean_environment(), "CUDA_VISIBLE_DEVICES": first_gpu()}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def first_gpu() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", first_gpu())


@pytest.fixture(scope="module")
def train(command: Callable[..., list[str]]) -> Train:
    """A function that trains to the end in a folder, with a CUDA graph."""

    def run(
        folder: Path, *arguments: str, ranks: int = 1, may_be_eager: bool = False
    ) -> "subprocess.CompletedProcess[str]":
        done = complete(command(*arguments, "--run-dir", str(folder), ranks=ranks))
        assert done.returncode == 0, done.stderr
        assert may_be_eager or "no CUDA graph" not in done.stdout
        return done

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder: Path, train: Train) -> Path:
    train(folder / "alone", *PLAIN)
    return folder / "alone"


@pytest.fixture(scope="module")
def two_ranks(folder: Path, train: Train) -> Path:
    done = train(folder / "two", *PLAIN, ranks=2)
    assert "gradients added up by DDP; run folder" in done.stdout
    return folder / "two"


@pytest.fixture(scope="module")
def sharded(folder: Path, train: Train) -> str:
    """Returns the digest of the weights of one rank with four virtual shards."""
    train(folder / "sharded", *SHARDED)
    return str(result_of(folder / "sharded")["weights_sha256"])


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train_loss"] for line in lines if line["kind"] == "epoch"]


def ended(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_two_ranks_train_as_one_does(alone: Path, two_ranks: Path) -> None:
    assert losses(two_ranks) == pytest.approx(losses(alone), rel=0.02)
    assert result_of(two_ranks)["test_accuracy"] == pytest.approx(result_of(alone)["test_accuracy"], abs=0.02)


@pytest.mark.parametrize(
    ("reduction", "ranks", "tolerance"), [("ddp", 4, 0.02), ("vector", 2, 0.02), ("ddp-bfloat16", 2, 0.15)]
)
def test_other_numbers_of_ranks_and_reductions(
    reduction: str, ranks: int, tolerance: float, alone: Path, tmp_path: Path, train: Train
) -> None:
    options = (*PLAIN, "--gradient-reduction", reduction)
    done = train(tmp_path / "run", *options, ranks=ranks, may_be_eager=reduction == "ddp-bfloat16")
    assert ("DDP" in done.stdout) == (reduction != "vector")
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=tolerance)


def test_parts_and_everything_else(tmp_path: Path, train: Train) -> None:
    """One rank in four parts, and two ranks in two parts, have the same shards."""
    train(tmp_path / "one", *EVERYTHING, "--grad-accumulation", "4")
    train(tmp_path / "two", *EVERYTHING, "--grad-accumulation", "2", ranks=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0.05)


def test_evaluation_on_two_ranks_gives_the_figures_of_the_training(two_ranks: Path, data_dir: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "trainer"]
    done = complete([*launcher, "evaluate", str(two_ranks), "--data-dir", str(data_dir), *SHARED])
    assert done.returncode == 0, done.stderr
    accuracy = 100 * result_of(two_ranks)["val_accuracy"]
    assert f"validation accuracy {accuracy:.2f} %" in done.stdout


def test_a_killed_run_continues_to_the_same_weights(
    two_ranks: Path, tmp_path: Path, train: Train, command: Callable[..., list[str]]
) -> None:
    """By DDP, on the same number of ranks."""
    options = (*PLAIN, "--save-every-steps", "10")
    with started(command(*options, "--run-dir", str(tmp_path / "run"), ranks=2)) as process:
        until_saved(tmp_path / "run", process)
        os.killpg(process.pid, signal.SIGKILL)
    if not (tmp_path / "run" / "result.json").exists():
        train(tmp_path / "run", *options, ranks=2)
    assert result_of(tmp_path / "run")["weights_sha256"] == result_of(two_ranks)["weights_sha256"]


def until_saved(folder: Path, process: "subprocess.Popen[str]") -> None:
    saved = folder / "checkpoints"
    wait_for("a checkpoint", lambda: any(saved.glob("step-*")), lambda: process.poll() is not None)


def test_under_virtual_shards_another_number_of_ranks_continues_to_the_same_bits(
    sharded: str, tmp_path: Path, train: Train, command: Callable[..., list[str]]
) -> None:
    with started(command(*SHARDED, "--run-dir", str(tmp_path / "run"), ranks=2)) as process:
        until_saved(tmp_path / "run", process)
        os.killpg(process.pid, signal.SIGKILL)
    if not (tmp_path / "run" / "result.json").exists():
        train(tmp_path / "run", *SHARDED, ranks=4)
    assert result_of(tmp_path / "run")["weights_sha256"] == sharded


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped_is_named_and_all_exit(
    number: signal.Signals, tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    options = ("--recipe", "mnist", "--epochs", "100000", "--run-dir", str(tmp_path / "run"))
    with started(command(*options, ranks=2)) as process:
        wait_for_line(process, "epoch 3/100000")
        pids = ranks_of(process)
        os.kill(pids[1], number)
        began = time.monotonic()
        line = wait_for_line(process, "^error: ")
        named_s = time.monotonic() - began
        assert process.stdout is not None
        process.stdout.read()
        assert process.wait(timeout=60) != 0
        wait_for("end of all ranks", lambda: ended(pids))
        assert time.monotonic() - began < 30
    assert f"(process {pids[1]} on " in line
    assert named_s < 12
    record = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert len(record["ranks"]) == 1


def test_a_loss_that_is_not_a_number_on_one_rank_ends_all(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    (tmp_path / "net.py").write_text(FAILS_ON_RANK_1)
    network = ("--recipe", "any-network", "--network", f"{tmp_path / 'net.py'}:Net", "--global-batch-size", "100")
    done = complete(command(*network, "--epochs", "1", "--run-dir", str(tmp_path / "run"), ranks=2))
    assert done.returncode != 0
    (error,) = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert re.search(r"training diverged: the loss is nan at step \d+", error)
    assert not (tmp_path / "run" / "result.json").exists()


def test_an_elastic_run_loses_a_host_and_goes_on_with_the_other(
    sharded: str, tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    """Each agent is a host with one rank, which NCCL tells from the other by a variable."""
    script, *arguments = command(*SHARDED, "--run-dir", str(tmp_path / "run"))[1:]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-id=gpu", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    timing = "last_call_timeout=8,join_timeout=60,keep_alive_interval=2,keep_alive_max_attempt=3"
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    with ExitStack() as stack:
        agents: list[subprocess.Popen[str]] = []
        for number in range(2):
            elastic = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=5", "--local-addr=127.0.0.1"]
            elastic += [*rendezvous, f"--rdzv-conf=is_host={int(number == 0)},{timing}"]
            hosts = {"NCCL_HOSTID": f"agent{number}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
            log = stack.enter_context(logs[number].open("w"))
            agent = subprocess.Popen(
                [sys.executable, "-m", "trainer.launch", *elastic, script, *arguments],
                cwd=ROOT,
                env={**clean_environment(), **hosts},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(kill_host, agent)
            agents.append(agent)
        wait_for(
            "training on two hosts",
            lambda: any("2 ranks on cuda" in log.read_text() for log in logs),
            lambda: agents[0].poll() is not None,
        )
        until_saved(tmp_path / "run", agents[0])
        kill_host(agents[1])
        assert agents[0].wait(timeout=100) == 0
    assert result_of(tmp_path / "run")["weights_sha256"] == sharded


def kill_host(agent: "subprocess.Popen[str]") -> None:
    """Kills an agent and its ranks, which have sessions of their own."""
    for pid in (agent.pid, *ranks_of(agent)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agent.wait()


def test_more_ranks_than_gpus_are_refused_in_one_line(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    words = [word for word in command("--run-dir", str(tmp_path / "run"), ranks=2) if word != "--allow-shared-gpu"]
    done = complete(words)
    assert done.returncode != 0
    (error,) = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert "this host has 1 GPU: use at most 1" in error
    assert "--allow-shared-gpu" in error
