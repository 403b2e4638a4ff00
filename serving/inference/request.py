"""What an inference asks for and what it answers, as plain values: the form between the protocols and the batcher."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from serving.errors import ServingError
from serving.protocol.tensors import Buffer, Elements, Shape


@dataclass(slots=True)
class InferInput:
    """A tensor that a caller gives. `data` is as in `serving.protocol.tensors`; its length is not checked yet."""

    name: str
    datatype: str
    shape: Shape
    data: Buffer | Elements


@dataclass(slots=True)
class RequestedOutput:
    """A tensor that a caller wants.

    Args:
        classification: how many of the largest values are wanted as strings `value:index:label`, instead of the
            tensor; 0 for the tensor itself.
    """

    name: str
    classification: int = 0


@dataclass(slots=True)
class InferRequest:
    """One inference. No `outputs` means all of them; an empty `model_version` the newest."""

    model_name: str
    inputs: list[InferInput]
    model_version: str = ""
    id: str = ""
    outputs: list[RequestedOutput] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class InferOutput:
    """A tensor of the answer; `data` as it goes over the wire."""

    name: str
    datatype: str
    shape: Shape
    data: Buffer


@dataclass(slots=True)
class InferResponse:
    """The answer to one inference."""

    model_name: str
    model_version: str
    id: str
    outputs: list[InferOutput]


class ResponseSink(Protocol):
    """One ModelInfer on its transport. Exactly one of the two is called, once, from any thread; neither blocks.

    After `RequestHandle.cancel` neither may come, or one late: a transport lets it fall.
    """

    def succeed(self, payload: bytes) -> None:
        """Answer with a serialised ModelInferResponse."""

    def fail(self, error: ServingError) -> None:
        """Answer with an error."""


class RequestHandle(Protocol):
    """An inference under way."""

    def cancel(self) -> None:
        """The caller has gone: drop the inference if it has not begun. From any thread; more than once does no harm."""


Done = Callable[[InferResponse | ServingError], None]
"""Called once with the answer, on the thread that has it."""
