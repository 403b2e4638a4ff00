"""Log lines reach standard error, or are dropped and counted, and never hold up a thread that logs."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving.observability import log_output
from serving.observability.log_output import MAX_KINDS, MAX_LINES, OutputHandler, RateLimit

PATIENCE_S = 30

ON_ITS_OWN = """
import threading, warnings
from serving.observability.logging import set_up_logging
set_up_logging("json")
import serving.backends.onnx
import numpy as np
import onnxruntime as ort
from tests.serving.model_files import scale
warnings.warn("a warning")
def fail(*anything):
    raise ZeroDivisionError("an error")
thread = threading.Thread(target=fail, name="worker")
thread.start()
thread.join()
class Thing:
    def __del__(self):
        fail()
Thing()
for model, wrong in ((b"garbage", {}), (scale(2.0), {"x": np.zeros((1, 1, 7), np.float32)})):
    try:
        ort.InferenceSession(model).run(None, wrong)
    except Exception:
        pass  # and nothing of ONNX Runtime's own
fail()
"""

OF_TORCH = """
from datetime import timedelta
from serving.observability.logging import set_up_logging
set_up_logging("json")
from torch.distributed import TCPStore
TCPStore("127.0.0.1", 1, 2, False, timedelta(seconds=0.01))
"""
"""Nobody listens on that port, which torch's C++ code reports by lines of its own."""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def record(message: str, *values: object, level: int = logging.ERROR, line: int = 1) -> logging.LogRecord:
    return logging.LogRecord("x", level, "x.py", line, message, values, None)


def test_what_writes_by_itself_is_json_too() -> None:
    done = subprocess.run([sys.executable, "-c", ON_ITS_OWN], capture_output=True, text=True, timeout=60, check=False)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1
    assert ["a warning" in lines[0]["message"], *[line["message"].split(" <")[0] for line in lines[1:]]] == [
        True,
        "an exception ends the thread worker",
        "an exception was ignored in",
        "an exception ends the process",
    ]
    assert all("ZeroDivisionError: an error" in line["exception"] for line in lines[1:])


@pytest.mark.minutes
def test_torch_writes_nothing_by_itself() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    command = [sys.executable, "-c", OF_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    [line] = done.stderr.splitlines()
    assert "DistNetworkError" in json.loads(line)["exception"]


def test_an_unread_output_holds_up_nobody(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_output, "FLUSH_S", 0.05)
    read_end, write_end = pipe
    handler = OutputHandler(write_end)
    number = 3 * MAX_LINES
    began = time.monotonic()
    for at in range(number):
        handler.handle(record("%06d " + 100 * "x", at))
    handler.flush()
    assert time.monotonic() - began < PATIENCE_S / 3
    lines: list[str] = []

    def read() -> None:
        with os.fdopen(os.dup(read_end)) as stream:
            for line in stream:
                lines.append(line)
                if "dropped" in line:
                    return

    reader = threading.Thread(target=read)
    reader.start()
    reader.join(PATIENCE_S)
    dropped = int(next(line for line in lines if "dropped" in line).split()[0])
    assert 0 < dropped < number
    os.set_blocking(read_end, False)
    wait_until(lambda: handler._items.qsize() == 0 or not _read(read_end))
    assert lines[0].startswith("000000 ")


def _read(read_end: int) -> bytes:
    try:
        return os.read(read_end, 1 << 20)
    except BlockingIOError:
        return b""


@pytest.mark.parametrize("non_blocking", [False, True])
def test_lines_are_complete_and_in_order(pipe: tuple[int, int], non_blocking: bool) -> None:
    read_end, write_end = pipe
    os.set_blocking(write_end, not non_blocking)
    handler = OutputHandler(write_end)
    found = bytearray()

    def read() -> None:
        while found.count(b"\n") < 1000:
            found.extend(os.read(read_end, 1000))

    reader = threading.Thread(target=read)
    reader.start()
    for at in range(1000):
        handler.handle(record("%d %s", at, "y" * 500))
    handler.close()
    reader.join(PATIENCE_S)
    assert found.decode().splitlines() == [f"{at} {'y' * 500}" for at in range(1000)]


def test_a_busy_interpreter_loses_no_line(pipe: tuple[int, int]) -> None:
    """A thread gets the GIL back only after milliseconds where others compute: each write takes all lines."""
    read_end, write_end = pipe
    handler = OutputHandler(write_end)
    over, found = threading.Event(), bytearray()
    number = 2 * MAX_LINES

    def compute() -> None:
        while not over.is_set():
            sum(range(1000))

    def read() -> None:
        while found.count(b"\n") < number:
            found.extend(os.read(read_end, 1 << 20))

    threads = [threading.Thread(target=target) for target in (compute, compute, read)]
    for thread in threads:
        thread.start()
    for at in range(number):
        handler.handle(record("%d", at))
        if at % 100 == 99:
            time.sleep(0.02)  # 5,000 lines a second
    handler.flush()
    over.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert found.decode().splitlines() == [str(at) for at in range(number)]


def test_a_closed_output_ends_nothing() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    handler = OutputHandler(write_end)
    for _ in range(3):
        handler.handle(record("nobody listens"))
        handler.flush()
    assert handler._thread.is_alive()
    os.close(write_end)


@pytest.mark.parametrize(("message", "values"), [("%d", ("one",)), ("%s %s", (1,)), ("%z", (1,))])
def test_a_line_that_cannot_be_formatted_is_not_lost(
    pipe: tuple[int, int], message: str, values: tuple[object, ...]
) -> None:
    handler = OutputHandler(pipe[1])
    handler.handle(record(message, *values))
    handler.flush()
    assert "a log line cannot be formatted" in os.read(pipe[0], 1000).decode()


def test_a_name_with_a_lone_surrogate(pipe: tuple[int, int]) -> None:
    handler = OutputHandler(pipe[1])
    handler.handle(record("%s", "a\udcff"))
    handler.flush()
    assert os.read(pipe[0], 1000) == b"a\\udcff\n"


class TestRateLimit:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [100.0]
        monkeypatch.setattr("serving.observability.log_output.time.monotonic", lambda: now[0])
        return now

    def test_the_first_of_a_kind_passes_and_then_one_a_second(self, clock: list[float]) -> None:
        limit = RateLimit()
        passed = []
        for at in range(2500):
            clock[0] = 100 + at / 1000
            line = record("socket %d failed", at)
            if limit.filter(line):
                passed.append(line.getMessage())
        assert passed == [
            "socket 0 failed",
            "socket 1000 failed (999 more like this)",
            "socket 2000 failed (999 more like this)",
        ]

    def test_other_kinds_pass(self, clock: list[float]) -> None:
        limit = RateLimit()
        other = record("failed")
        other.exc_info = (ValueError, ValueError(), None)
        kinds = [record("failed"), record("failed", line=2), record("also failed"), other]
        assert all(limit.filter(kind) for kind in kinds)
        assert not any(limit.filter(kind) for kind in kinds)

    def test_information_is_not_limited(self, clock: list[float]) -> None:
        limit = RateLimit()
        assert all(limit.filter(record("served", level=logging.INFO)) for _ in range(10))

    def test_memory_is_bounded(self, clock: list[float]) -> None:
        limit = RateLimit()
        for at in range(10 * MAX_KINDS):
            assert limit.filter(record(f"failure {at}"))
        assert len(limit._kinds) == MAX_KINDS


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_server_that_cannot_start_says_so_in_its_format(tmp_path: Path, log_format: str) -> None:
    arguments = ["--model-repository", str(tmp_path / "none"), "--log-format", log_format]
    done = subprocess.run(
        [sys.executable, "-m", "serving", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    message = line.removeprefix("error: ") if log_format == "text" else json.loads(line)["message"]
    assert str(tmp_path / "none") in message
    assert message != line
