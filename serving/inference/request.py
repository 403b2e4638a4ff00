"""Inference requests and responses as plain values: the form that gRPC and HTTP share."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from convoy.auth import Principal
from serving.errors import ServingError
from serving.observability.tracing import RequestTrace
from serving.protocol.tensors import Buffer, Elements, Shape

_MAX_KEPT = 64
"""Parameters, and characters of each, in a form that is kept."""


@dataclass(slots=True)
class RequestContext:
    """The circumstances of a request, known before its content is read.

    Args:
        deadline: on the clock of `time.monotonic`; None for none.
        principal: to whom the client's token belongs; None for a server without tokens.
        trace: None for a request that is not traced.
    """

    deadline: float | None = None
    principal: Principal | None = None
    trace: RequestTrace | None = None


NO_CONTEXT = RequestContext()
"""Of a request without a deadline, on a server without tokens."""


@dataclass(frozen=True, slots=True)
class SharedRange:
    """Where a client has a tensor in shared memory. The values are as it sent them, until `SharedMemory` checks them.

    Args:
        region: name of a registered region.
        offset: from its beginning, in bytes.
        num_bytes: of the range.
    """

    region: Any
    offset: Any
    num_bytes: Any


class SharedPlace(Protocol):
    """A checked range, for an output."""

    def write(self, output: str, data: Buffer) -> None:
        """Writes an output.

        Raises:
            InvalidArgument: it does not fit.
        """


@dataclass(slots=True)
class InferInput:
    """An input tensor. The length of `data` has not been checked.

    Args:
        data: empty until it is read from shared memory.
        shared: None for a tensor in the request itself.
    """

    name: str
    datatype: str
    shape: Shape
    data: Buffer | Elements
    shared: SharedRange | None = None


@dataclass(slots=True)
class RequestedOutput:
    """An output that the client requests.

    Args:
        classification: number of largest values to return as strings `value:index:label`, in place of the tensor; 0
            for the tensor itself.
        shared: None for an output in the response itself.
        place: of `shared`, once it is checked.
    """

    name: str
    classification: int = 0
    shared: SharedRange | None = None
    place: SharedPlace | None = None


@dataclass(slots=True)
class InferRequest:
    """One inference. An empty `model_version` means the newest version; empty `outputs` mean all outputs.

    Args:
        uses_shared_memory: whether an input or output is there.
    """

    model_name: str
    inputs: list[InferInput]
    model_version: str = ""
    id: str = ""
    outputs: list[RequestedOutput] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    uses_shared_memory: bool = False

    @property
    def key(self) -> Hashable | None:
        """Everything that a plan depends on; None if it is too large to be kept.

        A plan is made only if names and shapes fit its model, which bounds them; the rest is bounded here.
        """
        if self.uses_shared_memory or len(self.model_version) > _MAX_KEPT or len(self.parameters) > _MAX_KEPT:
            return None
        if any(len(text) > _MAX_KEPT for pair in self.parameters.items() for text in pair if type(text) is str):
            return None
        return (
            self.model_name,
            self.model_version,
            tuple([(given.name, given.datatype, given.shape) for given in self.inputs]),
            tuple([(output.name, output.classification) for output in self.outputs]),
            tuple([(name, type(value), value) for name, value in self.parameters.items()]),  # 1 == 1.0 == True
        )

    @property
    def request_id(self) -> str:
        """The client's id; empty for none."""
        return self.id

    @property
    def tensors(self) -> list[Buffer | Elements]:
        """The data of the inputs."""
        return [given.data for given in self.inputs]


@dataclass(slots=True)
class InferOutput:
    """An output tensor; `data` as in `serving.protocol.tensors`.

    Args:
        is_shared: whether the data have been written into shared memory instead.
    """

    name: str
    datatype: str
    shape: Shape
    data: Buffer
    is_shared: bool = False


@dataclass(slots=True)
class InferResponse:
    """The response to one inference."""

    model_name: str
    model_version: str
    id: str
    outputs: list[InferOutput]


class EncodedRequest(Protocol):
    """A request as its front end received it, split but not checked."""

    @property
    def key(self) -> Hashable | None:
        """Everything that a plan depends on: requests with equal keys share one. None for a plan that is not kept."""

    @property
    def request_id(self) -> str:
        """The client's id; empty for none."""

    @property
    def tensors(self) -> Sequence[Buffer | Elements]:
        """The data of the inputs, for a plan that is kept."""


R = TypeVar("R", contravariant=True)


class ResponseSink(Protocol[R]):
    """Receives the response to an inference: serialised for gRPC, as values for HTTP.

    Exactly one of the methods is called, once, from any thread; neither may block. After `RequestHandle.cancel` at most
    one late call may arrive, which a front end ignores.
    """

    def succeed(self, response: R, /) -> None:
        """Sends the response."""

    def fail(self, error: ServingError) -> None:
        """Sends an error."""


class TracedSink(Generic[R]):
    """A sink that ends the trace of its request."""

    def __init__(self, sink: ResponseSink[R], trace: RequestTrace) -> None:
        self._sink = sink
        self._trace = trace

    def succeed(self, response: R, /) -> None:
        self._trace.end()
        self._sink.succeed(response)

    def fail(self, error: ServingError) -> None:
        self._trace.end(error)
        self._sink.fail(error)


class RequestHandle(Protocol):
    """A request in flight."""

    def cancel(self) -> None:
        """Drops the request unless its batch has started. Safe to call from any thread, and repeatedly."""
