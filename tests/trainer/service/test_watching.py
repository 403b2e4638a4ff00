"""One look serves all watchers, also those that are slow."""

import asyncio
from dataclasses import replace

import pytest

from trainer.service import watching
from trainer.service.controller import Controller
from trainer.service.jobs import Event, Job, JobSpec, JobState
from trainer.service.operations import Operations
from trainer.service.store import JobStore, StoreError

JOB = Job(
    id=1,
    spec=JobSpec(arguments=(), working_folder="/"),
    owner="ada",
    key=None,
    state=JobState.RUNNING,
    submitted_at=0.0,
    next_event=3,
)


def test_the_events_of_many_pages_arrive_and_a_deleted_job_ends_its_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "POLL_S", 0.01)
    looks = iter([JOB, replace(JOB, next_event=40), replace(JOB, next_event=50, state=JobState.FAILED)])

    async def get(_: int) -> Job:
        return next(looks)

    async def read(_: int, after: int) -> list[Event]:  # pages of ten; the last events were deleted with the job
        return [Event(number, 0.0, "note", {"text": ""}) for number in range(after + 1, min(after + 11, 45))]

    async def watch() -> list[int]:
        async with asyncio.timeout(5):
            return [event.number async for event in watching.Watches(get, read).follow(1, 0)]

    assert asyncio.run(watch()) == list(range(1, 45))


def test_a_watch_ends_with_the_jobs_end_though_it_was_retried_meanwhile(
    store: JobStore, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = JobSpec(arguments=(), working_folder="/")
    ended = store.change(store.add(spec, owner="ada")[0], JobState.CANCELLED)
    store.change(ended, JobState.QUEUED, "retried by its user")

    async def get(_: int) -> Job:  # what was read just before
        return ended

    async def read(number: int, after: int) -> list[Event]:
        return store.events(number, after=after)

    async def watch() -> list[int]:
        return [event.number async for event in watching.Watches(get, read).follow(ended.id, 0)]

    assert asyncio.run(watch()) == [1, 2]
    monkeypatch.setattr(store, "get", lambda *_, **__: ended)
    assert [event.number for event in Operations(store, controller, lambda: None).watch(ended.id)] == [1, 2]


def test_a_watcher_that_was_busy_while_the_looking_failed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "POLL_S", 0.01)
    looks = iter([JOB])

    async def get(_: int) -> Job:
        for job in looks:
            return job
        raise StoreError("away")

    async def read(_: int, after: int) -> list[Event]:
        return [Event(after + 1, 0.0, "note", {"text": ""})]  # a page of one

    async def watch() -> list[int]:
        seen = []
        async for event in watching.Watches(get, read).follow(1, 0):
            seen.append(event.number)
            await asyncio.sleep(0.1)  # meanwhile the looking fails
        return seen

    async def bounded() -> list[int]:
        async with asyncio.timeout(5):
            return await watch()

    with pytest.raises(StoreError):
        asyncio.run(bounded())
