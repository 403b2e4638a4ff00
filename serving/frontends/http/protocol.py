"""HTTP/1.1 by httptools, with bounded request heads."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
"""Of an incomplete request line with headers, or of trailers; the same limit as uvicorn sets for h11."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. Refuses a head or trailers over the limit: httptools would collect them without end."""

    _num_pending_bytes = 0
    """Bytes received since the last complete head, piece of a body, or request."""

    def data_received(self, data: bytes) -> None:
        self._num_pending_bytes += len(data)
        super().data_received(data)
        if self._num_pending_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        self._num_pending_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_pending_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_pending_bytes = 0
        super().on_message_complete()
