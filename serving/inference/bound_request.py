"""A request that is bound to its plan: what a batcher queues, and how its response is encoded."""

from typing import Any, Generic, Protocol, TypeVar

from serving.errors import ServingError
from serving.inference.batch import QueuedRequest
from serving.inference.image_files import ImageFiles
from serving.inference.outputs import Outputs
from serving.inference.plan import Plan
from serving.inference.request import RequestContext, ResponseSink
from serving.protocol.tensors import Buffer

S_contra = TypeVar("S_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class Encoder(Protocol[S_contra, R_co]):
    """Takes the inputs out of the requests of a plan, and makes their responses."""

    plan: Plan

    def bind(self, request: S_contra) -> tuple[Buffer, ...]:
        """Returns the inputs' bytes in the model's order.

        Raises:
            InvalidArgument: they do not fit the plan.
        """

    def encode(self, outputs: Outputs, first_row: int, request_id: str) -> R_co:
        """Returns the response for the plan's rows of a batch."""


class BoundRequest(QueuedRequest, Generic[R]):
    """A request with its inputs in the order of its plan, which its client may cancel; a `RequestHandle`."""

    __slots__ = ("_encoder", "_id", "_sink")

    def __init__(
        self,
        encoder: Encoder[Any, R],
        buffers: tuple[Buffer, ...],
        request_id: str,
        context: RequestContext,
        sink: ResponseSink[R],
    ) -> None:
        plan = encoder.plan
        deadline = context.deadline if plan.timeout_s is None else plan.deadline(context)
        super().__init__(buffers, plan.shapes, plan.rows, deadline)
        if context.trace is not None:
            self.trace = context.trace
            context.trace.set_model(plan.model.spec.name, plan.model.version)
        self._encoder = encoder
        self._id = request_id
        self._sink = sink

    @property
    def level(self) -> int:
        return self._encoder.plan.level

    @property
    def wait_us(self) -> int:
        return self._encoder.plan.wait_us

    def finish(self, outputs: Outputs, first_row: int) -> None:
        self._sink.succeed(self._encoder.encode(outputs, first_row, self._id))
        del self._sink  # it refers to this request: the cycle would keep the message until the garbage collector runs

    def fail(self, error: ServingError) -> None:
        self._sink.fail(error)
        del self._sink

    def cancel(self) -> None:
        """Drops the request unless its batch has started."""
        self._encoder.plan.model.batcher.cancel(self)


class DecodedRequest(BoundRequest[R]):
    """A request whose image files have been decoded. It arrived before that, and was queued afterwards.

    Args:
        files: their digest, if they have one, identifies the request in the response cache.
    """

    __slots__ = ("_files_digest",)

    def __init__(
        self,
        encoder: Encoder[Any, R],
        buffers: tuple[Buffer, ...],
        request_id: str,
        context: RequestContext,
        sink: ResponseSink[R],
        files: ImageFiles,
    ) -> None:
        super().__init__(encoder, buffers, request_id, context, sink)
        self._files_digest = files.digest
        self.decoding_ns = self.arrived_ns - files.arrived_ns
        self.arrived_ns = files.arrived_ns
        if context.trace is not None:
            context.trace.add_decoding(self.arrived_ns, self.queued_ns)

    @property
    def identity(self) -> tuple[Buffer, ...]:
        return super().identity if self._files_digest is None else (b"image files", self._files_digest)
