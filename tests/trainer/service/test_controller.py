"""The life of jobs, with real processes that run small scripts in place of trainings."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.service.conftest import run_until
from trainer.errors import ConfigError
from trainer.service import engines
from trainer.service.controller import Controller
from trainer.service.engines import local_runner
from trainer.service.engines.engine import EngineUnavailableError, Phase, Status
from trainer.service.engines.local import LocalEngine
from trainer.service.engines.local_runner import start_time
from trainer.service.jobs import FINAL, Job, JobSpec, JobState, Stop
from trainer.service.operations import LogRange, Operations
from trainer.service.store import JobStore

Script = Callable[..., JobSpec]
COMPLETE = "(run / 'result.json').write_text(json.dumps({'test_accuracy': 0.5}))\n"
SAVES = (
    "def save(*_):\n    (run / 'saved').write_text('x'); sys.exit(143)\n"
    "signal.signal(signal.SIGTERM, save); (run / 'ready').touch()\n"
    "while True: time.sleep(0.02)\n"
)


def states(store: JobStore, number: int) -> list[str]:
    return [event.data["state"] for event in store.events(number) if event.kind == "state"]


def wait_for(path: Path) -> None:
    until = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.01)


def test_a_job_runs_to_its_result(store: JobStore, controller: Controller, script: Script) -> None:
    code = "print('hello'); open(run / 'metrics.jsonl', 'w').write(json.dumps({'kind': 'epoch', 'epoch': 1, 'step': 5"
    code += ", 'val_accuracy': 0.25}) + chr(10)); time.sleep(0.3)\n" + COMPLETE
    job, _ = store.add(script(code), owner="ada")
    job = run_until(controller, store, job.id, *FINAL)
    assert (job.state, job.reason, job.exit_code) == (JobState.SUCCEEDED, "test accuracy 50.00 %", 0)
    assert states(store, job.id) == ["QUEUED", "STARTING", "RUNNING", "SUCCEEDED"]
    progress = [event.data for event in store.events(job.id) if event.kind == "progress"]
    assert [(line["epoch"], line["val_accuracy"]) for line in progress] == [(1, 0.25)]
    assert job.progress["figures"]["val_accuracy"] == 0.25
    (log,) = controller.engine("script").logs(job)
    assert log.read_text() == "hello\n"


@pytest.mark.parametrize(
    ("code", "state", "reason"),
    [
        ("print('error: no recipe x'); sys.exit(2)", JobState.FAILED, "no recipe x"),
        ("sys.exit(3)", JobState.FAILED, "the data cannot be read"),
        ("sys.exit(1)", JobState.FAILED, "exit code 1"),
        ("os.kill(os.getpid(), 9)", JobState.FAILED, "SIGKILL ended it: probably for want of memory"),
        ("sys.exit(0)", JobState.FAILED, "it exited with 0, but its run folder has no result"),
        (COMPLETE + "sys.exit(6)", JobState.FAILED, "the run is complete, but its model could not be exported"),
        (COMPLETE + "sys.exit(143)", JobState.SUCCEEDED, "test accuracy 50.00 %"),
        (COMPLETE + "os.utime(run / 'result.json', (1, 1)); sys.exit(1)", JobState.FAILED, "exit code 1"),
        (COMPLETE + "print('error: of another run'); sys.exit(2)", JobState.FAILED, "of another run"),
        ("(run / 'result.json').write_text('{\"test_accuracy\": \"x\"}')", JobState.SUCCEEDED, ""),
        ("os.write(1, b'error: \\xff\\x1b[2J'); sys.exit(2)", JobState.FAILED, "��[2J"),
        ("os.kill(os.getppid(), 9); time.sleep(9)", JobState.LOST, "its processes are gone, and left no exit code"),
    ],
)
def test_the_end_of_the_processes_decides_the_state(
    code: str, state: JobState, reason: str, store: JobStore, controller: Controller, script: Script
) -> None:
    job, _ = store.add(script(code), owner="ada")
    job = run_until(controller, store, job.id, *FINAL)
    assert (job.state, job.reason) == (state, reason)


def test_what_nobody_foresaw_of_one_job_holds_no_other_up(
    store: JobStore, controller: Controller, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, _ = store.add(replace(script(COMPLETE), run_folder="/a\0b"), owner="eve")
    good, _ = store.add(script(COMPLETE), owner="ada")
    assert run_until(controller, store, good.id, *FINAL).state is JobState.SUCCEEDED
    assert store.get(bad.id).reason == "ValueError: embedded null byte"
    lines: list[str] = []
    noting = Controller(store, Path("/nowhere"), log=lines.append)
    monkeypatch.setattr(noting, "engine", lambda _: None)  # an engine with a defect
    store.add(script(COMPLETE), owner="ada")
    controller.resign()
    for _ in range(2):
        assert noting.make_pass()
    assert sum("--engine script: " in line for line in lines) == 1  # told once


def test_trouble_is_told_once_by_all_controllers_and_taken_back_when_it_is_over(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = store.add(script(SAVES), owner="ada")
    run_until(controller, store, job.id, JobState.RUNNING)
    controller.resign()

    def away(self: object, job: Job) -> Status:
        raise EngineUnavailableError(f"no answer for {time.monotonic()} s")

    with monkeypatch.context() as patched:
        patched.setattr(LocalEngine, "status", away)
        for _ in range(3):  # as each command is one, without a service
            other = Controller(store, tmp_path)
            assert other.make_pass()
            other.resign()
    assert store.get(job.id).reason.startswith("no answer for")
    assert controller.make_pass()
    assert (store.get(job.id).state, store.get(job.id).reason) == (JobState.RUNNING, "")
    assert [event.kind for event in store.events(job.id)] == ["state"] * 3 + ["note"]
    store.request_stop(store.get(job.id), Stop.KILL)
    run_until(controller, store, job.id, *FINAL)


def test_the_log_of_an_attempt_is_its_own(store: JobStore, controller: Controller, script: Script) -> None:
    operations = Operations(store, controller, controller.make_pass)
    job, _ = store.add(script("print('error: of the second'); sys.exit(2)"), owner="ada")
    store.request_stop(store.change(job, JobState.STARTING), Stop.SAVE)  # and killed here
    assert run_until(controller, store, job.id, *FINAL).reason == "before it started"
    operations.retry(job.id)
    assert run_until(controller, store, job.id, *FINAL).reason == "of the second"
    read = {number: b"".join(operations.read_log(job.id, LogRange(attempt=number))) for number in (1, 2)}
    assert read == {1: b"", 2: b"error: of the second\n"}
    for follow in (False, True):
        assert b"".join(operations.read_log(job.id, LogRange(follow=follow))) == read[2]


def test_a_job_that_was_cancelled_before_its_start_is_started_by_no_late_controller(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path
) -> None:
    job, _ = store.add(script(COMPLETE), owner="ada")
    job = store.change(job, JobState.STARTING)
    store.request_stop(job, Stop.SAVE)
    assert run_until(controller, store, job.id, *FINAL).reason == "before it started"
    controller.engine("script").start(job)
    time.sleep(0.2)
    assert not (tmp_path / "runs" / str(job.id)).exists()


def test_a_job_that_was_deleted_before_a_late_controller_started_it_does_not_run(
    store: JobStore, controller: Controller, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(script(SAVES), owner="ada")
    engine = controller.engine("script")
    start, started = engine.start, list[Job]()

    def start_late(job: Job) -> None:
        started.append(job)
        store.delete(store.change(job, JobState.CANCELLED))
        engine.forget(job)
        start(job)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "start", start_late)
        controller.make_pass()
    until = time.monotonic() + 10
    while (phase := engine.status(started[0]).phase) in (Phase.STARTING, Phase.RUNNING) and time.monotonic() < until:
        time.sleep(0.02)
    assert phase not in (Phase.STARTING, Phase.RUNNING)


def test_a_job_that_runs_on_another_host_is_not_started_here(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path
) -> None:
    job, _ = store.add(script("open(run / 'starts', 'a').write('x')\n" + SAVES), owner="ada")
    run_until(controller, store, job.id, JobState.RUNNING)
    wait_for(tmp_path / "runs" / str(job.id) / "ready")
    running = store.get(job.id)
    controller.resign()
    elsewhere = Controller(store, tmp_path / "elsewhere")
    lost = run_until(elsewhere, store, job.id, *FINAL)
    assert (lost.state, "has no files of it" in lost.reason) == (JobState.LOST, True)
    controller.engine("script").stop(running, Stop.KILL)
    assert (tmp_path / "runs" / str(job.id) / "starts").read_text() == "x"


def test_a_job_whose_files_somebody_has_deleted_goes_on_and_can_be_cancelled(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path
) -> None:
    job, _ = store.add(script("open(run / 'starts', 'a').write('x')\n" + SAVES, max_retries=1), owner="ada")
    run_until(controller, store, job.id, JobState.RUNNING)
    run = tmp_path / "runs" / str(job.id)
    wait_for(run / "ready")
    shutil.rmtree(tmp_path / store.identity / "jobs" / str(job.id))
    for _ in range(3):
        assert controller.make_pass()
    running = store.get(job.id)
    assert (running.state, "somebody has deleted its files" in running.reason) == (JobState.RUNNING, True)
    store.request_stop(running, Stop.SAVE)
    assert run_until(controller, store, job.id, *FINAL).state is JobState.CANCELLED
    assert ((run / "starts").read_text(), (run / "saved").exists()) == ("x", True)


def test_a_damaged_exit_code_is_a_lost_job(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path
) -> None:
    job, _ = store.add(script("(run / 'ready').touch(); time.sleep(60)"), owner="ada")
    run_until(controller, store, job.id, JobState.RUNNING)
    wait_for(tmp_path / "runs" / str(job.id) / "ready")
    engine = controller.engine("script")
    folder = engine.logs(store.get(job.id))[0].parent
    assert folder.parent.parent.stat().st_mode & 0o077 == 0  # it holds the variables of jobs
    engine.stop(job := store.get(job.id), Stop.KILL)
    wait_for(folder / "exit.json")
    (folder / "exit.json").write_bytes(b"\0" * 128)  # a power failure
    assert run_until(controller, store, job.id, *FINAL).state is JobState.LOST


def test_the_report_of_the_rank_that_failed_is_the_reason(
    store: JobStore, controller: Controller, script: Script
) -> None:
    report = {"message": "rank 3: no space left", "ranks": [3]}
    job, _ = store.add(script(f"(run / 'failure.json').write_text({json.dumps(report)!r}); sys.exit(1)"), owner="ada")
    job = run_until(controller, store, job.id, *FINAL)
    assert (job.reason, job.failing_rank) == ("rank 3: no space left", 3)


def test_a_failure_that_may_pass_is_tried_again_after_a_pause(
    store: JobStore, controller: Controller, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.service.outcome.FIRST_PAUSE_S", 0.05)
    code = "n = len(list(run.iterdir())); (run / str(n)).touch()\nif n < 2: sys.exit(1)\n" + COMPLETE
    job, _ = store.add(script(code, max_retries=2), owner="ada")
    job = run_until(controller, store, job.id, *FINAL)
    assert (job.state, job.attempt, job.num_retries) == (JobState.SUCCEEDED, 3, 2)
    reasons = [event.data["reason"] for event in store.events(job.id) if event.data.get("state") == "QUEUED"]
    assert reasons[1:] == ["exit code 1; retry 1 of 2 in 0 s", "exit code 1; retry 2 of 2 in 0 s"]
    assert len(controller.engine("script").logs(job)) == 3


def test_a_job_that_was_stopped_from_outside_is_continued_and_that_is_no_failure(
    store: JobStore, controller: Controller, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.service.outcome.FIRST_PAUSE_S", 0.05)
    code = "if (run / 'once').exists():\n    " + COMPLETE + "    sys.exit(0)\n(run / 'once').touch(); sys.exit(143)"
    job, _ = store.add(script(code), owner="ada")
    job = run_until(controller, store, job.id, *FINAL)
    assert (job.state, job.attempt, job.num_retries) == (JobState.SUCCEEDED, 2, 0)


def test_a_job_that_is_stopped_again_and_again_before_it_gets_further_has_failed(
    store: JobStore, controller: Controller, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.service.outcome.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("trainer.service.outcome.MAX_STALLS", 2)
    # A checkpoint in the second and in the third attempt.
    code = "n = len(list(run.glob('[0-9]*'))); (run / str(n)).touch()\n"
    code += "if n in (1, 2): (run / f'checkpoints/step-{n:08d}').mkdir(parents=True)\n"
    job, _ = store.add(script(code + "os.kill(os.getpid(), 15); time.sleep(9)"), owner="ada")
    job = run_until(controller, store, job.id, *FINAL)
    reason = "it was stopped from outside and saved, 2 times in a row before it came beyond step 2: "
    assert (job.state, job.attempt, job.reason[: len(reason)]) == (JobState.FAILED, 5, reason)
    assert store.change(job, JobState.QUEUED).progress["num_stalls"] == 0


@pytest.mark.parametrize("now", [False, True])
def test_a_cancelled_job_saves_and_can_be_continued_or_ends_at_once(
    now: bool, store: JobStore, controller: Controller, script: Script, tmp_path: Path
) -> None:
    operations = Operations(store, controller, controller.make_pass)
    job = operations.submit(script(SAVES), owner="ada")
    wait_for(tmp_path / "runs" / str(job.id) / "ready")
    operations.cancel(job.id, now=now)
    job = run_until(controller, store, job.id, *FINAL)
    assert job.state is JobState.CANCELLED
    assert job.reason.startswith("ended at once" if now else "saved")
    assert (tmp_path / "runs" / str(job.id) / "saved").exists() is not now
    assert states(store, job.id)[-2:] == ["SAVING", "CANCELLED"]
    assert operations.retry(job.id).attempt == 2
    operations.cancel(job.id, now=True)
    run_until(controller, store, job.id, *FINAL)


def test_a_second_request_ends_a_job_that_does_not_listen_with_all_its_processes(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path
) -> None:
    code = "import subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
    code += "(run / 'tmp').write_text(str(child.pid)); os.rename(run / 'tmp', run / 'ready'); child.wait()"
    operations = Operations(store, controller, controller.make_pass)
    job = operations.submit(script(code), owner="ada")
    ready = tmp_path / "runs" / str(job.id) / "ready"
    wait_for(ready)
    operations.cancel(job.id)
    assert run_until(controller, store, job.id, JobState.SAVING).stop is Stop.SAVE
    operations.cancel(job.id)
    assert run_until(controller, store, job.id, *FINAL).state is JobState.CANCELLED
    with pytest.raises(ProcessLookupError):
        start_time(int(ready.read_text()))


def test_a_queued_job_is_cancelled_before_it_starts(store: JobStore, controller: Controller, script: Script) -> None:
    operations = Operations(store, controller, lambda: None)
    job = operations.submit(script("pass"), owner="ada")
    assert operations.cancel(job.id).state is JobState.CANCELLED
    assert operations.retry(job.id).state is JobState.QUEUED


def test_jobs_wait_for_devices_and_the_next_one_starts_when_one_ends(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path
) -> None:
    busy, _ = store.add(script(SAVES, gpus=2), owner="ada")
    waits, _ = store.add(script("print(os.environ['CUDA_VISIBLE_DEVICES'])\n" + COMPLETE, gpus=1), owner="ada")
    wait_for_running = run_until(controller, store, busy.id, JobState.RUNNING)
    assert wait_for_running.devices.gpus == ("0", "1")
    assert store.get(waits.id).state is JobState.QUEUED
    wait_for(tmp_path / "runs" / str(busy.id) / "ready")
    store.request_stop(store.get(busy.id), Stop.KILL)
    job = run_until(controller, store, waits.id, *FINAL)
    assert job.state is JobState.SUCCEEDED
    assert controller.engine("script").logs(job)[0].read_text() == "0\n"


def test_a_controller_that_was_killed_before_the_start_is_made_good_and_nothing_starts_twice(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path
) -> None:
    job, _ = store.add(script("open(run / 'starts', 'a').write('x')\n" + COMPLETE), owner="ada")
    job = store.change(job, JobState.STARTING)  # and killed here
    engine = controller.engine("script")
    run_until(controller, store, job.id, *FINAL)
    for _ in range(3):
        engine.start(job)  # what a late controller would do
    time.sleep(0.2)
    assert (tmp_path / "runs" / str(job.id) / "starts").read_text() == "x"


def test_one_controller_leads_and_another_takes_over_when_it_resigns(store: JobStore, tmp_path: Path) -> None:
    first, second = Controller(store, tmp_path), Controller(store, tmp_path)
    assert first.make_pass()
    assert not second.make_pass()
    first.resign()
    assert second.make_pass()
    assert not first.make_pass()


def test_a_job_whose_engine_is_gone_holds_up_no_other(
    store: JobStore, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    controller = Controller(store, tmp_path, log=said.append)
    gone, _ = store.add(JobSpec(arguments=(), engine="away", working_folder=str(tmp_path)), owner="ada")
    job, _ = store.add(script(COMPLETE), owner="ada")
    assert run_until(controller, store, job.id, *FINAL).state is JobState.SUCCEEDED
    assert store.get(gone.id).state is JobState.QUEUED
    assert any(line.startswith("--engine away: there are local, slurm") for line in said)


def test_the_output_and_the_environment_are_the_jobs(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path
) -> None:
    code = "print(os.environ['A'], os.getcwd(), os.sched_getaffinity(0), file=sys.stderr)\n" + COMPLETE
    job, _ = store.add(script(code, environment={"A": "b"}), owner="ada")
    job = run_until(controller, store, job.id, *FINAL)
    cpus = set(job.devices.cpus) & os.sched_getaffinity(0)
    assert controller.engine("script").logs(job)[0].read_text() == f"b {tmp_path} {cpus}\n"


def test_a_killed_runner_takes_the_job_with_it_after_a_save(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path
) -> None:
    job, _ = store.add(script(SAVES), owner="ada")
    run_until(controller, store, job.id, JobState.RUNNING)
    run = tmp_path / "runs" / str(job.id)
    wait_for(run / "ready")
    process: dict[str, Any] = json.loads(
        (tmp_path / store.identity / "jobs" / str(job.id) / "attempt-1" / "process.json").read_text()
    )
    os.kill(process["pid"], signal.SIGKILL)
    assert run_until(controller, store, job.id, *FINAL).state is JobState.LOST
    wait_for(run / "saved")


def test_a_job_that_does_not_listen_is_ended_without_its_runner(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path
) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); (run / 'ready').touch(); time.sleep(60)"
    job, _ = store.add(script(code), owner="ada")
    run_until(controller, store, job.id, JobState.RUNNING)
    wait_for(tmp_path / "runs" / str(job.id) / "ready")
    (process,) = (tmp_path / store.identity).glob("jobs/*/attempt-1/process.json")
    os.kill(json.loads(process.read_text())["pid"], signal.SIGKILL)
    store.request_stop(store.get(job.id), Stop.KILL)
    assert run_until(controller, store, job.id, *FINAL).reason.startswith("ended at once")


@pytest.mark.parametrize("holds_lock", [True, False])
def test_what_a_killed_runner_has_left_in_other_sessions_is_the_jobs_until_a_user_ends_it(
    holds_lock: bool, store: JobStore, controller: Controller, script: Script, tmp_path: Path
) -> None:
    code = "import subprocess; rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
    code += (
        f"start_new_session=True, close_fds={not holds_lock}); (run / 'rank').write_text(str(rank.pid)); sys.exit(1)"
    )
    job, _ = store.add(script(code, max_retries=1), owner="ada")
    run_until(controller, store, job.id, JobState.RUNNING)
    wait_for(tmp_path / "runs" / str(job.id) / "rank")
    (process,) = (tmp_path / store.identity).glob("jobs/*/attempt-1/process.json")
    os.kill(json.loads(process.read_text())["pid"], signal.SIGKILL)
    time.sleep(0.2)
    for _ in range(3):
        controller.make_pass()
    job = store.get(job.id)
    assert (job.state, job.attempt) == (JobState.RUNNING, 1), "no other attempt runs beside it"
    assert job.reason.startswith("somebody has killed its runner; what is left of it goes on")
    store.request_stop(job, Stop.KILL)
    assert run_until(controller, store, job.id, *FINAL).state is JobState.CANCELLED
    pid = int((tmp_path / "runs" / str(job.id) / "rank").read_text() or 0)
    assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()


def test_jobs_of_another_store_in_the_same_folder_are_others(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path
) -> None:
    failed, _ = store.add(script("sys.exit(2)"), owner="ada")
    assert run_until(controller, store, failed.id, *FINAL).state is JobState.FAILED
    with JobStore(str(tmp_path / "other.db")) as other:
        job, _ = other.add(script(COMPLETE), owner="ada")
        assert job.id == failed.id
        assert run_until(Controller(other, tmp_path), other, job.id, *FINAL).state is JobState.SUCCEEDED


def test_jobs_of_two_stores_have_no_gpu_at_the_same_time(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engines._OURS, "script", "tests.trainer.service.script_engine:HoldingEngine")
    mine, _ = store.add(script(SAVES, gpus=1), owner="ada")
    run_until(controller, store, mine.id, JobState.RUNNING)
    with JobStore(str(tmp_path / "other.db")) as other:
        others = Controller(other, tmp_path)
        with_the_other_gpu, both = (other.add(script(SAVES, gpus=gpus), owner="bob")[0] for gpus in (1, 2))
        first = run_until(others, other, with_the_other_gpu.id, JobState.RUNNING)
        assert first.devices.gpus != store.get(mine.id).devices.gpus
        other.request_stop(first, Stop.KILL)
        run_until(others, other, both.id, JobState.STARTING)
        until = time.monotonic() + 10
        while not other.get(both.id).reason:
            assert others.make_pass()
            assert time.monotonic() < until
            time.sleep(0.05)
        waits = other.get(both.id)
        (gpu,) = store.get(mine.id).devices.gpus
        assert (waits.state, waits.reason) == (
            JobState.STARTING,
            f"GPU {gpu} is used by a job of another store of this machine",
        )
        store.request_stop(store.get(mine.id), Stop.KILL)
        run_until(controller, store, mine.id, *FINAL)
        assert run_until(others, other, both.id, JobState.RUNNING).reason == ""
        third, _ = store.add(script(SAVES, gpus=1), owner="ada")
        run_until(controller, store, third.id, JobState.STARTING)
        store.request_stop(store.get(third.id), Stop.SAVE)  # while it waits
        assert run_until(controller, store, third.id, *FINAL).state is JobState.CANCELLED
        other.request_stop(other.get(both.id), Stop.KILL)
        run_until(others, other, both.id, *FINAL)


def test_a_job_that_prints_for_ever_fills_no_disk(store: JobStore, controller: Controller, script: Script) -> None:
    job, _ = store.add(script("for n in range(200): print(n, 'x' * 999_990, flush=True)\n" + COMPLETE), owner="ada")
    job = run_until(controller, store, job.id, *FINAL)
    (log,) = controller.engine("script").logs(job)
    assert log.stat().st_blocks * 512 < 66 * 2**20 < log.stat().st_size
    operations = Operations(store, controller, controller.make_pass)
    lines = b"".join(operations.read_log(job.id, LogRange())).splitlines()
    words = [line.split()[0] for line in lines if b" " in line]  # without the begin of one that is missing
    last = [b"%d" % number for number in range(200 - (len(words) - 18), 200)]
    assert (words, len(last) >= 33) == ([*(b"%d" % number for number in range(17)), b"[log]", *last], True)


def test_starting_takes_a_fraction_of_a_second_and_no_torch() -> None:
    code = "import sys, trainer.service.commands; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_full_disk_delays_a_job_and_its_user_is_told_once(
    store: JobStore, controller: Controller, script: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job, _ = store.add(script("(run / 'result.json').write_text('{}')"), owner="ada")
    with monkeypatch.context() as patched:
        patched.setattr("trainer.service.engines.local.write_json", full)
        for _ in range(3):
            controller.make_pass()
        waiting = store.get(job.id)
    assert (waiting.state, waiting.attempt, waiting.num_retries) == (JobState.STARTING, 1, 0)
    assert waiting.reason.endswith("No space left on device")
    assert [event.kind for event in store.events(job.id)] == ["state", "state", "note"]
    assert run_until(controller, store, job.id, *FINAL).state is JobState.SUCCEEDED


def test_an_exit_code_has_its_room_before_the_disk_is_full(tmp_path: Path) -> None:
    local_runner._reserve(tmp_path / "exit.json")
    room = (tmp_path / "exit.tmp").stat()
    local_runner._fill(tmp_path / "exit.json", {"code": -15, "time": time.time()})
    filled = (tmp_path / "exit.json").stat()
    assert (filled.st_ino, filled.st_size) == (room.st_ino, room.st_size)
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == -15


@pytest.mark.parametrize(("number", "code"), [(errno.ENOMEM, 1), (errno.ENOENT, 127)])
def test_a_machine_without_room_for_a_process_is_a_failure_that_may_pass(
    number: int, code: int, tmp_path: Path
) -> None:
    script = "import pathlib, sys; from trainer.service.engines import local_runner as runner\n"
    script += f"def fail(*_, **__): raise OSError({number}, 'no room')\n"
    script += (
        "runner.subprocess.Popen = fail; command = {'arguments': ['x'], 'folder': '/', 'environment': {}, 'gpus': []}\n"
    )
    script += "runner.run(pathlib.Path(sys.argv[1]), 0, command)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == code


def test_what_the_cluster_ended_is_queued_again_and_is_no_failure(
    store: JobStore, controller: Controller, script: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = store.add(script("time.sleep(60)"), owner="ada")
    run_until(controller, store, job.id, JobState.RUNNING)
    engine = controller.engine("script")
    engine.stop(store.get(job.id), Stop.KILL)
    monkeypatch.setattr(engine, "status", lambda _: Status(Phase.INTERRUPTED, reason="a host was lost"))
    queued = run_until(controller, store, job.id, JobState.QUEUED)
    assert (queued.reason, queued.num_retries, queued.not_before > 0) == ("a host was lost", 0, True)


def test_a_job_that_can_never_start_has_failed_at_once_and_no_late_controller_starts_it(
    store: JobStore, controller: Controller, script: Callable[..., JobSpec], tmp_path: Path
) -> None:
    def refuse(_: Job) -> None:
        raise ConfigError("the object is refused")

    job, _ = store.add(script("(run / 'started').touch()", max_retries=5), owner="ada")
    engine = controller.engine("script")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "start", refuse)
        failed = run_until(controller, store, job.id, *FINAL)
    assert (failed.state, failed.reason) == (JobState.FAILED, "the object is refused")
    engine.start(failed)  # what a controller does that was paused before its own start
    assert engine.status(failed).phase is Phase.ENDED
    assert not (tmp_path / "runs" / str(job.id)).exists()
