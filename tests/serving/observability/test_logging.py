"""The log of a server process."""

import json
import subprocess
import sys

SCRIPT = """
import logging, warnings
from convoy.auth import Principal
from serving.observability.logging import AccessLogEntry, set_up_logging
set_up_logging({format!r})
logging.getLogger("serving.x").info("hello %s", "there")
logging.getLogger("someone.else").info("not wanted")
entry = AccessLogEntry("/a/B", "ipv4:1.2.3.4:5")
entry.end(8)
entry.principal = Principal("alice", frozenset())
entry.end(0)
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("serving.x").exception("failed")
"""


def _log(log_format: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(format=log_format)], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stderr.splitlines()


def test_json_logs_have_one_object_per_line() -> None:
    hello, access, named, failed = [json.loads(line) for line in _log("json")]
    assert hello["message"] == "hello there"
    assert hello["level"] == "info"
    assert (access["method"], access["status"], access["peer"]) == ("/a/B", "RESOURCE_EXHAUSTED", "ipv4:1.2.3.4:5")
    assert access["seconds"] >= 0
    assert "principal" not in access
    assert (named["status"], named["principal"]) == ("OK", "alice")
    assert "ZeroDivisionError" in failed["exception"]


def test_text_logs_have_one_plain_line_per_event() -> None:
    lines = _log("text")
    assert lines[0].endswith("I hello there")
    assert "/a/B RESOURCE_EXHAUSTED" in lines[1]
    assert lines[2].endswith("ipv4:1.2.3.4:5 alice")
    assert not any("not wanted" in line for line in lines)
