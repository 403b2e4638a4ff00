"""Tests that the launcher's variables are checked once, and that a mistake is one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, clean_environment
from trainer.errors import ConfigError
from trainer.ranks.environment import RankEnvironment, warn_of_separate_tasks

HERE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def read(variables: str, **more: str) -> RankEnvironment:
    """Reads variables given as in a shell: `RANK=1 WORLD_SIZE=2`."""
    return RankEnvironment.read(dict(pair.split("=", 1) for pair in variables.split()) | more)


def test_without_a_launcher_it_is_the_only_rank() -> None:
    assert RankEnvironment.read({}) == RankEnvironment()
    assert read("WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1") == RankEnvironment()
    # Kubernetes sets such a port for every service of that name.
    assert read("MASTER_PORT=tcp://10.3.0.1:80 MASTER_ADDR=") == RankEnvironment()


def test_the_variables_of_torchrun_are_read() -> None:
    torchrun = "TORCHELASTIC_RUN_ID=x TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_ERROR_FILE=/tmp/e "
    torchrun += "TORCHELASTIC_MAX_RESTARTS=3 TORCHELASTIC_RESTART_COUNT=2 "
    assert read(torchrun + "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4", **HERE) == RankEnvironment(
        is_launched=True,
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        master_addr="10.0.0.1",
        master_port=29500,
        is_torchrun=True,
        has_agent_store=True,
        has_error_file=True,
        max_restarts=3,
        num_restarts=2,
    )


@pytest.mark.parametrize(
    ("threads", "alone", "under_torchrun"),
    [("", None, None), ("1", 1, None), ("3", 3, 3), ("0", None, None), ("2,1", None, None)],
)
def test_one_thread_is_a_choice_without_torchrun_only(
    threads: str, alone: int | None, under_torchrun: int | None
) -> None:
    """torchrun sets 1 where the user has set nothing."""
    variables = {"OMP_NUM_THREADS": threads}
    assert RankEnvironment.read(variables).num_threads == alone
    assert RankEnvironment.read(variables | {"TORCHELASTIC_RUN_ID": "none"}).num_threads == under_torchrun


def test_ranks_without_local_ones_have_a_host_each_or_one_for_all() -> None:
    alone = read("RANK=1 WORLD_SIZE=2", **HERE)
    assert (alone.local_rank, alone.local_world_size) == (0, 1)
    assert read("RANK=1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2", **HERE).local_rank == 1


@pytest.mark.parametrize("address", ["fe80::1", "node-3"])
def test_the_master_endpoint_is_an_address_with_a_port(address: str) -> None:
    point = read("RANK=0 WORLD_SIZE=2", **HERE | {"MASTER_ADDR": address}).master_endpoint
    assert point == {"fe80::1": "[fe80::1]:29500", "node-3": "node-3:29500"}[address]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("RANK=1", "RANK is set ('1'), but WORLD_SIZE is not: unset it to train with one process, or start"),
        ("RANK=0", "RANK is set ('0'), but WORLD_SIZE is not"),
        ("RANK=", "RANK is set (''), but WORLD_SIZE is not"),
        ("RANK=x WORLD_SIZE=2", "RANK is 'x', but must be a whole number from 0 on"),
        ("RANK=+1 WORLD_SIZE=2", "RANK is '+1', but"),
        ("RANK=1.0 WORLD_SIZE=2", "RANK is '1.0', but"),
        ("RANK=\u0661 WORLD_SIZE=2", "RANK is '\u0661', but"),
        ("RANK=-1 WORLD_SIZE=2", "RANK is '-1', but"),
        ("RANK=2 WORLD_SIZE=2", "RANK is 2, but must be less than WORLD_SIZE, which is 2"),
        ("WORLD_SIZE=2", "WORLD_SIZE is 2, but RANK is not set"),
        ("WORLD_SIZE=", "WORLD_SIZE is '', but must be a whole number from 1 on"),
        ("WORLD_SIZE=0 RANK=0", "WORLD_SIZE is '0', but"),
        ("WORLD_SIZE=99999999999999999999 RANK=0", "WORLD_SIZE is '99999999999999999999', but"),
        ("LOCAL_RANK=one", "LOCAL_RANK is 'one', but"),
        ("LOCAL_RANK=1", "LOCAL_RANK is 1, but LOCAL_WORLD_SIZE is not set: set it to the number of ranks"),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=0", "LOCAL_RANK is 0, but LOCAL_WORLD_SIZE is not set"),
        ("RANK=0 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2", "LOCAL_WORLD_SIZE is 2, but LOCAL_RANK is not set"),
        ("LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE is '0', but must be a whole number from 1 on"),
        ("LOCAL_WORLD_SIZE=4", "LOCAL_WORLD_SIZE is 4, but must be at most WORLD_SIZE, which is not set"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=3", "LOCAL_WORLD_SIZE is 3, but must be at most"),
        ("RANK=2 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", "LOCAL_RANK is 2, but must be less than LOCAL"),
        ("RANK=0 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2", "LOCAL_RANK is 1, but must be at most RANK"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=", "WORLD_SIZE is 2, but MASTER_PORT is not set: start the ranks"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=", "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=tcp://a:1", "MASTER_PORT is 'tcp://a:1', but must be a number"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=65536", "MASTER_PORT is '65536', but"),
        ("TORCHELASTIC_RESTART_COUNT=x", "TORCHELASTIC_RESTART_COUNT is 'x', but"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused(variables: str, message: str) -> None:
    given = HERE | dict(pair.split("=", 1) for pair in variables.split())
    with pytest.raises(ConfigError) as caught:
        RankEnvironment.read(given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# With a fake torch, whose import fails: the error must come before that import.
@pytest.mark.parametrize(
    "command",
    [
        ["trainer/main.py", "--epochs", "1"],
        ["trainer/main.py", "--help"],
        ["-m", "convoy", "train"],
        ["-m", "trainer", "evaluate", "x"],
    ],
)
def test_a_mistake_is_one_line_of_the_process_that_has_it(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = clean_environment() | {"RANK": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: RANK is set ('1'), but WORLD_SIZE is not")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "begins"),
    [
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, "srun has started 4 tasks (SLURM_STEP_NUM_TASKS=4)"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 tasks (OMPI_COMM_WORLD_SIZE=2)"),
        ({"PMI_SIZE": "3"}, "mpirun has started 3 tasks (PMI_SIZE=3)"),
        ({"FLUX_JOB_SIZE": "2"}, "flux run has started 2 tasks"),
    ],
)
def test_several_tasks_of_another_launcher_give_a_warning(variables: dict[str, str], begins: str) -> None:
    warning = warn_of_separate_tasks(variables)
    assert warning.startswith(f"warning: {begins}")
    assert "torchrun" in warning
    assert "\n" not in warning


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the batch script of a job with several tasks
        {"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_SIZE": "many"},
    ],
)
def test_a_single_task_gives_no_warning(variables: dict[str, str]) -> None:
    assert warn_of_separate_tasks(variables) == ""
