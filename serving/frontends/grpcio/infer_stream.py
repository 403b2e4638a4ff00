"""ModelStreamInfer: many inferences over one RPC. Knows nothing of how its messages come and go."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator

import grpc

from serving.errors import Cancelled, ServingError
from serving.inference.request import RequestHandle
from serving.inference.service import Service

MAX_IN_FLIGHT = 128
"""Inferences of one stream at a time; more wait in the client, by HTTP/2's flow control."""


class InferStream:
    """One ModelStreamInfer: requests run together, answers come in the order of the requests."""

    def __init__(self, service: Service, deadline: float | None) -> None:
        self._service = service
        self._deadline = deadline
        self._changed = threading.Condition()
        self._calls: deque[_StreamedCall] = deque()
        self._has_ended = False
        self.is_complete = False
        """Whether the caller has sent all that it wants to."""

    def read(self, requests: Iterable[bytes]) -> None:
        """Begin an inference for each request until there are no more, or `end` is called."""
        try:
            for payload in requests:
                call = self._make_room()
                if call is None:
                    return
                call.begin(self._service, payload, self._deadline)
            self.is_complete = True
        except grpc.RpcError:
            pass  # the caller has gone; `cancel` is called for it too
        finally:
            self.end()

    def answers(self) -> Iterator[bytes | ServingError]:
        """A serialised ModelInferResponse or an error for each request, until the last one that was read."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._has_ended)
                if not self._calls:
                    return
                call = self._calls[0]
            yield call.wait()
            with self._changed:
                self._calls.popleft()
                self._changed.notify_all()

    def end(self) -> None:
        """Read no more; what has begun is answered."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """The caller has gone: drop everything."""
        self.end()
        with self._changed:
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def _make_room(self) -> "_StreamedCall | None":
        with self._changed:
            self._changed.wait_for(lambda: len(self._calls) < MAX_IN_FLIGHT or self._has_ended)
            if self._has_ended:
                return None
            call = _StreamedCall()
            self._calls.append(call)
            self._changed.notify_all()
            return call


class _StreamedCall:
    """A `ResponseSink` that someone waits for. The first result counts."""

    def __init__(self) -> None:
        self._is_done = threading.Event()
        self._result: bytes | ServingError = Cancelled("the caller has gone")
        self._pending: RequestHandle | None = None

    def begin(self, service: Service, payload: bytes, deadline: float | None) -> None:
        self._pending = service.infer(payload, self, deadline)
        if self._is_done.is_set() and self._pending is not None:
            self._pending.cancel()  # cancelled while it was being begun; done already otherwise, and no harm

    def succeed(self, payload: bytes) -> None:
        self._end(payload)

    def fail(self, error: ServingError) -> None:
        self._end(error)

    def cancel(self) -> None:
        self._is_done.set()
        if self._pending is not None:
            self._pending.cancel()

    def wait(self) -> bytes | ServingError:
        self._is_done.wait()
        return self._result

    def _end(self, result: bytes | ServingError) -> None:
        if not self._is_done.is_set():
            self._result = result
            self._is_done.set()
