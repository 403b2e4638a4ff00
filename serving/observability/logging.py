"""The server's log and access log: one line per event on standard error, as text or JSON."""

import json
import logging
import os
import sys
import time
from typing import Any, Literal

from convoy.auth import Principal
from convoy.printable import printable
from serving.errors import StartupError
from serving.observability.log_output import OutputHandler, RateLimit, log_uncaught_exceptions
from serving.protocol.status import STATUS_NAMES

LogFormat = Literal["text", "json"]

STANDARD_ERROR = 2

_access = logging.getLogger("serving.access")


def set_up_logging(log_format: LogFormat, *, worker: int | None = None) -> None:
    """Sends the server's log, and the warnings, errors and uncaught exceptions of libraries, to standard error.

    Args:
        worker: number of this process among several that write to one log; None for a server of one process.
    """
    handler = OutputHandler(STANDARD_ERROR)
    text = _TEXT if worker is None else _TEXT.replace("%(message)s", f"worker {worker}: %(message)s")
    handler.setFormatter(_JsonFormatter(worker) if log_format == "json" else logging.Formatter(text))
    handler.addFilter(RateLimit())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("serving").setLevel(logging.INFO)
    logging.captureWarnings(True)
    # torch reads this when it is imported. What its C++ code writes by itself would break JSON logs.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    log_uncaught_exceptions()


def report_startup_error(error: StartupError, log_format: LogFormat) -> None:
    """Prints why the server cannot start: one line, after all others."""
    if log_format == "json":
        logging.getLogger("serving").critical("%s", error)
    for handler in logging.getLogger().handlers:
        handler.flush()
    if log_format == "text":
        print(f"error: {printable(str(error))}", file=sys.stderr)


class AccessLogEntry:
    """One line of the access log, of a call that has begun: method, status, duration, peer, principal.

    Attributes:
        principal: the caller; None if it has shown no valid token, or needs none.
    """

    __slots__ = ("_began", "_method", "_peer", "principal")

    def __init__(self, method: str, peer: str) -> None:
        self.principal: Principal | None = None
        self._method = method
        self._peer = peer
        self._began = time.monotonic()

    def end(self, code: int) -> None:
        """Writes the entry, with the call's status code."""
        seconds = time.monotonic() - self._began
        status = STATUS_NAMES.get(code, str(code))
        fields = {"method": self._method, "status": status, "seconds": round(seconds, 6), "peer": self._peer}
        caller = self._peer
        if self.principal is not None:
            fields["principal"] = self.principal.name
            caller = f"{self._peer} {self.principal.name}"
        _access.info("%s %s %.1f ms %s", self._method, status, 1000 * seconds, caller, extra={"fields": fields})


_TEXT = "%(asctime)s %(levelname).1s %(message)s"


class _JsonFormatter(logging.Formatter):
    """One JSON object per line; the fields of an event stand beside its message."""

    def __init__(self, worker: int | None) -> None:
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        timestamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{timestamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._worker,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
