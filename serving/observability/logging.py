"""The server's log: one line an event, as text or as JSON, on standard error; and the access log."""

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from serving.protocol.status import NAMES

LogFormat = Literal["text", "json"]

_access = logging.getLogger("serving.access")


def set_up_logging(log_format: LogFormat) -> None:
    """Send what the server logs, and nothing below warnings of the libraries, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("serving").setLevel(logging.INFO)
    logging.captureWarnings(True)


class AccessLog:
    """A line for each RPC when it is over: method, status, time, caller."""

    def begin(self, method: str, peer: str) -> Callable[[int], None]:
        """Note that an RPC has begun; call the result with its gRPC status code when it is over."""
        began = time.monotonic()

        def end(code: int) -> None:
            seconds = time.monotonic() - began
            fields = {
                "method": method,
                "status": NAMES.get(code, str(code)),
                "seconds": round(seconds, 6),
                "peer": peer,
            }
            _access.info("%s %s %.1f ms %s", method, fields["status"], 1000 * seconds, peer, extra={"fields": fields})

        return end


_TEXT = "%(asctime)s %(levelname).1s %(message)s"


class _JsonFormatter(logging.Formatter):
    """One object a line; an event's own fields beside its message."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
