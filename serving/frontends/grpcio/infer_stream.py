"""ModelStreamInfer: many inferences over one RPC. Does not know how messages are received and sent."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grpc

from convoy.auth import Principal
from serving.errors import Cancelled, ResourceExhausted, ServingError
from serving.inference.message_memory import MemoryShare, MessageMemory
from serving.inference.request import RequestContext, RequestHandle
from serving.inference.service import InferenceService
from serving.observability.refusals import Refusals
from serving.observability.tracing import RequestTrace
from serving.protocol.wire_format import request_id

MAX_IN_FLIGHT = 128
"""Inferences of one stream at the same time. HTTP/2's flow control keeps further requests at the client."""

Admit = Callable[[int], Principal | None]


class InferStream:
    """One ModelStreamInfer: requests run at the same time, responses keep the order of the requests.

    Args:
        deadline: on the clock of `time.monotonic`; None for none.
        admit: takes a message's number of bytes, and returns its caller; raises a ServingError to refuse the message.
        metadata: of the RPC, which may name the trace of all its inferences.
    """

    def __init__(
        self,
        service: InferenceService,
        deadline: float | None,
        admit: Admit = lambda num_bytes: None,
        metadata: Sequence[Any] = (),
    ) -> None:
        self._service = service
        self._metadata = metadata
        self._deadline = deadline
        self._admit = admit
        self._changed = threading.Condition()
        self._calls: deque[_StreamedCall] = deque()
        self._has_ended = False
        self.is_complete = False
        """Whether the client has sent its last request."""

    def read(self, requests: Iterable[bytes]) -> None:
        """Starts an inference for each request until there are no more, or `end` is called."""
        try:
            for payload in requests:
                call = self._next_call(payload)
                if call is None:
                    return
                try:
                    principal = self._admit(len(payload))
                except ServingError as error:
                    self._service.refusals.count_error(error)
                    call.fail(error)
                else:
                    call.start(self._service, RequestContext(self._deadline, principal, self._begin_trace()))
            self.is_complete = True
        except grpc.RpcError:
            pass  # the client has disconnected; grpcio calls `cancel` too
        finally:
            self.end()

    def _begin_trace(self) -> RequestTrace | None:
        tracing = self._service.tracing
        return None if tracing is None else tracing.begin_call(self._metadata)

    def responses(self) -> Iterator[tuple[str, bytes | ServingError]]:
        """Yields the result of each request that was read, as `_StreamedCall.wait` returns it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._has_ended)
                if not self._calls:
                    return
                call = self._calls[0]
            yield call.wait()
            call.free()
            with self._changed:
                self._calls.popleft()
                self._changed.notify_all()

    def end(self) -> None:
        """Stops reading; inferences that have started get a response."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """Stops reading and drops all inferences: the client has disconnected."""
        self.end()
        with self._changed:
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def _next_call(self, payload: bytes) -> "_StreamedCall | None":
        """Waits until another inference, of this payload, may start; None if the stream has ended."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._calls) < MAX_IN_FLIGHT or self._has_ended)
            if self._has_ended:
                return None
            call = _StreamedCall(payload, self._service.message_memory, self._service.refusals)
            self._calls.append(call)
            self._changed.notify_all()
            return call


class _StreamedCall:
    """A `ResponseSink` whose result can be waited for. Ignores all results but the first.

    Args:
        payload: the request.
        memory: counts a large response until `free` is called, as its client may not read it.
        refusals: counts a response for which there is no memory: the model's statistics have it as good.
    """

    def __init__(self, payload: bytes, memory: MessageMemory, refusals: Refusals) -> None:
        self._payload = payload
        self._share = MemoryShare(memory)
        self._refusals = refusals
        self._is_done = threading.Event()
        self._result: bytes | ServingError = Cancelled("the client has cancelled the call")
        self._failed_id = ""
        self._request: RequestHandle | None = None

    def start(self, service: InferenceService, context: RequestContext) -> None:
        self._request = service.infer(self._payload, context, self)
        if self._is_done.is_set() and self._request is not None:
            self._request.cancel()  # `cancel` may have run before `_request` was set; after a response it does nothing

    def succeed(self, payload: bytes) -> None:
        try:
            self._share.take(len(payload))
        except ResourceExhausted as error:
            self._refusals.count_error(error)
            self._end(error)
        else:
            self._end(payload)

    def fail(self, error: ServingError) -> None:
        self._end(error)

    def cancel(self) -> None:
        self._is_done.set()
        self.free()
        if self._request is not None:
            self._request.cancel()

    def free(self) -> None:
        """Frees what the response takes of the message memory."""
        self._share.free()

    def wait(self) -> tuple[str, bytes | ServingError]:
        """Returns a serialised ModelInferResponse or an error; and with an error, the id that the client has given."""
        self._is_done.wait()
        return self._failed_id, self._result

    def _end(self, result: bytes | ServingError) -> None:
        if isinstance(result, ServingError):  # only here: to look for the id is to split the request once more
            self._failed_id = request_id(self._payload)
        self._payload = b""
        if not self._is_done.is_set():
            self._result = result
            self._is_done.set()
        else:
            self.free()
