"""What a server answered to a message, and what is wrong with it."""

from dataclasses import dataclass

from tests.serving.fuzzing.message import GrpcMessage, HttpMessage


@dataclass(frozen=True, slots=True)
class Result:
    """The response to one message.

    Args:
        status: gRPC's code by name, or HTTP's number.
        problem: what is wrong; None for a right response.
    """

    message: GrpcMessage | HttpMessage
    status: str
    problem: str | None
