"""Polls each watched job once for all its watchers."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from trainer.service.jobs import FINAL, Event, Job

POLL_S = 0.3
MAX_KEPT = 1000
"""Events of a job that are kept in memory while it is watched."""


@dataclass(slots=True)
class _Watched:
    """A job that somebody watches.

    Args:
        events: the newest ones, without gaps.
        changed: set, and replaced by a new one, at each poll that found new events.
    """

    job: Job
    events: list[Event]
    num_watchers: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Watches:
    """The jobs that are watched. For one event loop.

    Args:
        get: returns a job.
        read: returns a job's events after the one of that number, at most a store's page of them.
    """

    def __init__(
        self, get: Callable[[int], Awaitable[Job]], read: Callable[[int, int], Awaitable[list[Event]]]
    ) -> None:
        self._get = get
        self._read = read
        self._watched: dict[int, _Watched] = {}

    def __len__(self) -> int:
        """Returns the number of jobs that somebody watches."""
        return len(self._watched)

    async def follow(self, number: int, after: int) -> AsyncGenerator[Event]:
        """Yields a job's events after the one of that number, until the job has ended.

        Raises:
            TrainerError: as `get` does.
        """
        watched = await self._enter(number)
        try:
            while True:
                changed, job = watched.changed, watched.job
                # None that came later: the job may have ended, and been retried since.
                found = [event for event in await self._after(watched, after) if event.number < job.next_event]
                for event in found:
                    after = event.number
                    yield event
                if job.state in FINAL and after >= job.next_event - 1:
                    return
                if not found or after >= job.next_event - 1:
                    assert watched.task is not None
                    if not watched.task.done():  # else nobody would wake this watcher, which was busy until now
                        await changed.wait()
                    if watched.task.done():
                        watched.task.result()  # raises what ended the polling
                        if watched.job is job:  # somebody has deleted the job, and the rest of its events
                            return
        finally:
            self._leave(number, watched)

    async def _enter(self, number: int) -> _Watched:
        watched = self._watched.get(number)
        if watched is None or (watched.task is not None and watched.task.done()):
            watched = self._watched[number] = _Watched(await self._get(number), [])
        watched.num_watchers += 1
        if watched.task is None:
            watched.task = asyncio.create_task(self._poll(number, watched))
        return watched

    def _leave(self, number: int, watched: _Watched) -> None:
        watched.num_watchers -= 1
        if watched.num_watchers == 0:
            if self._watched.get(number) is watched:
                del self._watched[number]
            if watched.task is not None:
                watched.task.cancel()

    async def _after(self, watched: _Watched, after: int) -> list[Event]:
        kept = watched.events
        if kept and kept[0].number <= after + 1:
            return kept[after + 1 - kept[0].number :]
        return await self._read(watched.job.id, after)

    async def _poll(self, number: int, watched: _Watched) -> None:
        """Polls the store; wakes the watchers when the job has new events, and when the store fails."""
        try:
            while watched.job.state not in FINAL:
                await asyncio.sleep(POLL_S)
                job = await self._get(number)
                if job.next_event != watched.job.next_event:
                    last = watched.events[-1].number if watched.events else watched.job.next_event - 1
                    while last < job.next_event - 1 and (page := await self._read(number, last)):
                        watched.events = (watched.events + page)[-MAX_KEPT:]
                        last = page[-1].number
                    watched.job = job
                    self._wake(watched)
        finally:
            self._wake(watched)

    def _wake(self, watched: _Watched) -> None:
        changed, watched.changed = watched.changed, asyncio.Event()
        changed.set()
