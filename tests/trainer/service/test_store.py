"""The store: each change is guarded by what it leaves; events are numbered without gaps; the lease has one holder."""

import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from trainer.errors import ConfigError
from trainer.service import store as store_module
from trainer.service.jobs import FINAL, FOLLOWING, JobSpec, JobState, Stop
from trainer.service.store import JobStateError, JobStore, Lease, StaleError, StoreError, UnknownJobError

SPEC = JobSpec(arguments=("--epochs", "3"), working_folder="/work", run_folder="/runs/job-{id}")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "jobs.db")


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as opened:
        yield opened


def test_a_job_is_stored_whole_and_its_folder_has_its_number(store: JobStore) -> None:
    spec = replace(SPEC, gpus=2, nodes=(1, 4), environment={"A": "b"}, priority=3)
    job, is_new = store.add(spec, owner="ada")
    assert is_new
    assert (job.id, job.state, job.owner) == (1, JobState.QUEUED, "ada")
    assert store.get(1).spec == replace(spec, run_folder="/runs/job-1")
    assert [event.data["state"] for event in store.events(1)] == ["QUEUED"]


def test_a_key_submits_once_for_each_owner(store: JobStore) -> None:
    first, _ = store.add(SPEC, owner="ada", key="k")
    again, is_new = store.add(SPEC, owner="ada", key="k")
    other, other_is_new = store.add(SPEC, owner="bob", key="k")
    with pytest.raises(JobStateError, match="the key was used for job 1, which is another training"):
        store.add(replace(SPEC, gpus=1), owner="ada", key="k")
    assert (again, is_new, other_is_new) == (first, False, True)
    assert other.id != first.id


def test_threads_that_submit_one_key_get_one_job(store: JobStore) -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(store.add(SPEC, owner="ada", key="k")[0].id)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 8


def test_a_change_from_a_state_that_has_passed_changes_nothing(store: JobStore) -> None:
    job, _ = store.add(SPEC, owner="ada")
    starting = store.change(job, JobState.STARTING)
    for late in (job, replace(starting, attempt=7), replace(starting, stop=Stop.SAVE)):
        state = JobState.CANCELLED if late is job else JobState.RUNNING
        with pytest.raises(StaleError):
            store.change(late, state)
    assert store.get(job.id) == starting
    assert [event.data["state"] for event in store.events(job.id)] == ["QUEUED", "STARTING"]


def test_a_controller_without_its_lease_changes_nothing(store: JobStore) -> None:
    job, _ = store.add(SPEC, owner="ada")
    lease = store.acquire_lease("first", 0.0)
    assert lease is not None
    newer = store.acquire_lease("second", 60.0)
    assert newer == Lease("second", 2)
    with pytest.raises(StaleError):
        store.change(job, JobState.STARTING, lease=lease)
    with pytest.raises(StaleError):
        store.add_progress(job, [{"step": 1}], {}, lease)
    assert store.get(job.id) == job
    assert store.change(job, JobState.STARTING, lease=newer).attempt == 1


def test_the_lease_has_one_holder_until_it_ends_or_is_given_up(store: JobStore) -> None:
    mine = store.acquire_lease("me", 60.0)
    assert mine is not None
    assert store.acquire_lease("other", 60.0) is None
    assert store.acquire_lease("me", 60.0) == mine
    store.release_lease(mine)
    theirs = store.acquire_lease("other", 60.0)
    assert theirs is not None
    store.release_lease(mine)  # too late: it is the other's now
    assert store.acquire_lease("me", 60.0) is None


def test_a_clock_that_is_put_back_keeps_nobody_from_the_lease(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.acquire_lease("gone", 60.0)
    now = time.time()
    monkeypatch.setattr(store_module.time, "time", lambda: now - 3600)
    assert store.acquire_lease("me", 60.0)


def test_a_reason_is_one_line_for_any_terminal(store: JobStore) -> None:
    job, _ = store.add(SPEC, owner="ada")
    changed = store.change(job, JobState.CANCELLED, "a\nb\x1b[31m\0\udcff" + "c" * 2000)
    assert changed.reason == "a b�[31m��" + "c" * 989 + "…"
    assert store.events(job.id)[-1].data["reason"] == changed.reason


def test_every_state_that_may_follow_does_and_no_other(store: JobStore) -> None:
    for state, following in FOLLOWING.items():
        for new in JobState:
            job, _ = store.add(SPEC, owner="ada")
            with store._engine.begin() as connection:
                connection.execute(sa.update(store_module.jobs).values(state=state))
            if new in following:
                changed = store.change(store.get(job.id), new, "why")
                assert (changed.state, changed.ended_at is not None) == (new, new in FINAL)
            else:
                with pytest.raises(ValueError, match="cannot follow"):
                    store.change(store.get(job.id), new)


def test_events_are_numbered_without_gaps_by_all_that_append(store: JobStore) -> None:
    job, _ = store.add(SPEC, owner="ada")
    lease = store.acquire_lease("me", 60.0)
    assert lease is not None
    job = store.change(job, JobState.STARTING)
    threads = [
        threading.Thread(
            target=lambda: [store.add_progress(job, [{"step": 1}, {"step": 2}], {"step": 2}, lease) for _ in range(5)]
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [event.number for event in store.events(job.id)]
    assert numbers == list(range(1, 43))
    assert [event.number for event in store.events(job.id, after=40)] == [41, 42]
    assert store.get(job.id).next_event == 43


def test_a_history_is_the_newest_changes_without_the_figures_between_them(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_HISTORY", 3)
    lease = store.acquire_lease("a", 60)
    assert lease is not None
    job = store.change(store.add(SPEC, owner="ada")[0], JobState.STARTING)
    job = store.change(job, JobState.RUNNING)
    store.add_note(job, "waits", lease)
    store.add_progress(job, [{"step": number} for number in range(2000)], {}, lease)
    store.change(job, JobState.FAILED)
    assert [event.number for event in store.history(job.id)] == [3, 4, 2005]


def test_jobs_are_found_by_page_owner_and_state(store: JobStore) -> None:
    for number in range(6):
        store.add(SPEC, owner="ada" if number % 2 else "bob")
    store.change(store.get(2), JobState.CANCELLED)
    assert [job.id for job in store.find(limit=2)] == [6, 5]
    assert [job.id for job in store.find(limit=9, before=5)] == [4, 3, 2, 1]
    assert [job.id for job in store.find(owner="ada")] == [6, 4, 2]
    assert [job.id for job in store.find(owner="ada", states=[JobState.CANCELLED])] == [2]


def test_the_queue_is_in_the_order_of_priorities_and_numbers(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for priority, engine in ((0, "a"), (5, "a"), (0, "a"), (5, "a"), (0, "b")):
        store.add(replace(SPEC, priority=priority, engine=engine), owner="ada")
    queued = store.queued(store.now())
    assert {engine: [job.id for job in found] for engine, found in queued.items()} == {"a": [2, 4, 1, 3], "b": [5]}
    monkeypatch.setattr(store_module, "MAX_CONSIDERED", 2)
    queued = store.queued(store.now())
    assert {engine: [job.id for job in found] for engine, found in queued.items()} == {"a": [2, 4], "b": [5]}


def test_others_jobs_do_not_exist(store: JobStore) -> None:
    job, _ = store.add(SPEC, owner="ada")
    for number, owner in ((job.id, "bob"), (99, None), (2**70, None)):
        with pytest.raises(UnknownJobError, match=f"there is no job {number}"):
            store.get(number, owner=owner)


def test_a_deleted_job_takes_its_events_and_never_gives_its_number(store: JobStore) -> None:
    job, _ = store.add(SPEC, owner="ada")
    with pytest.raises(ConfigError, match="cancel it first"):
        store.delete(job)
    store.delete(store.change(job, JobState.CANCELLED))
    assert store.events(job.id) == []
    assert store.add(SPEC, owner="ada")[0].id == job.id + 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://host/name", "must be the path of a file"),
        ("ada:secret@://", "must be the path of a file"),
        ("/dev/null/jobs.db", "cannot be opened"),
        ("postgresql://ada:secret@127.0.0.1:1/jobs", r"cannot be opened|convoy-vision\[postgres\]"),
    ],
)
def test_a_store_that_cannot_be_opened_is_one_line(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        JobStore(url)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "jobs.db")
    with JobStore(path) as store, store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE convoy_jobs SET schema_version = 99")
    with pytest.raises(ConfigError, match="a newer version"):
        JobStore(path)


def test_a_full_database_says_so_and_loses_nothing(store: JobStore) -> None:
    job, _ = store.add(SPEC, owner="ada")
    pages = sa.event.listens_for(store._engine, "connect")
    pages(lambda connection, _: connection.execute("PRAGMA max_page_count=1"))  # fewer than it has: none is added
    large = replace(SPEC, environment={"A": "b" * 100_000})
    with pytest.raises(StoreError, match="full"):
        store.add(large, owner="ada")
    assert store.get(job.id) == job


def test_a_damaged_database_says_so(store: JobStore, url: str) -> None:
    for _ in range(10):
        store.add(SPEC, owner="ada")
    size = Path(url).stat().st_size
    with Path(url).open("r+b") as file:
        file.seek(4096)
        file.write(b"x" * (size - 4096))
    with pytest.raises(StoreError, match=r"malformed|disk I/O"):
        store.active()


@pytest.mark.parametrize(("put_back_s", "pause_s"), [(0, 60), (30, 90), (3600, None), (-3600, None)])
def test_a_pause_ends_whatever_the_clock_does(
    put_back_s: float, pause_s: float | None, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = store.add(SPEC, owner="ada")
    store.change(store.change(job, JobState.STARTING), JobState.QUEUED, pause_s=60)
    now = time.time()
    monkeypatch.setattr(store_module.time, "time", lambda: now - put_back_s)
    assert store.next_pause_s() == (None if pause_s is None else pytest.approx(pause_s, abs=1))
    assert bool(store.queued(store.now())) is (pause_s is None)


def test_services_that_create_one_new_store_at_once_agree_on_it_and_one_leads(url: str) -> None:
    together = threading.Barrier(6, timeout=60)

    def create(number: int) -> tuple[str, bool]:
        together.wait()
        with JobStore(url) as opened:
            together.wait()
            return opened.identity, opened.acquire_lease(f"service {number}", 60.0) is not None

    with ThreadPoolExecutor(6) as pool:
        identities, leads = zip(*pool.map(create, range(6)), strict=True)
    assert (len(set(identities)), sum(leads)) == (1, 1)


def test_a_store_waits_for_another_process_that_writes_its_new_database(url: str) -> None:
    """SQLite refuses the change to a write-ahead log at once then, whatever its time-out."""
    with closing(sqlite3.connect(url, isolation_level=None)) as other, ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN IMMEDIATE")
        opened = pool.submit(JobStore, url)
        with pytest.raises(TimeoutError):
            opened.result(0.2)
        other.execute("ROLLBACK")
        with opened.result(10) as store:
            assert store.active() == []
