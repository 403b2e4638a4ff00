"""A message to send, and the responses that are right."""

from dataclasses import dataclass

from tests.serving.fuzzing.http_oracle import HttpExpected
from tests.serving.fuzzing.oracle import Expected


@dataclass(slots=True)
class GrpcMessage:
    """A call.

    Args:
        payloads: one message, or those of a stream.
        expected: what is right for each payload.
        ends_on_error: the stream asks for a status in place of an error message.
        changes: what was changed, for people.
    """

    number: int
    path: str
    payloads: list[bytes]
    expected: list[Expected]
    changes: list[str]
    ends_on_error: bool = False


@dataclass(slots=True)
class HttpMessage:
    """A request.

    Args:
        body: as it is sent, perhaps compressed.
        statuses: those that are right, where `expected` is None.
    """

    number: int
    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    expected: HttpExpected | None
    changes: list[str]
    statuses: frozenset[int] = frozenset()
    is_chunked: bool = False
