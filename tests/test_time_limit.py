"""Tests of the time limit of tests."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

CONFTEST = """
from tests.time_limit import TimeLimit

def pytest_configure(config):
    config.addinivalue_line("markers", "minutes: takes long")
    config.pluginmanager.register(TimeLimit(0.5, 60.0))
"""
TESTS = """
import threading, time
import pytest

@pytest.fixture
def pool():
    yield
    print("the teardown runs")

def test_hangs(pool):
    thread = threading.Thread(target=lambda: time.sleep(1))
    thread.start()
    try:
        threading.Event().wait()
    except Exception:
        pass  # a server's loop goes on after errors

@pytest.fixture
def hanging():
    threading.Event().wait()

def test_whose_setup_hangs(hanging):
    pass

@pytest.mark.minutes
def test_that_takes_long():
    time.sleep(0.6)
"""


def test_a_test_that_hangs_fails_and_the_next_ones_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_hanging.py").write_text(TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rN",  # its summary repeats the failures, cut to the terminal's width except where CI is set
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.count("Failed: hangs: it has taken 0.5 s") == 2, done.stdout
    assert "the teardown runs" in done.stdout
    assert "in test_hangs" in done.stdout  # the stacks of all threads
    assert "1 failed, 1 passed, 1 error" in done.stdout
