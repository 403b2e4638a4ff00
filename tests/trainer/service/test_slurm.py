"""The engine `slurm` against a real Slurm: trainings on two hosts, cancelled, continued, found again after a kill."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer.service.conftest import run_until
from tests.trainer.service.service_process import kill_while_jobs_run
from tests.trainer.service.service_process import spec as script_spec
from tests.trainer.service.slurm_cluster import SlurmCluster, install
from trainer.errors import ConfigError
from trainer.service import engines
from trainer.service.controller import Controller
from trainer.service.engines.slurm import SlurmEngine
from trainer.service.jobs import FINAL, JobSpec, JobState, Stop
from trainer.service.operations import LogRange, Operations
from trainer.service.store import JobStore

pytestmark = pytest.mark.installs
TRAINING = ("--recipe", "mnist", "--dataset", "mnist-mini", "--no-export", "--device", "cpu", "--virtual-shards", "2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    install()
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    running = SlurmCluster(folder)
    old = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(running.config)
    yield running
    running.close()
    if old is None:
        del os.environ["SLURM_CONF"]
    shutil.rmtree(folder, ignore_errors=True)


def spec(tmp_path: Path, *arguments: str, nodes: int = 2, **values: object) -> JobSpec:
    return JobSpec(
        arguments=(*TRAINING, *arguments),
        engine="slurm",
        nodes=(nodes, nodes),
        cpus=1,
        max_retries=0,
        working_folder=str(tmp_path),
        run_folder=str(tmp_path / "runs" / "{id}"),
        **values,  # type: ignore[arg-type]
    )


def digest(tmp_path: Path, number: int) -> str:
    return str(json.loads((tmp_path / "runs" / str(number) / "result.json").read_text())["weights_sha256"])


def test_a_job_on_two_hosts_is_cancelled_and_continued_to_the_weights_of_one_on_one_host(
    cluster: SlurmCluster, store: JobStore, tmp_path: Path
) -> None:
    controller = Controller(store, tmp_path / "my jobs %j")
    operations = Operations(store, controller, controller.make_pass)
    alone = operations.submit(spec(tmp_path, "--epochs", "2", nodes=1), owner="ada")
    done = run_until(controller, store, alone.id, *FINAL, timeout_s=120)
    assert (done.state, done.reason[:13]) == (JobState.SUCCEEDED, "test accuracy")
    both = operations.submit(spec(tmp_path, "--epochs", "2"), owner="ada")
    metrics = tmp_path / "runs" / str(both.id) / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        controller.make_pass()
        assert time.monotonic() < until, [path.read_text() for path in controller.engine("slurm").logs(both)]
        time.sleep(0.05)
    operations.cancel(both.id)
    cancelled = run_until(controller, store, both.id, *FINAL, timeout_s=120)
    assert (cancelled.state, cancelled.reason[:5]) == (JobState.CANCELLED, "saved")
    assert operations.retry(both.id).attempt == 2
    assert run_until(controller, store, both.id, *FINAL, timeout_s=120).state is JobState.SUCCEEDED
    assert digest(tmp_path, both.id) == digest(tmp_path, alone.id)
    result = json.loads((tmp_path / "runs" / str(both.id) / "result.json").read_text())
    assert result["world_size"] == 2
    first, second = (b"".join(operations.read_log(both.id, LogRange(rank=rank))) for rank in (0, 1))
    assert b"test accuracy" in first
    assert b"test accuracy" not in second


def test_a_service_that_is_killed_again_and_again_starts_each_job_once(cluster: SlurmCluster, tmp_path: Path) -> None:
    kill_while_jobs_run(str(tmp_path / "jobs.db"), tmp_path, engine="slurm-script", num_jobs=5, num_kills=5)


def test_a_lost_host_is_no_failure_and_the_job_goes_on_with_those_that_are_left(
    cluster: SlurmCluster, store: JobStore, controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engines._OURS, "slurm-script", "tests.trainer.service.script_engine:SlurmScriptEngine")
    code = "import os, sys, time, pathlib; run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True, exist_ok=True);"
    code += "hosts = os.environ['SLURM_NNODES']; (run / hosts).touch(); time.sleep(60 if hosts == '2' else 0);"
    code += "(run / 'result.json').write_text('{}')"
    values = {"engine": "slurm-script", "nodes": (1, 2), "max_retries": 0}
    job, _ = store.add(script_spec(tmp_path, code, **values), owner="ada")
    run_until(controller, store, job.id, JobState.RUNNING, timeout_s=60)
    until = time.monotonic() + 60
    while not (tmp_path / "runs" / str(job.id) / "2").exists():
        assert time.monotonic() < until, "it did not get both hosts"
        time.sleep(0.1)
    try:
        for state in ("DRAIN", "DOWN"):  # the first, as a host that is only down comes back by itself
            subprocess.run(["scontrol", "update", "NodeName=n2", f"State={state}", "Reason=test"], check=True)
        done = run_until(controller, store, job.id, *FINAL, timeout_s=120)
    finally:
        subprocess.run(["scontrol", "update", "NodeName=n2", "State=RESUME"], check=True)
    assert (done.state, done.num_retries) == (JobState.SUCCEEDED, 0)
    assert (tmp_path / "runs" / str(job.id) / "1").exists()


def test_a_controller_that_was_killed_after_sbatch_submits_nothing_twice(
    cluster: SlurmCluster, store: JobStore, tmp_path: Path
) -> None:
    job, _ = store.add(spec(tmp_path, "--epochs", "1", nodes=1), owner="ada")
    job = store.change(job, JobState.STARTING)
    SlurmEngine(tmp_path / store.identity).start(job)
    noted = tmp_path / store.identity / "jobs" / str(job.id) / "attempt-1" / "slurm.json"
    number = json.loads(noted.read_text())["job"]
    noted.unlink()
    SlurmEngine(tmp_path / store.identity).start(job)
    assert json.loads(noted.read_text())["job"] == number
    controller = Controller(store, tmp_path)
    assert run_until(controller, store, job.id, *FINAL, timeout_s=120).state is JobState.SUCCEEDED


def test_failures_are_told_apart_and_a_waiting_job_is_cancelled(
    cluster: SlurmCluster, store: JobStore, controller: Controller, tmp_path: Path
) -> None:
    wrong, _ = store.add(spec(tmp_path, "--epochs", "0", nodes=1), owner="ada")
    assert run_until(controller, store, wrong.id, *FINAL, timeout_s=120).exit_code == 2
    refused, _ = store.add(spec(tmp_path, nodes=1, engine_options={"partition": "none"}), owner="ada")
    failed = run_until(controller, store, refused.id, *FINAL, timeout_s=60)
    assert (failed.state, failed.reason[:7]) == (JobState.FAILED, "sbatch:")
    held, _ = store.add(spec(tmp_path, nodes=1, engine_options={"begin": "now+1hour"}), owner="ada")
    waiting = run_until(controller, store, held.id, JobState.STARTING, timeout_s=60)
    store.request_stop(waiting, Stop.SAVE)
    assert run_until(controller, store, held.id, *FINAL, timeout_s=60).state is JobState.CANCELLED


def test_options_that_are_none_are_refused(cluster: SlurmCluster, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a long option of sbatch"):
        SlurmEngine(tmp_path).check(spec(tmp_path, engine_options={"wrap\nx": "y"}))
