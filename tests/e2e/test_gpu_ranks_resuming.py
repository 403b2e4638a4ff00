"""Several ranks over NCCL: runs that were killed, or lost a host, end in the weights of undisturbed ones."""

import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import ROOT, clean_environment, free_port, wait_for
from tests.e2e.gpu_ranks import ON_A_GPU, PLAIN, SHARDED, Command, at_once, kill_all, show, started_for, trained
from tests.e2e.test_training import result_of

pytestmark = [pytest.mark.gpu, *ON_A_GPU]

DDP = (*PLAIN, "--epochs", "4", "--save-every-steps", "10")


@pytest.fixture(scope="module")
def digests(one_gpu: None, tmp_path_factory: pytest.TempPathFactory, gpu_command: Command) -> dict[str, str]:
    """Digests of weights: of two undisturbed runs, and of two that were killed on two ranks and went on."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, options: tuple[str, ...], ranks: int) -> list[str]:
        return gpu_command(*options, "--run-dir", str(folder / name), ranks=ranks)

    at_once(
        partial(trained, run("ddp", DDP, 2)),
        partial(trained, run("sharded", SHARDED, 1)),
        partial(kill_once_saved, run("ddp, killed", DDP, 2), folder / "ddp, killed"),
        partial(kill_once_saved, run("sharded, killed", SHARDED, 2), folder / "sharded, killed"),
    )
    again = {"ddp, killed": run("ddp, killed", DDP, 2), "sharded, killed": run("sharded, killed", SHARDED, 4)}
    assert not any((folder / name / "result.json").exists() for name in again), "killed too late"
    at_once(*(partial(trained, command) for command in again.values()))
    return {path.parent.name: result_of(path.parent)["weights_sha256"] for path in folder.glob("*/result.json")}


def kill_once_saved(command: list[str], folder: Path) -> None:
    with started_for(120, command) as process:
        until_saved(folder, process)


def until_saved(folder: Path, process: "subprocess.Popen[str]") -> None:
    saved = folder / "checkpoints"
    wait_for("a checkpoint", lambda: any(saved.glob("step-*")), lambda: process.poll() is not None)


def test_a_killed_run_continues_to_the_same_weights(digests: dict[str, str]) -> None:
    """By DDP, on the same number of ranks."""
    assert digests["ddp, killed"] == digests["ddp"]


def test_under_virtual_shards_another_number_of_ranks_continues_to_the_same_bits(digests: dict[str, str]) -> None:
    assert digests["sharded, killed"] == digests["sharded"]


def test_an_elastic_run_loses_a_host_and_goes_on_with_the_other(
    digests: dict[str, str], tmp_path: Path, gpu_command: Command
) -> None:
    """Each agent is a host with one rank, which NCCL tells from the other by a variable."""
    script, *arguments = gpu_command(*SHARDED, "--run-dir", str(tmp_path / "run"))[1:]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-id=gpu", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    timing = "last_call_timeout=4,join_timeout=60,keep_alive_interval=2,keep_alive_max_attempt=3"
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    with ExitStack() as stack:
        stack.callback(lambda: show([script, *arguments], *(log.read_text() for log in logs)))
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
            stack.callback(kill_all, agent)
            agents.append(agent)
        wait_for(
            "training on two hosts",
            lambda: any("2 ranks on cuda" in log.read_text() for log in logs),
            lambda: agents[0].poll() is not None,
        )
        until_saved(tmp_path / "run", agents[0])
        kill_all(agents[1])
        assert agents[0].wait(timeout=100) == 0
    assert result_of(tmp_path / "run")["weights_sha256"] == digests["sharded"]
