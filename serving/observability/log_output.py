"""Writes log lines to standard error without holding up the threads that log.

A thread of its own writes: where nobody reads standard error, lines are dropped and counted, and requests go on. A
warning or error that repeats is written once a second.
"""

import logging
import os
import queue
import select
import sys
import threading
import time
from collections import OrderedDict

MAX_LINES = 4096
"""Lines that wait to be written; further ones are dropped."""
FLUSH_S = 1.0
"""How long a flush waits for a reader."""
REPEAT_S = 1.0
"""Pause between two lines of one kind, from warnings upwards."""
MAX_KINDS = 256
_KIND_CHARS = 80


class OutputHandler(logging.Handler):
    """Formats a record on the caller's thread, and leaves the writing to another.

    Args:
        file_number: of an open file.
    """

    def __init__(self, file_number: int) -> None:
        super().__init__()
        self._file_number = file_number
        self._items: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._items.qsize() >= MAX_LINES:
            self._num_dropped += 1
            return
        try:
            line = self.format(record)
        except Exception as error:  # a defect of the caller: the line must not be lost, nor end the caller
            line = self.format(_record(logging.ERROR, f"a log line cannot be formatted ({error!r}): {record.msg!r}"))
        self._items.put(line)

    def flush(self) -> None:
        """Waits until all lines are written, for `FLUSH_S` at most."""
        written = threading.Event()
        self._items.put(written)
        written.wait(FLUSH_S)

    def close(self) -> None:
        self.flush()
        super().close()

    def _write_all(self) -> None:
        while True:
            lines, flush = self._take()
            if lines:
                self._write("\n".join([*lines, ""]))
            if flush is not None:
                flush.set()

    def _take(self) -> tuple[list[str], threading.Event | None]:
        """Waits for lines, and returns all that are there: each write may have to wait for the GIL afterwards.

        Returns:
            The lines, up to a flush if one is asked for, and the flush.
        """
        lines: list[str] = []
        item = self._items.get()
        while isinstance(item, str):
            lines.append(item)
            if self._items.empty():
                break
            item = self._items.get()
        if self._num_dropped:
            number, self._num_dropped = self._num_dropped, 0
            lines.append(self.format(_record(logging.WARNING, f"{number} log lines were dropped: too many at once")))
        return lines, None if isinstance(item, str) else item

    def _write(self, text: str) -> None:
        rest = text.encode(errors="backslashreplace")
        try:
            while rest:
                try:
                    rest = rest[os.write(self._file_number, rest) :]
                except BlockingIOError:  # a terminal or pipe that another process has made non-blocking
                    select.select([], [self._file_number], [])
        except OSError:
            return  # the reader has gone, or the disk is full: there is nowhere left to report it


class RateLimit(logging.Filter):
    """Lets the first warning or error of a kind pass, and then one a second, with the number of those held back.

    A kind is a place in the code, the beginning of the message before its values, and the type of the exception.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._kinds: OrderedDict[object, tuple[float, int]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        exception = record.exc_info[0] if record.exc_info else None
        kind = (record.name, record.pathname, record.lineno, str(record.msg)[:_KIND_CHARS], exception)
        now = time.monotonic()
        with self._lock:
            last, num_held = self._kinds.pop(kind, (-REPEAT_S, 0))
            passes = now - last >= REPEAT_S
            self._kinds[kind] = (now, 0) if passes else (last, num_held + 1)
            if len(self._kinds) > MAX_KINDS:
                self._kinds.popitem(last=False)
        if passes and num_held:
            record.msg, record.args = f"{record.getMessage()} ({num_held} more like this)", None
        return passes


def log_uncaught_exceptions() -> None:
    """Sends uncaught exceptions of all threads, and those that Python can only report, to the log."""
    logger = logging.getLogger("serving")
    usual = sys.excepthook

    def on_exception(kind: type[BaseException], error: BaseException, trace: object) -> None:
        if issubclass(kind, Exception):
            logger.critical("an exception ends the process", exc_info=error)
        else:
            usual(kind, error, trace)  # type: ignore[arg-type]

    def on_thread_exception(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
            name = arguments.thread.name if arguments.thread else "unknown"
            logger.critical("an exception ends the thread %s", name, exc_info=arguments.exc_value)

    def on_unraisable(arguments: "sys.UnraisableHookArgs") -> None:
        message = arguments.err_msg or "an exception was ignored in"
        logger.error("%s %r", message, arguments.object, exc_info=arguments.exc_value)

    sys.excepthook = on_exception
    threading.excepthook = on_thread_exception
    sys.unraisablehook = on_unraisable


def _record(level: int, message: str) -> logging.LogRecord:
    return logging.LogRecord(__name__, level, __file__, 0, message, None, None)
