"""Jobs without a service: what waits goes on by itself, and a service on the same store is no hindrance."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.service import embedded
from trainer.service.controller import Controller
from trainer.service.jobs import JobSpec, JobState, Stop
from trainer.service.operations import LogRange, Operations
from trainer.service.store import JobStore, StoreError

Script = Callable[..., JobSpec]
FAILS_ONCE = "n = len(list(run.iterdir())); (run / str(n)).touch()\nif n < 1: sys.exit(1)\n"
FAILS_ONCE += "(run / 'result.json').write_text('{}')"


def test_a_retry_starts_while_another_job_runs(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.service.outcome.FIRST_PAUSE_S", 0.3)
    long, _ = store.add(script("time.sleep(60)"), owner="ada")
    short, _ = store.add(script(FAILS_ONCE, max_retries=1), owner="ada")
    while store.get(short.id).num_retries == 0:
        assert controller.make_pass()
        time.sleep(0.02)
    controller.resign()
    embedded.advance_until_idle(str(tmp_path / "jobs.db"))  # as the runner of the short one does
    assert store.get(short.id).attempt == 2
    store.request_stop(store.get(long.id), Stop.KILL)
    while store.get(long.id).state is not JobState.CANCELLED:
        assert controller.make_pass()
        time.sleep(0.02)


def test_a_store_that_is_away_when_a_job_ends_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    errors: list[Exception] = [StoreError("full"), ConfigError("cannot be opened")]
    monkeypatch.setattr(embedded, "_STORE_PAUSE_S", 0.0)
    monkeypatch.setattr(embedded, "advance", lambda *_: errors and (_ for _ in ()).throw(errors.pop()))
    embedded.advance_until_idle(str(tmp_path / "jobs.db"))
    assert not errors


def test_followers_wait_for_a_store_that_is_away_and_go_on_where_they_were(
    store: JobStore, controller: Controller, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.service.patience.ASK_EVERY_S", 0.05)
    told: list[str] = []
    operations = Operations(store, controller, controller.make_pass, controller.make_pass, told.append)
    code = "for i in range(30): print(i, flush=True); time.sleep(0.05)\n(run / 'result.json').write_text('{}')"
    job = operations.submit(script(code), owner="ada")
    with ThreadPoolExecutor(2) as pool:
        watched = pool.submit(lambda: [event.number for event in operations.watch(job.id)])
        followed = pool.submit(lambda: b"".join(operations.read_log(job.id, LogRange(follow=True))))
        while operations.get(job.id).state is not JobState.RUNNING:
            time.sleep(0.05)
        time.sleep(0.3)
        (tmp_path / "jobs.db").rename(tmp_path / "away.db")
        (tmp_path / "jobs.db").write_text("this is no database")
        until = time.monotonic() + 20
        while len(told) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        (tmp_path / "away.db").rename(tmp_path / "jobs.db")
        assert watched.result(20) == list(range(1, store.get(job.id).next_event))
        assert followed.result(20).split() == [b"%d" % number for number in range(30)]
    assert [line.partition(": ")[0] for line in told] == ["the store of the jobs cannot be used"] * 2


def test_a_command_waits_for_the_next_pass_of_a_service_and_no_longer(store: JobStore, tmp_path: Path) -> None:
    service, over = Controller(store, tmp_path), threading.Event()
    assert service.make_pass()

    def lead() -> None:
        while not over.wait(0.2):
            service.make_pass()

    leading = threading.Thread(target=lead)
    leading.start()
    try:
        began = time.monotonic()
        embedded.advance(store, Controller(store, tmp_path))
        assert time.monotonic() - began < 2.0
    finally:
        over.set()
        leading.join()
