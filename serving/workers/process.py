"""One worker process, as the supervisor sees it."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import serving
from serving.workers.channel import Channel
from serving.workers.messages import Assignment, State

_KILL_S = 10.0


def _environment() -> dict[str, str]:
    """Returns an environment in which Python imports the code of this process."""
    folders = [str(Path(serving.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


class WorkerProcess:
    """A worker that has been started. It is in a process group of its own: Ctrl-C reaches the supervisor only.

    Args:
        handle: takes the worker's calls, as `Channel` does.
        on_exit: is called when the process has ended, on a thread of its own.

    Attributes:
        state: as the worker told last.
        heard: when that was, on the clock of `time.monotonic`; None before the first time.
    """

    def __init__(
        self,
        assignment: Assignment,
        handle: "Callable[[WorkerProcess, str, Any], Any]",
        on_exit: "Callable[[WorkerProcess], None]",
    ) -> None:
        self.number = assignment.number
        self.state = State()
        self.heard: float | None = None
        self._on_exit = on_exit
        ours, theirs = socket.socketpair()
        with theirs:
            # -P: a folder `serving` where the command was started must not be imported in place of this package.
            command = [sys.executable, "-P", "-m", "serving.workers.worker", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], process_group=0, env=_environment()
            )
        connection = Connection(ours.detach())
        with suppress(OSError):  # it may have ended already
            connection.send(assignment)
        self.channel = Channel(connection, lambda name, argument: handle(self, name, argument))
        self.channel.start()
        threading.Thread(target=self._watch, name=f"worker-{self.number}", daemon=True).start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """As `subprocess.Popen.returncode`: negative for a signal, None while the process runs."""
        return self._process.returncode

    def terminate(self) -> None:
        """Asks the worker to drain and to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the worker at once."""
        self._send(signal.SIGKILL)

    def wait(self, timeout_s: float) -> int:
        """Waits for the worker's end, and kills it after the time-out. Returns its exit code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait(_KILL_S)

    def describe_end(self) -> str:
        """Returns how the process has ended."""
        code = self._process.returncode
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _send(self, number: int) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def _watch(self) -> None:
        self._process.wait()
        self.channel.close()
        self._on_exit(self)
