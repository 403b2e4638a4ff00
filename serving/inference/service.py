"""ModelInfer: checks requests and hands them to the batcher of their model version.

gRPC front ends call `infer` with serialised messages, HTTP calls `submit` with values. Knows no front end; all other
RPCs are in `serving.protocol.admin`.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

from protos.grpc_service_pb2 import ModelInferRequest
from serving.errors import Internal, ServingError, Unavailable
from serving.inference.batcher import BatcherClosed, Outputs, QueuedRequest
from serving.inference.plan import Plan
from serving.inference.plan_cache import PlanCache
from serving.inference.request import Done, InferRequest, RequestHandle, ResponseSink
from serving.models.repository import Repository
from serving.protocol.grpc_codec import ResponseEncoder, decode, encode_id, parse_request
from serving.protocol.parameters import earliest_deadline
from serving.protocol.tensors import Buffer

logger = logging.getLogger(__name__)

_MAX_SWAPS = 8
"""Of the model version while a request is being queued."""


class PlannedRequest(QueuedRequest):
    """A queued request that its client may cancel; a `RequestHandle`."""

    __slots__ = ("plan",)

    def __init__(self, plan: Plan, buffers: tuple[Buffer, ...], deadline: float | None) -> None:
        super().__init__(buffers, plan.shapes, plan.rows, deadline)
        self.plan = plan

    def cancel(self) -> None:
        self.plan.model.batcher.cancel(self)


class GrpcRequest(PlannedRequest):
    """Responds with a serialised message."""

    __slots__ = ("_id_field", "_sink", "encoder")

    def __init__(
        self,
        encoder: ResponseEncoder,
        buffers: tuple[Buffer, ...],
        id_field: bytes,
        sink: ResponseSink,
        deadline: float | None,
    ) -> None:
        super().__init__(encoder.plan, buffers, deadline)
        self.encoder = encoder
        self._id_field = id_field
        self._sink = sink

    def finish(self, outputs: Outputs, first_row: int) -> None:
        self._sink.succeed(self.encoder.encode(outputs, first_row, self._id_field))
        del self._sink  # it refers to this request: the cycle would keep the message until the garbage collector runs

    def fail(self, error: ServingError) -> None:
        self._sink.fail(error)
        del self._sink


class HttpRequest(PlannedRequest):
    """Responds with values."""

    __slots__ = ("_done", "_id")

    def __init__(
        self, plan: Plan, buffers: tuple[Buffer, ...], request_id: str, done: Done, deadline: float | None
    ) -> None:
        super().__init__(plan, buffers, deadline)
        self._id = request_id
        self._done = done

    def finish(self, outputs: Outputs, first_row: int) -> None:
        self._done(self.plan.build_response(outputs, first_row, self._id))

    def fail(self, error: ServingError) -> None:
        self._done(error)


R = TypeVar("R", bound=PlannedRequest)


class InferenceService:
    """Inference over the models of a repository."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self._plans = PlanCache(repository)

    def infer(self, payload: bytes, sink: ResponseSink, deadline: float | None) -> RequestHandle | None:
        """Runs a serialised ModelInferRequest. The response or the error goes to `sink`.

        Args:
            deadline: on the clock of `time.monotonic`; None for none.

        Returns:
            The request in flight; None if `sink` has been called already.
        """
        try:
            cached = self._plans.find(payload)
            if cached is not None:
                request = GrpcRequest(cached.encoder, (cached.tensor(payload),), b"", sink, deadline)
                try:
                    request.plan.model.batcher.submit(request)
                    return request
                except BatcherClosed:
                    self._plans.clear()
            return self._infer_uncached(payload, sink, deadline)
        except ServingError as error:
            sink.fail(error)
        except Exception:
            logger.exception("a request failed before it was queued")
            sink.fail(Internal("the request could not be run; the server's log says why"))
        return None

    def submit(self, request: InferRequest, done: Done, deadline: float | None) -> RequestHandle | None:
        """Runs a request given as values. Like `infer`, but the response or the error goes to `done`."""
        try:
            until = earliest_deadline(deadline, request.parameters)
            return self._queue(request, lambda plan, buffers: HttpRequest(plan, buffers, request.id, done, until))
        except ServingError as error:
            done(error)
        return None

    def _infer_uncached(self, payload: bytes, sink: ResponseSink, deadline: float | None) -> RequestHandle:
        generation = self.repository.generation
        message = decode(ModelInferRequest, payload)
        request = parse_request(message)
        until = earliest_deadline(deadline, request.parameters)
        id_field = encode_id(request.id)

        def make(plan: Plan, buffers: tuple[Buffer, ...]) -> GrpcRequest:
            return GrpcRequest(ResponseEncoder(plan), buffers, id_field, sink, until)

        queued = self._queue(request, make)
        is_cacheable = not request.id and not request.parameters and not queued.plan.has_strings
        if is_cacheable and generation == self.repository.generation:  # else the plan's version may be unloaded
            self._plans.add(payload, message, queued.encoder)
        return queued

    def _queue(self, request: InferRequest, make: Callable[[Plan, tuple[Buffer, ...]], R]) -> R:
        """Plans a request and submits it to its model's batcher."""
        for _ in range(_MAX_SWAPS):
            plan = Plan(self.repository.get(request.model_name, request.model_version), request)
            queued = make(plan, plan.bind_inputs([given.data for given in request.inputs]))
            try:
                plan.model.batcher.submit(queued)
                return queued
            except BatcherClosed:
                continue  # the version was replaced after `get`: the repository has a newer one
        raise Unavailable(f"model '{request.model_name}' is being replaced")
