"""Runs Python command lines in children of one interpreter that has imported torch, which takes seconds each time.

A child differs from `python …` in nothing else: it has its own arguments, environment, working folder and output. The
ranks that a torchrun in a child starts are new interpreters.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

MAX_BYTES = 1 << 17


class Interpreter:
    """An interpreter that has imported torch, to run one command line after another."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=env,
            )  # pipes, as the children have them

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._requests.close()
        self._process.communicate(timeout=60)

    def run(
        self, arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None, timeout_s: float = 240
    ) -> "subprocess.CompletedProcess[str]":
        """Runs `python ARGUMENTS` to its end.

        Args:
            arguments: a script, or `-m` and a module, and then theirs.
            timeout_s: after it the process group is killed.

        Returns:
            the exit code, the output and the errors.

        Raises:
            TimeoutError: it has not ended in time.
        """
        (out, their_out), (err, their_err) = os.pipe(), os.pipe()
        request = json.dumps({"arguments": list(arguments), "cwd": str(cwd or Path.cwd()), "env": dict(env)})
        socket.send_fds(self._requests, [request.encode()], [their_out, their_err])
        os.close(their_out)
        os.close(their_err)
        with ThreadPoolExecutor(2) as readers, open(out) as output, open(err) as errors:
            pid = self._answer()
            texts = [readers.submit(file.read) for file in (output, errors)]
            try:
                printed, failed = [text.result(timeout_s) for text in texts]
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                raise
            finally:
                code = os.waitstatus_to_exitcode(self._answer())
        return subprocess.CompletedProcess([sys.executable, *arguments], code, printed, failed)

    def _answer(self) -> int:
        answer = self._requests.recv(MAX_BYTES)
        if not answer:
            raise RuntimeError(f"the interpreter has ended: {self._process.communicate()[1].decode()}")
        return int(answer)


def serve_until_forked() -> list[str]:
    """Forks for each request on standard input. Returns in the child, with its arguments."""
    requests = socket.socket(fileno=0)
    while True:
        request, files, _, _ = socket.recv_fds(requests, MAX_BYTES, 2)
        if not request:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            requests.detach()
            os.setpgid(0, 0)
            return become(*files, **json.loads(request))
        for file in files:
            os.close(file)
        requests.send(str(pid).encode())
        requests.send(str(os.waitpid(pid, 0)[1]).encode())


def become(out: int, err: int, *, arguments: list[str], cwd: str, env: dict[str, str]) -> list[str]:
    """Makes this process what `python ARGUMENTS` would be. Returns the arguments."""
    for file, place in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(file, place)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    return arguments


def main() -> None:
    import torch.distributed.launcher.api  # noqa: F401, TID251 (all that torchrun needs)

    gc.freeze()  # else a child's collector writes to all objects, and so copies them
    arguments = serve_until_forked()
    if arguments[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).parent)
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
