"""Inference requests and responses as plain values: the form that gRPC and HTTP share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from serving.errors import ServingError
from serving.protocol.tensors import Buffer, Elements, Shape


@dataclass(slots=True)
class InferInput:
    """An input tensor. The length of `data` has not been checked."""

    name: str
    datatype: str
    shape: Shape
    data: Buffer | Elements


@dataclass(slots=True)
class RequestedOutput:
    """An output that the client requests.

    Args:
        classification: number of largest values to return as strings `value:index:label`, in place of the tensor; 0
            for the tensor itself.
    """

    name: str
    classification: int = 0


@dataclass(slots=True)
class InferRequest:
    """One inference. An empty `model_version` means the newest version; empty `outputs` mean all outputs."""

    model_name: str
    inputs: list[InferInput]
    model_version: str = ""
    id: str = ""
    outputs: list[RequestedOutput] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class InferOutput:
    """An output tensor; `data` as in `serving.protocol.tensors`."""

    name: str
    datatype: str
    shape: Shape
    data: Buffer


@dataclass(slots=True)
class InferResponse:
    """The response to one inference."""

    model_name: str
    model_version: str
    id: str
    outputs: list[InferOutput]


class ResponseSink(Protocol):
    """Receives the response to a ModelInfer call.

    Exactly one of the methods is called, once, from any thread; neither may block. After `RequestHandle.cancel` at most
    one late call may arrive, which a front end ignores.
    """

    def succeed(self, payload: bytes) -> None:
        """Sends a serialised ModelInferResponse."""

    def fail(self, error: ServingError) -> None:
        """Sends an error."""


class RequestHandle(Protocol):
    """A request in flight."""

    def cancel(self) -> None:
        """Drops the request unless its batch has started. Safe to call from any thread, and repeatedly."""


Done = Callable[[InferResponse | ServingError], None]
"""Called once with the response, on the thread that computed it; must not block."""
