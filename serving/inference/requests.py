"""An inference under way: a plan with one request's data, and how it is answered; and how a request is recognised."""

from typing import Any

from google.protobuf.message import DecodeError

from protos.grpc_service_pb2 import ModelInferRequest
from serving.errors import ServingError
from serving.inference.batcher import Job, Outputs
from serving.inference.plan import Plan, varint
from serving.inference.request import Done, ResponseSink


class PlannedRequest(Job):
    """A job that a caller may cancel."""

    __slots__ = ("plan",)

    def __init__(self, plan: Plan, buffers: tuple[Any, ...], deadline: float | None) -> None:
        super().__init__(buffers, plan.shapes, plan.rows, deadline)
        self.plan = plan

    def cancel(self) -> None:
        self.plan.model.batcher.cancel(self)


class GrpcRequest(PlannedRequest):
    """A job that is answered with a serialised message."""

    __slots__ = ("_call", "_id_field")

    def __init__(
        self, plan: Plan, buffers: tuple[Any, ...], id_field: bytes, call: ResponseSink, deadline: float | None
    ) -> None:
        super().__init__(plan, buffers, deadline)
        self._id_field = id_field
        self._call = call

    def finish(self, outputs: Outputs, first_row: int) -> None:
        self._call.succeed(self.plan.encode(outputs, first_row, self._id_field))
        del self._call  # it refers to this job: together they would keep the message until the cyclic collector runs

    def fail(self, error: ServingError) -> None:
        self._call.fail(error)
        del self._call


class HttpRequest(PlannedRequest):
    """A job that is answered with values."""

    __slots__ = ("_done", "_id")

    def __init__(
        self, plan: Plan, buffers: tuple[Any, ...], request_id: str, done: Done, deadline: float | None
    ) -> None:
        super().__init__(plan, buffers, deadline)
        self._id = request_id
        self._done = done

    def finish(self, outputs: Outputs, first_row: int) -> None:
        self._done(self.plan.build_response(outputs, first_row, self._id))

    def fail(self, error: ServingError) -> None:
        self._done(error)


class CachedPlan:
    """What the requests of one client for one model have in common: all bytes before the tensor's own.

    Comparing this prefix replaces parsing.
    """

    __slots__ = ("plan", "prefix")

    def __init__(self, prefix: bytes, plan: Plan) -> None:
        self.prefix = prefix
        self.plan = plan

    @classmethod
    def of(cls, payload: bytes, message: ModelInferRequest, plan: Plan) -> "CachedPlan | None":
        """The template of a request with one raw tensor at the end of its bytes, as all clients write it."""
        if len(message.raw_input_contents) != 1:
            return None
        size = len(message.raw_input_contents[0])
        prefix = payload[: len(payload) - size]
        rest = ModelInferRequest()
        rest.CopyFrom(message)
        rest.ClearField("raw_input_contents")
        header = b"\x3a" + varint(size)
        try:
            alike = prefix.endswith(header) and ModelInferRequest.FromString(prefix[: -len(header)]) == rest
        except DecodeError:
            return None
        return cls(prefix, plan) if alike else None

    def cut(self, payload: bytes) -> tuple[memoryview]:
        return (memoryview(payload)[len(self.prefix) :],)
