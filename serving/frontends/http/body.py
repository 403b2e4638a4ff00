"""Reads request bodies, within limits of size; `protocol` limits their time. Does not interpret them."""

import zlib

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from serving.frontends.http.auth import PRINCIPAL
from serving.frontends.http.body_memory import SHARE
from serving.frontends.http.executor import BoundedExecutor

_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32  # zlib detects the format; HTTP's "deflate" is zlib's (RFC 9110, 8.4.1.2)


async def read_body(scope: Scope, receive: Receive, max_bytes: int, executor: BoundedExecutor) -> bytes:
    """Returns the whole body of a request, decompressed.

    `body_memory` and `auth` count its bytes as they arrive. Those of a decompressed body are counted here, in the
    memory of messages and the caller's quota.

    Args:
        max_bytes: of the body, both as sent and decompressed. A longer body is refused as early as possible.
        executor: decompresses.

    Raises:
        HTTPException: 400, 413, 415 or 501, with a message for the client.
        ResourceExhausted: too many bodies wait to be decompressed, or there is no memory left for this one.
        ClientDisconnect: the client has disconnected.
    """
    headers = dict(scope["headers"])
    coding = headers.get(b"transfer-encoding", b"chunked").lower()
    if coding != b"chunked":
        raise HTTPException(501, f"transfer encoding '{coding.decode('latin-1')}' is not supported: expected chunked")
    is_compressed = _is_compressed(headers.get(b"content-encoding", b""))
    declared = headers.get(b"content-length", b"")
    if declared and int(declared) > max_bytes:  # httptools has checked that it is a number
        raise _too_large(f"of {int(declared)} bytes", max_bytes)
    body = await _read(receive, max_bytes)
    if not is_compressed:
        return body
    plain = await executor.run(_decompress, body, max_bytes)
    scope[SHARE].take(len(plain))
    principal = scope.get(PRINCIPAL)
    if principal is not None and principal.quota is not None:
        principal.quota.take_more(max(0, len(plain) - len(body)))
    return plain


def _is_compressed(header: bytes) -> bool:
    """Returns whether a body is compressed, by its header Content-Encoding.

    Raises:
        HTTPException: in another form than gzip or deflate, or more than once.
    """
    codings = [coding.strip().lower() for coding in header.split(b",")]
    codings = [coding for coding in codings if coding not in (b"", b"identity")]
    if not codings:
        return False
    if len(codings) > 1 or codings[0] not in (b"gzip", b"x-gzip", b"deflate"):
        got = header.decode("latin-1")
        raise HTTPException(415, f"content encoding '{got}' is not supported: expected gzip, deflate or none")
    return True


async def _read(receive: Receive, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > max_bytes:
            raise _too_large("so far", max_bytes)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


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
