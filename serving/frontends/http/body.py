"""Reads request bodies, within limits of size and time. Does not interpret them."""

import asyncio
import zlib
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive

IDLE_TIMEOUT_S = 30.0
"""How long a client may pause in the middle of a body."""

_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32  # zlib detects the format; HTTP's "deflate" is zlib's (RFC 9110, 8.4.1.2)


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, max_bytes: int) -> bytes:
    """Returns the whole body of a request, decompressed.

    Args:
        headers: of the request, with names in lower case.
        max_bytes: of the body, both as sent and decompressed. A longer body is refused as early as possible.

    Raises:
        HTTPException: 400, 408, 413 or 415, with a message for the client.
        ClientDisconnect: the client has disconnected.
    """
    encoding = headers.get(b"content-encoding", b"identity").lower()
    if encoding not in (b"identity", b"gzip", b"deflate"):
        raise HTTPException(
            415, f"content encoding '{encoding.decode('latin-1')}' is not supported: expected gzip, deflate or none"
        )
    declared = headers.get(b"content-length", b"")
    if declared and int(declared) > max_bytes:  # httptools has checked that it is a number
        raise _too_large(f"of {int(declared)} bytes", max_bytes)
    body = await _read(receive, max_bytes)
    return body if encoding == b"identity" else await asyncio.to_thread(_decompress, body, max_bytes)


async def _read(receive: Receive, max_bytes: int) -> bytes:
    message = await receive()
    chunks: list[bytes] = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > max_bytes:
            raise _too_large("so far", max_bytes)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                message = await receive()
        except TimeoutError:
            raise HTTPException(
                408, f"the client sent nothing for {IDLE_TIMEOUT_S:g} s in the middle of the body"
            ) from None


def _decompress(body: bytes, max_bytes: int) -> bytes:
    decompressor = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        plain = decompressor.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise HTTPException(400, f"the body cannot be decompressed: {error}") from error
    if len(plain) > max_bytes:
        raise _too_large("when decompressed", max_bytes)
    if not decompressor.eof or decompressor.unused_data:
        raise HTTPException(400, "the compressed body is cut off, or has data after its end")
    return plain


def _too_large(what: str, max_bytes: int) -> HTTPException:
    return HTTPException(413, f"the request body {what} is too large: at most {max_bytes} bytes are accepted")
