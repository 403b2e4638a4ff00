"""The engine `slurm` with commands that answer as a Slurm does whose controller is away; needs no Slurm."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.service.engines import slurm as slurm_engine
from trainer.service.engines.engine import EngineUnavailableError, Phase, Status
from trainer.service.engines.slurm import SlurmEngine
from trainer.service.jobs import Job, JobSpec, JobState, Stop
from trainer.service.store import JobStore


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what Slurm's commands do: scripts of sh by the commands' names."""
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")

    def answer(**scripts: str) -> None:
        for name, code in scripts.items():
            (commands / name).write_text(f"#!/bin/sh\n{code}\n")
            (commands / name).chmod(0o755)

    return answer


@pytest.fixture
def job(store: JobStore, tmp_path: Path) -> Job:
    spec = JobSpec(arguments=("\udcff",), engine="slurm", working_folder=str(tmp_path))
    return store.change(store.add(spec, owner="ada")[0], JobState.STARTING)


def test_a_job_that_slurm_forgot_before_its_number_was_noted_has_ended(
    slurm: Callable[..., None], job: Job, tmp_path: Path
) -> None:
    slurm(sbatch=f"echo 7; echo x >> {tmp_path / 'submitted'}", squeue="true")
    engine = SlurmEngine(tmp_path)
    engine.start(job)
    folder = engine.logs(job)[0].parent
    (folder / "slurm.json").unlink()  # the controller was killed before it wrote this
    (folder / "exit.json").write_text('{"code": 3}')
    assert engine.status(job).phase is Phase.ABSENT
    engine.start(job)
    assert engine.status(job) == Status(Phase.ENDED, 3)
    assert (tmp_path / "submitted").read_text() == "x\n"


def test_a_job_that_left_no_exit_code_is_gone_after_a_while_whoever_looks(
    slurm: Callable[..., None], job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(sbatch="echo 7", squeue="case $3 in --name*) ;; *) echo 7 TIMEOUT ;; esac")
    SlurmEngine(tmp_path).start(job)
    assert SlurmEngine(tmp_path).status(job) == Status(Phase.RUNNING)
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + slurm_engine.GRACE_S + 1)
    assert SlurmEngine(tmp_path).status(job) == Status(Phase.GONE, reason="Slurm ended it: timeout")


def test_a_job_is_asked_to_save_when_its_ranks_are_there_and_once(
    slurm: Callable[..., None], job: Job, tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    slurm(sbatch="echo 7", scancel=f"echo $* >> {asked}", squeue="case $3 in --name*) ;; *) echo 7 RUNNING ;; esac")
    engine = SlurmEngine(tmp_path)
    engine.start(job)
    engine.stop(job, Stop.SAVE)
    assert not asked.exists()
    slurm(squeue="[ $1 = --steps ] && echo 7.batch 7.0 || echo 7 RUNNING")
    for _ in range(2):
        engine.stop(job, Stop.SAVE)
    assert asked.read_text() == "--signal=TERM 7\n"
    engine.stop(job, Stop.KILL)
    assert asked.read_text() == "--signal=TERM 7\n7\n"


def test_a_job_that_is_cancelled_before_sbatch_is_never_submitted(
    slurm: Callable[..., None], job: Job, tmp_path: Path
) -> None:
    slurm(sbatch=f"touch {tmp_path / 'submitted'}", squeue="true")
    engine = SlurmEngine(tmp_path)
    engine.stop(job, Stop.SAVE)
    engine.start(job)
    assert engine.status(job).phase is Phase.ENDED
    assert not (tmp_path / "submitted").exists()


def test_a_slurm_that_does_not_answer_holds_nobody_up_for_each_job(
    slurm: Callable[..., None], job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_engine, "TIMEOUT_S", 1.1)
    slurm(squeue="exec sleep 60")
    engine = SlurmEngine(tmp_path)
    began = time.monotonic()
    for _ in range(5):
        with pytest.raises(EngineUnavailableError, match="squeue: no answer within 1 s"):
            engine.start(job)
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("name", ["array", "job-name", "clusters", "output", "nodes"])
def test_options_that_would_lose_the_job_are_refused(name: str, slurm: Callable[..., None], tmp_path: Path) -> None:
    slurm(sbatch="true")
    spec = JobSpec(arguments=(), engine="slurm", working_folder="/", engine_options={name: "1"})
    with pytest.raises(ConfigError, match="a job has its own"):
        SlurmEngine(tmp_path).check(spec)


def test_an_answer_of_sbatch_that_was_lost_submits_nothing_twice(
    slurm: Callable[..., None], store: JobStore, tmp_path: Path
) -> None:
    submitted = tmp_path / "submitted"
    slurm(
        sbatch=f'echo 7 >> {submitted}; echo "$2" > {tmp_path / "output"};'
        "echo 'sbatch: error: Batch job submission failed: Socket timed out' >&2; exit 1",
        squeue=f"cat {submitted} 2> /dev/null || true",
    )
    options = {"partition": "gpu", "comment": 'my "job" \\'}
    spec = JobSpec(arguments=(), engine="slurm", working_folder=str(tmp_path), engine_options=options)
    job, _ = store.add(spec, owner="ada")
    job = store.change(job, JobState.STARTING)
    engine = SlurmEngine(tmp_path / "my jobs %j")
    with pytest.raises(EngineUnavailableError, match="Socket timed out"):
        engine.start(job)
    engine.start(job)
    assert submitted.read_text() == "7\n"
    assert engine._number(job) == "7"
    (script,) = tmp_path.glob("my jobs %j/jobs/*/*/script.sh")
    assert (tmp_path / "output").read_text() == f"--output={script.parent / 'log'}\n".replace("%", "%%")
    assert {"#SBATCH --partition=gpu", r'#SBATCH --comment="my \"job\" \\"'} <= set(script.read_text().splitlines())
