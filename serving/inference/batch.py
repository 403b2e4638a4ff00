"""What batches are made of: requests that wait for their response, and their rows as one array for each input.

Knows no protocol: a `QueuedRequest` knows how to respond.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serving.errors import ServingError
from serving.inference.outputs import Outputs
from serving.observability.statistics import BatchTrigger
from serving.observability.tracing import RequestTrace
from serving.protocol.tensors import Array, Buffer, Datatype, Shape, to_array


class QueuedRequest(ABC):
    """A request from its arrival to its response: one call of `finish` or `fail`, or none after a cancellation.

    Args:
        buffers: the input tensors in the model's order; their lengths have been checked.
        shapes: the tensors' shapes.
        rows: size of the batch dimension; 1 for a model without one.
        deadline: on the clock of `time.monotonic`; None for none.

    Attributes:
        arrived_ns: when it arrived, on the clock of `time.monotonic_ns`.
        decoding_ns: from then on until its image files were decoded; 0 for a request without any.
        trace: None for a request that is not traced.
        digest: of the inputs, set by the response cache alone; None for a request that is not cached.
    """

    __slots__ = ("arrived_ns", "buffers", "deadline", "decoding_ns", "digest", "num_bytes", "rows", "shapes", "trace")

    digest: bytes | None

    def __init__(
        self, buffers: tuple[Buffer, ...], shapes: tuple[Shape, ...], rows: int, deadline: float | None
    ) -> None:
        self.buffers = buffers
        self.shapes = shapes
        self.rows = rows
        self.deadline = deadline
        self.trace: RequestTrace | None = None
        self.arrived_ns = time.monotonic_ns()
        self.decoding_ns = 0
        self.num_bytes = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))

    @property
    def queued_ns(self) -> int:
        """When it was queued, on the clock of `arrived_ns`."""
        return self.arrived_ns + self.decoding_ns

    @property
    def identity(self) -> tuple[Buffer, ...]:
        """What the response cache knows it by, beside its shapes: requests of equal identities have equal outputs."""
        return self.buffers

    @property
    def level(self) -> int:
        """Its priority: 0 for the highest. Read by queues with priorities alone."""
        return 0

    @property
    def wait_us(self) -> int:
        """How long it may wait; 0 for no limit. Read by queues with policies alone."""
        return 0

    @abstractmethod
    def finish(self, outputs: Outputs, first_row: int) -> None:
        """Responds with this request's rows of the outputs."""

    @abstractmethod
    def fail(self, error: ServingError) -> None:
        """Responds with an error."""


@dataclass(slots=True)
class ComputedBatch:
    """A batch whose requests can be answered.

    Args:
        times_ns: when it was closed, assembled and computed, on the clock of `time.monotonic_ns`.
    """

    requests: Sequence[QueuedRequest]
    rows: int
    outputs: Outputs
    times_ns: tuple[int, int, int]
    trigger: BatchTrigger


@dataclass(slots=True)
class FailedBatch:
    """Requests that could not be computed, and why."""

    requests: Sequence[QueuedRequest]
    error: ServingError


def fit_together(one: tuple[Shape, ...], other: tuple[Shape, ...]) -> bool:
    """Returns whether requests with these shapes can share a batch."""
    return one is other or all(a[1:] == b[1:] for a, b in zip(one, other, strict=True))


def assemble(requests: Sequence[QueuedRequest], datatypes: Sequence[Datatype], rows: int) -> list[Array]:
    """Returns the inputs of a batch: views of a single request's bytes, or one copy of the bytes of several."""
    return [_assemble_input(index, datatype, requests, rows) for index, datatype in enumerate(datatypes)]


def _assemble_input(index: int, datatype: Datatype, requests: Sequence[QueuedRequest], rows: int) -> Array:
    first = requests[0].shapes[index]
    if len(requests) == 1:
        return to_array(datatype, first, requests[0].buffers[index])
    if not datatype.size:
        return np.concatenate(
            [to_array(datatype, request.shapes[index], request.buffers[index]) for request in requests]
        )
    return to_array(datatype, (rows, *first[1:]), b"".join([request.buffers[index] for request in requests]))
