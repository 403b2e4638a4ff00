"""Makes functions of messages into functions of bytes."""

import logging
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

from google.protobuf.message import Message

from serving.errors import Internal, InvalidArgument, ServingError
from serving.protocol.grpc_codec import decode

logger = logging.getLogger(__name__)

P = ParamSpec("P")

MAX_BYTES = 512 << 10
"""Of a message without tensors. The longest has a configuration of 64 thousand characters. Countless parameters of a
load would cost fourteen times their bytes, and half a second a megabyte."""


def handler(
    kind: type[Message], respond: Callable[Concatenate[Any, P], Message]
) -> Callable[Concatenate[bytes, P], bytes]:
    """Returns a function from a serialised request to a serialised response, which raises ServingErrors alone.

    Args:
        kind: of the request.
        respond: takes the request, and whatever else the function is called with; returns the response.
    """

    def handle(payload: bytes, /, *args: P.args, **kwargs: P.kwargs) -> bytes:
        if len(payload) > MAX_BYTES:
            raise InvalidArgument(
                f"the {kind.__name__} of {len(payload)} bytes is too long: at most {MAX_BYTES} are accepted"
            )
        request = decode(kind, payload)
        try:
            response: bytes = respond(request, *args, **kwargs).SerializeToString()
            return response
        except ServingError:
            raise
        except Exception as error:
            logger.exception("%s failed", kind.__name__)
            raise Internal(f"the server failed on a {kind.__name__}; its log says why") from error

    return handle
