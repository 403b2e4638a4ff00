"""A training as the engine `kubernetes` starts it: real ranks, by the Job's command, beside the small API server."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.trainer.service.conftest import run_until
from tests.trainer.service.kubernetes_api import Object
from tests.trainer.service.test_kubernetes import Cluster, close, read_log, use
from trainer.service.controller import Controller
from trainer.service.jobs import FINAL, JobSpec, JobState
from trainer.service.operations import LogRange, Operations
from trainer.service.store import JobStore

pytestmark = pytest.mark.minutes
TRAINING = ("--recipe=mnist", "--dataset=mnist-mini", "--no-export", "--device=cpu", "--virtual-shards=2", "--epochs=2")


class Kubelet:
    """Runs the pods of Jobs of one host as processes: a thread that looks at the API server's objects."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped: set[str] = set()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _run(self) -> None:
        begun: set[str] = set()
        while not self._is_over.wait(0.05):
            for job in self._cluster.all("jobs"):
                if job["metadata"]["uid"] not in begun and "deletionTimestamp" not in job["metadata"]:
                    begun.add(job["metadata"]["uid"])
                    self._start(job)
            for pod in self._cluster.all("pods"):
                self._follow(pod)

    def _start(self, job: Object) -> None:
        name = self._cluster.add_pod(job)
        container = job["spec"]["template"]["spec"]["containers"][0]
        values = {entry["name"]: entry.get("value", "") for entry in container["env"]}
        values |= {"PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
        values |= {"PET_LOG_DIR": str(self._folder / name), "HOME": os.environ["HOME"]}
        command = [sys.executable, *container["command"][1:], *container["args"]]
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(command, env=os.environ | values, stdout=log, stderr=log)
        self._cluster.set_pod(name, "Running")

    def _follow(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        process = self._processes[name]
        lines = (self._folder / f"{name}.log").read_text().splitlines()
        self._cluster.logs[name] = [(f"2026-01-01T00:00:00.{number:09d}Z", line) for number, line in enumerate(lines)]
        if pod["status"]["phase"] != "Running":
            return
        if "deletionTimestamp" in pod["metadata"] and name not in self._stopped:
            self._stopped.add(name)
            process.send_signal(signal.SIGTERM)
        code = process.poll()
        if code is not None:
            self._cluster.end_pod(name, code)
            owner = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
            if any(job["metadata"]["name"] == owner for job in self._cluster.all("jobs")):
                self._cluster.finish("jobs", owner, "Failed" if code else "Complete")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    api = Cluster()
    use(api, tmp_path, monkeypatch)
    kubelet = Kubelet(api, tmp_path)
    yield api
    kubelet.close()
    api.close()


def test_a_training_of_two_ranks_is_cancelled_and_continued(cluster: Cluster, store: JobStore, tmp_path: Path) -> None:
    controller = Controller(store, tmp_path)
    operations = Operations(store, controller, controller.make_pass)
    spec = JobSpec(
        arguments=TRAINING,
        engine="kubernetes",
        ranks=2,
        max_retries=0,
        working_folder=str(tmp_path),
        run_folder=str(tmp_path / "runs" / "{id}"),
        engine_options={"claims": f"training:{tmp_path}"},
    )
    try:
        job = operations.submit(spec, owner="ada")
        metrics = tmp_path / "runs" / str(job.id) / "metrics.jsonl"
        until = time.monotonic() + 240
        while not (metrics.exists() and metrics.stat().st_size):
            controller.make_pass()
            assert time.monotonic() < until, read_log(controller, job)
            time.sleep(0.05)
        operations.cancel(job.id)
        cancelled = run_until(controller, store, job.id, *FINAL, timeout_s=240)
        assert (cancelled.state, cancelled.reason[:5], cluster.all("pods")) == (JobState.CANCELLED, "saved", [])
        assert operations.retry(job.id).attempt == 2
        done = run_until(controller, store, job.id, *FINAL, timeout_s=240)
        assert (done.state, done.exit_code) == (JobState.SUCCEEDED, 0), read_log(controller, done)
        result = json.loads((metrics.parent / "result.json").read_text())
        assert result["world_size"] == 2
        first = b"".join(operations.read_log(job.id, LogRange(rank=0, attempt=1)))
        assert b"saved" in first or b"checkpoint" in first
        assert b"[rank" not in first
    finally:
        close(controller)
