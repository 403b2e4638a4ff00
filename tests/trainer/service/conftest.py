"""A store, a controller, and the engine that runs scripts."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer.service import engines
from trainer.service.controller import Controller
from trainer.service.jobs import Job, JobSpec, JobState
from trainer.service.store import JobStore


@pytest.fixture(autouse=True)
def script_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines._OURS, "script", "tests.trainer.service.script_engine:ScriptEngine")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore(str(tmp_path / "jobs.db")) as opened:
        yield opened


@pytest.fixture
def controller(store: JobStore, tmp_path: Path) -> Controller:
    return Controller(store, tmp_path)


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., JobSpec]:
    """Makes jobs that run a script; `sys.argv[1]` is the run folder, which exists."""

    def make(code: str, **values: object) -> JobSpec:
        head = "import sys, os, signal, time, json, pathlib; run = pathlib.Path(sys.argv[1]); "
        head += "run.mkdir(parents=True, exist_ok=True)\n"
        folder = str(tmp_path / "runs" / "{id}")
        return JobSpec(
            arguments=(head + code,),
            engine="script",
            working_folder=str(tmp_path),
            run_folder=folder,
            **{"cpus": 1, "max_retries": 0, **values},  # type: ignore[arg-type]
        )

    return make


def run_until(controller: Controller, store: JobStore, number: int, *states: JobState, timeout_s: float = 20.0) -> Job:
    """Makes passes until the job is in one of the states."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        assert controller.make_pass()
        job = store.get(number)
        if job.state in states:
            return job
        time.sleep(0.03)
    raise AssertionError(f"job {number} is {job.state}: {job.reason}")
