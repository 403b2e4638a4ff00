"""The gRPC methods of `TrainingService`: who calls, what they may see, and which status an error becomes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc

from convoy.auth import Principal, TokenFile
from protos import training_pb2 as pb
from trainer.errors import ConfigError, TrainerError
from trainer.service.messages import SERVICE, USER, from_capacity, from_event, from_job, to_spec, to_states
from trainer.service.operations import Operations
from trainer.service.store import JobStateError, StaleError, UnknownJobError
from trainer.service.watching import Watches

T = TypeVar("T")

SCOPES = SCOPE_SUBMIT, SCOPE_ADMIN = ("submit", "admin")
"""`submit` permits all methods on the caller's own jobs, `admin` on everybody's."""
NUM_THREADS = 16
"""Methods that use the store at a time."""
NUM_LOGS = 64
"""Streams of logs at a time; others wait."""
MAX_PAGE = 1000
DEFAULT_PAGE = 100

_STATUS: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (UnknownJobError, grpc.StatusCode.NOT_FOUND),
    (JobStateError, grpc.StatusCode.FAILED_PRECONDITION),
    (StaleError, grpc.StatusCode.ABORTED),
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (TrainerError, grpc.StatusCode.UNAVAILABLE),
)
_STREAMS = {"WatchJob", "StreamLogs"}


class Servicer:
    """The methods.

    Args:
        tokens: of which callers must send one; None for a service that trusts everybody who reaches it.
        log: receives a line about each defect.
    """

    def __init__(self, operations: Operations, tokens: TokenFile | None, log: Callable[[str], None]) -> None:
        self._operations = operations
        self._tokens = tokens
        self._log = log
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="store")
        self._logs = ThreadPoolExecutor(NUM_LOGS, thread_name_prefix="logs")
        self._watches = Watches(
            lambda number: self._in_thread(operations.look, number),
            lambda number, after: self._in_thread(operations.events, number, after=after),
        )

    def close(self) -> None:
        for pool in (self._pool, self._logs):
            pool.shutdown(wait=False, cancel_futures=True)

    def handlers(self) -> grpc.GenericRpcHandler:
        """Returns the handlers of all methods."""
        found = {}
        for method in pb.DESCRIPTOR.services_by_name["TrainingService"].methods:
            name, is_stream = method.name, method.name in _STREAMS
            make = grpc.unary_stream_rpc_method_handler if is_stream else grpc.unary_unary_rpc_method_handler
            found[name] = make(
                partial(self._stream if is_stream else self._call, getattr(self, f"_{name}")),
                request_deserializer=getattr(pb, method.input_type.name).FromString,
                response_serializer=getattr(pb, method.output_type.name).SerializeToString,
            )
        return grpc.method_handlers_generic_handler(SERVICE, found)

    async def _call(self, method: Callable[..., Any], request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            caller = self._caller(context)
            return await self._in_thread(method, request, caller)
        except Exception as error:
            await self._abort(context, error)

    async def _stream(
        self, method: Callable[..., AsyncIterator[Any]], request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        try:
            async for message in method(request, self._caller(context)):
                yield message
        except Exception as error:
            await self._abort(context, error)

    def _SubmitJob(self, request: pb.SubmitJobRequest, caller: Principal) -> pb.SubmitJobResponse:
        spec = to_spec(request.spec)
        plan = self._operations.plan(spec)
        response = pb.SubmitJobResponse(command=plan.command, notes=plan.notes)
        if not request.dry_run:
            job = self._operations.submit(spec, owner=caller.name, key=request.key or None)
            response.job.CopyFrom(from_job(job))
        return response

    def _GetJob(self, request: pb.GetJobRequest, caller: Principal) -> pb.Job:
        return from_job(self._operations.get(request.id, owner=_owner(caller)))

    def _ListJobs(self, request: pb.ListJobsRequest, caller: Principal) -> pb.ListJobsResponse:
        size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
        if size < 0 or request.before < 0:
            raise ConfigError("page_size and before must not be negative")
        found = self._operations.find(
            owner=_owner(caller), states=to_states(request.states), before=request.before or None, limit=size + 1
        )
        more = found[size - 1].id if len(found) > size else 0
        return pb.ListJobsResponse(jobs=map(from_job, found[:size]), next_before=more)

    def _CancelJob(self, request: pb.CancelJobRequest, caller: Principal) -> pb.Job:
        return from_job(self._operations.cancel(request.id, now=request.now, owner=_owner(caller)))

    def _RetryJob(self, request: pb.RetryJobRequest, caller: Principal) -> pb.Job:
        return from_job(self._operations.retry(request.id, owner=_owner(caller)))

    def _DeleteJob(self, request: pb.DeleteJobRequest, caller: Principal) -> pb.DeleteJobResponse:
        self._operations.delete(request.id, owner=_owner(caller))
        return pb.DeleteJobResponse()

    def _GetCapacity(self, request: pb.GetCapacityRequest, caller: Principal) -> pb.Capacity:
        return from_capacity(self._operations.capacity(request.engine or "local"))

    async def _WatchJob(self, request: pb.WatchJobRequest, caller: Principal) -> AsyncIterator[pb.Event]:
        await self._in_thread(self._operations.look, request.id, owner=_owner(caller))
        async for event in self._watches.follow(request.id, request.after):
            yield from_event(event)

    async def _StreamLogs(self, request: pb.StreamLogsRequest, caller: Principal) -> AsyncIterator[pb.LogChunk]:
        chunks: Iterator[bytes] = await self._in_thread(
            self._operations.read_log,
            request.id,
            follow=request.follow,
            tail=max(0, request.tail) if request.HasField("tail") else None,
            attempt=request.attempt or None,
            owner=_owner(caller),
        )
        loop = asyncio.get_running_loop()
        while (chunk := await loop.run_in_executor(self._logs, next, chunks, None)) is not None:
            if chunk:
                yield pb.LogChunk(content=chunk)

    async def _in_thread(self, act: Callable[..., T], *arguments: Any, **named: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(act, *arguments, **named))

    def _caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> Principal:
        """Returns who calls; without tokens, the name that the caller gives itself, with all rights."""
        metadata = {str(key): value for key, value in context.invocation_metadata() or ()}
        if self._tokens is None:
            return Principal(str(metadata.get(USER, "anonymous")), frozenset(SCOPES))
        principal = self._tokens.find(str(metadata.get("authorization", "")))
        if principal is None:
            raise _Refused(grpc.StatusCode.UNAUTHENTICATED, "expected metadata 'authorization: Bearer TOKEN'")
        if principal.scopes.isdisjoint(SCOPES):
            raise _Refused(grpc.StatusCode.PERMISSION_DENIED, f"the token of {principal.name!r} may not use jobs")
        if principal.quota is not None and (wait_s := principal.quota.take(0)) > 0:
            raise _Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the quota is used up: retry in {wait_s:.1f} s")
        return principal

    async def _abort(self, context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, _Refused):
            await context.abort(error.status, str(error))
        for kind, status in _STATUS:
            if isinstance(error, kind):
                await context.abort(status, str(error))
        self._log(f"defect: {type(error).__name__}: {error}")
        await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}; the service's log has more")
        raise AssertionError  # `abort` raises


class _Refused(Exception):
    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = status


def _owner(caller: Principal) -> str | None:
    """Returns whose jobs a caller sees; None for everybody's."""
    return None if SCOPE_ADMIN in caller.scopes else caller.name
