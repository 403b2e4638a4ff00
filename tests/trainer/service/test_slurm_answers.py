"""The engine `slurm` with commands that answer as a Slurm does whose controller is away; needs no Slurm."""

from pathlib import Path

import pytest

from trainer.service.engines.engine import EngineUnavailableError
from trainer.service.engines.slurm import SlurmEngine
from trainer.service.jobs import JobSpec, JobState
from trainer.service.store import JobStore


def test_an_answer_of_sbatch_that_was_lost_submits_nothing_twice(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    submitted = tmp_path / "submitted"
    for name, code in (
        (
            "sbatch",
            f'echo 7 >> {submitted}; echo "$2" > {tmp_path / "output"};'
            "echo 'sbatch: error: Batch job submission failed: Socket timed out' >&2; exit 1",
        ),
        ("squeue", f"cat {submitted} 2> /dev/null || true"),
    ):
        (commands / name).write_text(f"#!/bin/sh\n{code}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
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
