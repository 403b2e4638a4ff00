"""The methods of the service, without a protocol: who calls, what they may see, and how many are served at a time."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from convoy.auth import Principal, TokenFile
from convoy.printable import printable
from convoy.threads import ThreadPool
from trainer.errors import ConfigError, TrainerError
from trainer.service.engines.engine import Plan
from trainer.service.jobs import Event, Job, JobSpec, JobState
from trainer.service.logs import LogChunk
from trainer.service.operations import Capacity, LogRange, Operations
from trainer.service.options import check_options
from trainer.service.pauses import with_pauses
from trainer.service.watching import Watches

T = TypeVar("T")

SCOPES = SCOPE_SUBMIT, SCOPE_ADMIN = ("submit", "admin")
"""`submit` permits all methods on the caller's own jobs, `admin` on everybody's."""
NUM_THREADS = 16
"""Methods that use the store at a time."""
NUM_LOGS = 64
"""Logs that are read at a time; others wait."""
MAX_PAGE = 1000
DEFAULT_PAGE = 100
ANONYMOUS = "anonymous"
MAX_NAME = 255
"""Characters of a caller's name."""
_OF_THE_OPERATOR = "template"
"""The engine option of Kubernetes that names a file of the service's machine, and decides which secrets a pod reads."""


class UnauthenticatedError(TrainerError):
    """The call has no valid token."""


class ForbiddenError(TrainerError):
    """The token does not permit the call."""


class QuotaError(TrainerError):
    """The caller's quota is used up.

    Args:
        wait_s: until it permits the next call.
    """

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"the quota is used up: retry in {wait_s:.1f} s")
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Page:
    """A page of jobs, newest first.

    Args:
        next_before: `before` of the next page; None if there are no more.
    """

    jobs: list[Job]
    next_before: int | None


class Methods:
    """What callers of the service do, for one event loop.

    Args:
        tokens: of which callers must send one; None for a service that trusts everybody who reaches it.
    """

    def __init__(self, operations: Operations, tokens: TokenFile | None) -> None:
        self._operations = operations
        self._tokens = tokens
        self._pool = ThreadPool(NUM_THREADS, "store")
        self._logs = ThreadPool(NUM_LOGS, "logs")
        self._watches = Watches(
            lambda number: self._in_thread(operations.get, number),
            lambda number, after: self._in_thread(operations.events, number, after=after),
        )

    @property
    def has_tokens(self) -> bool:
        """Whether callers must send a token."""
        return self._tokens is not None

    @property
    def num_watched(self) -> int:
        """The number of jobs that somebody watches."""
        return len(self._watches)

    def close(self) -> None:
        for pool in (self._pool, self._logs):
            pool.shutdown(wait=False, cancel_futures=True)

    def identify(self, authorization: str | None, user: str | None) -> Principal:
        """Returns who calls; without tokens, the name that the caller gives itself, with all rights.

        Args:
            authorization: `Bearer TOKEN`.
            user: the name, percent-encoded.

        Raises:
            UnauthenticatedError, ForbiddenError, QuotaError: the call is refused.
        """
        if self._tokens is None:
            return Principal(printable(unquote(user or ANONYMOUS))[:MAX_NAME], frozenset(SCOPES))
        principal = self._tokens.find(authorization)
        if principal is None:
            raise UnauthenticatedError("expected 'authorization: Bearer TOKEN' with a token of this service")
        if principal.scopes.isdisjoint(SCOPES):
            raise ForbiddenError(f"the token of {principal.name!r} may not use jobs")
        if principal.quota is not None and (wait_s := principal.quota.take(0)) > 0:
            raise QuotaError(wait_s)
        return principal

    def while_valid(self, authorization: str | None, items: AsyncGenerator[T]) -> AsyncGenerator[T]:
        """Returns the items of a call that stays open, which end when its token is revoked.

        Args:
            authorization: of the call, which `identify` has accepted.

        Raises:
            UnauthenticatedError: the token is revoked.
        """
        return items if self._tokens is None else _while_valid(self._tokens, authorization, items)

    async def check_store(self) -> None:
        """Returns if the store answers.

        Raises:
            StoreError: it does not.
        """
        await self._in_thread(self._operations.find, limit=1)

    async def plan(self, spec: JobSpec) -> Plan:
        """Returns what would run. Raises as `submit` does."""
        _check(spec)
        return await self._in_thread(self._operations.plan, spec)

    async def submit(self, caller: Principal, spec: JobSpec, key: str | None) -> Job:
        """Submits a job.

        Raises:
            ConfigError: the engine can never run it, an option of the training is wrong, or the key is.
            JobStateError: the key was used for another job.
        """
        _check(spec)
        return await self._in_thread(self._operations.submit, spec, owner=caller.name, key=key or None)

    async def get(self, caller: Principal, number: int) -> Job:
        return await self._in_thread(self._operations.get, number, owner=_owner(caller))

    async def history(self, job: Job) -> list[Event]:
        """Returns the newest changes of a job's state, and notes."""
        return await self._in_thread(self._operations.history, job.id)

    async def find(self, caller: Principal, states: Iterable[JobState], before: int, size: int) -> Page:
        """Returns a page of jobs.

        Args:
            before: only jobs of smaller numbers; 0 for the newest.
            size: 0 for `DEFAULT_PAGE`; at most `MAX_PAGE`.

        Raises:
            ConfigError: a number is negative.
        """
        if size < 0 or before < 0:
            raise ConfigError("the size of a page and the job before which it ends must not be negative")
        size = min(size or DEFAULT_PAGE, MAX_PAGE)
        find = partial(self._operations.find, owner=_owner(caller), states=list(states), before=before or None)
        found = await self._in_thread(find, limit=size + 1)
        return Page(found[:size], found[size - 1].id if len(found) > size else None)

    async def cancel(self, caller: Principal, number: int, now: bool) -> Job:
        return await self._in_thread(self._operations.cancel, number, now=now, owner=_owner(caller))

    async def retry(self, caller: Principal, number: int) -> Job:
        return await self._in_thread(self._operations.retry, number, owner=_owner(caller))

    async def delete(self, caller: Principal, number: int) -> None:
        await self._in_thread(self._operations.delete, number, owner=_owner(caller))

    async def capacity(self, engine: str) -> Capacity:
        return await self._in_thread(self._operations.capacity, engine or "local")

    async def mistakes(self, caller: Principal, number: int) -> list[dict[str, Any]]:
        """Returns the worst mistakes of a job's run after each of its epochs, as far as the run has kept them."""
        job = await self.get(caller, number)
        return await self._in_thread(_read_mistakes, job.run_folder)

    async def watch(self, caller: Principal, number: int, after: int) -> AsyncGenerator[Event]:
        """Returns a job's events after the one of that number, until the job has ended."""
        await self.get(caller, number)
        return self._watches.follow(number, after)

    async def open_log(self, caller: Principal, number: int, wanted: LogRange) -> AsyncGenerator[LogChunk]:
        """Returns the output of a job."""
        read = partial(self._operations.open_log, number, wanted, owner=_owner(caller))
        return self._chunks(await self._in_thread(read))

    async def _chunks(self, chunks: Iterator[LogChunk]) -> AsyncGenerator[LogChunk]:
        loop = asyncio.get_running_loop()
        attempt = 0  # a piece tells where it begins: a caller may lose the connection before anything is written
        while (chunk := await loop.run_in_executor(self._logs, next, chunks, None)) is not None:
            if chunk.content or chunk.end.attempt != attempt:
                yield chunk
            attempt = chunk.end.attempt

    async def _in_thread(self, act: Callable[..., T], *arguments: object, **named: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(act, *arguments, **named))


async def _while_valid(tokens: TokenFile, authorization: str | None, items: AsyncGenerator[T]) -> AsyncGenerator[T]:
    loop = asyncio.get_running_loop()
    revoked: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        with suppress(RuntimeError):  # the service has stopped
            loop.call_soon_threadsafe(revoked.set_result, None)

    with tokens.watch(authorization, end):
        async with aclosing(items), aclosing(with_pauses(items, until=revoked)) as found:
            async for item in found:
                if item is not None:
                    yield item
    if revoked.done():
        raise UnauthenticatedError("the token of this call is no longer valid")


def _owner(caller: Principal) -> str | None:
    """Returns whose jobs a caller sees; None for everybody's."""
    return None if SCOPE_ADMIN in caller.scopes else caller.name


def _check(spec: JobSpec) -> None:
    if spec.engine == "kubernetes" and _OF_THE_OPERATOR in spec.engine_options:
        raise ConfigError(f"engine option {_OF_THE_OPERATOR}: it is the service's own, CONVOY_KUBERNETES_TEMPLATE")
    if any(word.partition("=")[0] in ("--run-dir", "--run_dir") for word in spec.arguments):
        raise ConfigError("--run-dir: give it as run_folder, not among the arguments")
    check_options(spec.arguments)


def _read_mistakes(run_folder: Path) -> list[dict[str, Any]]:
    from trainer.records.mistakes import read_mistakes  # imports NumPy, which an idle service does without

    return read_mistakes(run_folder)
