"""From a submission over gRPC to a served model: watched, cancelled, continued, published, and found by a server."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.serving.server_process import ServerProcess
from trainer.service.client import RemoteJobs
from trainer.service.jobs import JobSpec, JobState
from trainer.service.operations import LogRange

pytestmark = pytest.mark.minutes


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[RemoteJobs]:
    options = ["--store", str(tmp_path / "jobs.db"), "--port", "0", "--http-port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "trainer.service", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = next(match for line in process.stderr if (match := re.search(r"serving on grpc (\S+),", line)))
    with closing(RemoteJobs(found[1])) as remote:
        yield remote
    process.terminate()
    assert process.wait(30) == 0
    process.stderr.close()


def test_a_job_is_cancelled_continued_and_its_model_is_served(jobs: RemoteJobs, tmp_path: Path) -> None:
    training = ["--recipe", "mnist", "--dataset", "mnist-mini", "--epochs", "3", "--device", "cpu", "--name", "digits"]
    models = tmp_path / "models"
    models.mkdir()
    run = tmp_path / "runs" / "digits"
    spec = JobSpec(
        arguments=(*training, "--model-repository", str(models)),
        cpus=2,
        ranks=2,
        working_folder=str(tmp_path),
        run_folder=str(run),
    )
    server = ServerProcess(
        "--model-repository", str(models), "--model-control-mode", "poll", "--poll-interval-s", "0.5"
    )
    try:
        job = jobs.submit(spec, owner="", key="digits")
        for event in jobs.watch(job.id):
            if event.kind == "progress":
                jobs.cancel(job.id)
                break
        states = [event.data["state"] for event in jobs.watch(job.id) if event.kind == "state"]
        assert states[-2:] == [JobState.SAVING, JobState.CANCELLED]
        assert jobs.get(job.id).reason.startswith("saved")
        jobs.retry(job.id)
        *_, last = jobs.watch(job.id)
        assert (last.data["state"], last.data["attempt"]) == (JobState.SUCCEEDED, 2)
        assert last.data["reason"].endswith(f"published in {models}/digits/1")
        first, second = (b"".join(jobs.read_log(job.id, LogRange(rank=rank))) for rank in (0, 1))
        assert (b"test accuracy" in first, b"test accuracy" in second) == (True, False)
        assert json.loads((run / "result.json").read_text())["epochs"] == 3
        command = [sys.executable, "-m", "convoy", "models", "list", "--model-repository", str(models)]
        assert "digits" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
        url = f"http://127.0.0.1:{server.http_port()}/v2/models/digits/ready"
        until = time.monotonic() + 60
        while httpx.get(url).status_code != 200:
            assert time.monotonic() < until, "".join(server.lines)
            time.sleep(0.2)
        assert server.stop() == 0
    finally:
        server.close()
