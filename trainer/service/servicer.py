"""The gRPC methods of `TrainingService`: messages to values and back, and the status that an error becomes."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from convoy.auth import Principal
from convoy.grpc_core import as_details
from protos import training_pb2 as pb
from trainer.errors import ConfigError, TrainerError
from trainer.service.messages import (
    SERVICE,
    USER,
    from_capacity,
    from_event,
    from_job,
    to_log_range,
    to_spec,
    to_states,
)
from trainer.service.methods import ForbiddenError, Methods, QuotaError, UnauthenticatedError
from trainer.service.store import JobStateError, StaleError, UnknownJobError

_STATUS: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
    (QuotaError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnknownJobError, grpc.StatusCode.NOT_FOUND),
    (JobStateError, grpc.StatusCode.FAILED_PRECONDITION),
    (StaleError, grpc.StatusCode.ABORTED),
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (DecodeError, grpc.StatusCode.INVALID_ARGUMENT),
    (TrainerError, grpc.StatusCode.UNAVAILABLE),
)
_STREAMS = {"WatchJob", "StreamLogs"}


class Servicer:
    """The methods over gRPC.

    Args:
        log: receives a line about each defect.
    """

    def __init__(self, methods: Methods, log: Callable[[str], None]) -> None:
        self._methods = methods
        self._log = log

    def handlers(self) -> grpc.GenericRpcHandler:
        """Returns the handlers of all methods."""
        found = {}
        for method in pb.DESCRIPTOR.services_by_name["TrainingService"].methods:
            name, is_stream = method.name, method.name in _STREAMS
            make = grpc.unary_stream_rpc_method_handler if is_stream else grpc.unary_unary_rpc_method_handler
            read = getattr(pb, method.input_type.name).FromString
            found[name] = make(
                partial(self._stream if is_stream else self._call, getattr(self, f"_{name}"), read),
                response_serializer=getattr(pb, method.output_type.name).SerializeToString,
            )
        return grpc.method_handlers_generic_handler(SERVICE, found)

    async def _call(
        self,
        method: Callable[..., Any],
        read: Callable[[bytes], Any],
        content: bytes,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> Any:
        try:
            caller = self._caller(context)
            return await method(read(content), caller)
        except Exception as error:
            await self._abort(context, error)

    async def _stream(
        self,
        method: Callable[..., Any],
        read: Callable[[bytes], Any],
        content: bytes,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[Any]:
        try:
            caller = self._caller(context)
            found = method(read(content), caller)
            async with aclosing(self._methods.while_valid(_metadata(context).get("authorization"), found)) as messages:
                async for message in messages:
                    yield message
        except Exception as error:
            await self._abort(context, error)

    async def _SubmitJob(self, request: pb.SubmitJobRequest, caller: Principal) -> pb.SubmitJobResponse:
        spec = to_spec(request.spec)
        plan = await self._methods.plan(spec)
        response = pb.SubmitJobResponse(command=plan.command, notes=plan.notes)
        if not request.dry_run:
            response.job.CopyFrom(from_job(await self._methods.submit(caller, spec, request.key)))
        return response

    async def _GetJob(self, request: pb.GetJobRequest, caller: Principal) -> pb.Job:
        job = await self._methods.get(caller, request.id)
        message = from_job(job)
        if request.history:
            message.history.extend(map(from_event, await self._methods.history(job)))
        return message

    async def _ListJobs(self, request: pb.ListJobsRequest, caller: Principal) -> pb.ListJobsResponse:
        page = await self._methods.find(caller, to_states(request.states), request.before, request.page_size)
        return pb.ListJobsResponse(jobs=map(from_job, page.jobs), next_before=page.next_before or 0)

    async def _CancelJob(self, request: pb.CancelJobRequest, caller: Principal) -> pb.Job:
        return from_job(await self._methods.cancel(caller, request.id, request.now))

    async def _RetryJob(self, request: pb.RetryJobRequest, caller: Principal) -> pb.Job:
        return from_job(await self._methods.retry(caller, request.id))

    async def _DeleteJob(self, request: pb.DeleteJobRequest, caller: Principal) -> pb.DeleteJobResponse:
        await self._methods.delete(caller, request.id)
        return pb.DeleteJobResponse()

    async def _GetCapacity(self, request: pb.GetCapacityRequest, caller: Principal) -> pb.Capacity:
        return from_capacity(await self._methods.capacity(request.engine))

    async def _WatchJob(self, request: pb.WatchJobRequest, caller: Principal) -> AsyncIterator[pb.Event]:
        async with aclosing(await self._methods.watch(caller, request.id, request.after)) as events:
            async for event in events:
                yield from_event(event)

    async def _StreamLogs(self, request: pb.StreamLogsRequest, caller: Principal) -> AsyncIterator[pb.LogChunk]:
        async with aclosing(await self._methods.open_log(caller, request.id, to_log_range(request))) as chunks:
            async for chunk in chunks:
                yield pb.LogChunk(content=chunk.content, end=pb.LogPosition(**chunk.end._asdict()))

    def _caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> Principal:
        metadata = _metadata(context)
        return self._methods.identify(metadata.get("authorization"), metadata.get(USER))

    async def _abort(self, context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        for kind, status in _STATUS:
            if isinstance(error, kind):
                await context.abort(status, as_details(str(error)))
        self._log(f"defect: {type(error).__name__}: {error}")
        await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}; the service's log has more")
        raise AssertionError  # `abort` raises


def _metadata(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in context.invocation_metadata() or ()}
