"""The server's log and access log: one line per event on standard error, as text or JSON."""

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
    """Sends the server's log, and the warnings and errors of libraries, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("serving").setLevel(logging.INFO)
    logging.captureWarnings(True)


class AccessLog:
    """Logs one line for each finished RPC: method, status, duration, peer."""

    def begin(self, method: str, peer: str) -> Callable[[int], None]:
        """Starts the clock of an RPC. The caller passes the RPC's status code to the returned function when it ends."""
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
    """One JSON object per line; the fields of an event stand beside its message."""

    def format(self, record: logging.LogRecord) -> str:
        timestamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{timestamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
