"""Makes functions of messages into functions of bytes."""

import logging
from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from serving.errors import Internal, ServingError
from serving.protocol.grpc_codec import decode

logger = logging.getLogger(__name__)


def handler(kind: type[Message], respond: Callable[[Any], Message]) -> Callable[[bytes], bytes]:
    """Returns a function from a serialised request to a serialised response, which raises ServingErrors alone.

    Args:
        kind: of the request.
        respond: takes the request, returns the response.
    """

    def handle(payload: bytes) -> bytes:
        request = decode(kind, payload)
        try:
            response: bytes = respond(request).SerializeToString()
            return response
        except ServingError:
            raise
        except Exception as error:
            logger.exception("%s failed", kind.__name__)
            raise Internal(f"the server failed on a {kind.__name__}; its log says why") from error

    return handle
