"""Programs that take turns on one machine, so that all meet it in the same state: the parent's and the child's side."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

_MARK = "RESULT "
"""Begins the lines that are for the parent; a child may print others."""


class Child:
    """A program that is prepared once and then runs when it is told to.

    Args:
        command: of a program that calls `serve`.
    """

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.prepared: dict[str, Any] = self._read()
        """What the program said when it was ready."""
        self.results: list[dict[str, Any]] = []

    def run(self, number: int) -> None:
        """Runs that many times, and appends the results."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        self.results += self._read()

    def close(self) -> None:
        """Ends the program."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        sys.exit(f"error: {' '.join(self._command)} ended with exit code {self._process.wait()}")


def serve(prepared: dict[str, Any], run: Callable[[int], dict[str, Any]]) -> None:
    """Tells the parent that the program is ready, and then runs as often as it asks.

    Args:
        run: takes the number of the run, counted from 0, and returns its result.
    """
    _tell(prepared)
    done = 0
    for line in sys.stdin:
        _tell([run(done + number) for number in range(int(line))])
        done += int(line)


def _tell(value: Any) -> None:
    print(f"{_MARK}{json.dumps(value)}", flush=True)
