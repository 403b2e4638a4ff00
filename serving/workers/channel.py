"""Messages between the supervisor and one worker: calls in both directions, over one socket that both inherit.

Nobody else can connect to it. Both ends are processes of one server, so messages may be pickled.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from convoy.threads import ThreadPool
from serving.errors import Internal, ServingError, Unavailable

logger = logging.getLogger(__name__)

NUM_THREADS = 64
"""That handle the other side's calls: more than a worker makes changes at a time, which wait for each other."""


class Channel:
    """One end. Thread-safe.

    Args:
        handle: takes the name and the argument of a call, and returns a value that can be pickled.
        on_close: is called when the other process has ended, or closed its end.
    """

    def __init__(
        self, connection: Connection, handle: Callable[[str, Any], Any], on_close: Callable[[], None] = lambda: None
    ) -> None:
        self._connection = connection
        self._handle = handle
        self._on_close = on_close
        self._lock = threading.Lock()
        self._numbers = count()
        self._waiting: dict[int, Future[Any]] = {}
        self._is_closed = False
        self._threads = ThreadPool(NUM_THREADS, "channel-calls")
        self._thread = threading.Thread(target=self._receive, name="channel", daemon=True)

    def start(self) -> None:
        """Starts to receive."""
        self._thread.start()

    def call(self, name: str, argument: Any = None, *, timeout_s: float | None = None) -> Any:
        """Calls the other side, and returns what it returns.

        Raises:
            Unavailable: the other side has ended, or does not answer in time.
            ServingError: the other side raised it.
        """
        future: Future[Any] = Future()
        number = next(self._numbers)
        with self._lock:
            if self._is_closed:
                raise Unavailable("the process has ended")
            self._waiting[number] = future
        try:
            self._send(("call", number, name, argument))
            return future.result(timeout_s)
        except TimeoutError as error:
            raise Unavailable(f"the process did not answer within {timeout_s:g} s") from error
        finally:
            with self._lock:
                self._waiting.pop(number, None)

    def tell(self, name: str, argument: Any = None) -> None:
        """Calls the other side without waiting. Does nothing if it has ended."""
        self._send(("call", -1, name, argument))

    def close(self) -> None:
        """Ends the connection, as the end of either process does."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)  # unlike closing it, this wakes the thread that receives
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _send(self, message: Any) -> None:
        with self._lock, suppress(OSError):  # `_receive` notices the end too
            self._connection.send(message)

    def _receive(self) -> None:
        try:
            while True:
                kind, number, *content = self._connection.recv()
                if kind == "call":
                    self._threads.submit(self._answer, number, *content)
                elif (future := self._waiting.pop(number, None)) is not None:
                    _resolve(future, *content)
        except (EOFError, OSError, RuntimeError):  # RuntimeError: `close` has ended the threads
            pass
        with self._lock:
            self._connection.close()
            self._is_closed = True
            waiting = list(self._waiting.values())
        for future in waiting:
            future.set_exception(Unavailable("the process has ended"))
        self._on_close()

    def _answer(self, number: int, name: str, argument: Any) -> None:
        value: Any = None
        error: ServingError | None = None
        try:
            value = self._handle(name, argument)
        except ServingError as raised:
            error = raised
        except Exception:
            logger.exception("a call between the processes failed: %s", name)
            error = Internal("the server failed; its log says why")
        if number >= 0:
            self._send(("answer", number, value, error))


def _resolve(future: Future[Any], value: Any, error: ServingError | None) -> None:
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
