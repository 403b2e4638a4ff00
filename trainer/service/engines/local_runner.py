"""The parent of a local job's processes: `python -I -S local_runner.py FOLDER LOCK`, started by `engines.local`.

Runs the command of `FOLDER/command.json`, writes its output to `log` and its exit code to `exit.json`. It passes
SIGTERM on once, so that the job saves; SIGQUIT ends all of the job's processes. It imports the standard library only,
to start in a few hundredths of a second, and holds the descriptor LOCK, which tells others that the attempt is alive.

It also holds a name for each GPU of the job, which no other runner of this machine can have at that time: an abstract
Unix socket, which ends with the processes that have it. Jobs of another store may have the same GPUs.
"""

import os
import sys

if __name__ == "__main__" and os.fork():  # the process that starts jobs waits for this one, and not for the imports
    os._exit(0)

import errno
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from runpy import run_path
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
EXIT_BYTES = 128
GPU_NAME = "convoy-gpu-{}"
"""Of the socket that a runner holds for a GPU."""
ATTEMPT = "CONVOY_ATTEMPT"
"""A variable of all processes of an attempt: its folder."""
POLL_S = 0.2
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE}
"""Errors of a machine that has no room now."""
ORPHANS_S = 10.0
"""Processes that the command has left may end by themselves for so long."""


def main(folder: Path, lock: int) -> None:
    """Runs the attempt in `folder` to its end, and then becomes the command `after_end`, if there is one."""
    command = json.loads((folder / "command.json").read_text())
    run(folder, lock, command)
    os.close(lock)
    if command["after_end"]:
        os.execv(command["after_end"][0], command["after_end"])


def run(folder: Path, lock: int, command: dict[str, Any]) -> None:
    """Runs the attempt in `folder` to its end."""
    _call_prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphaned ranks become children of this process
    child: subprocess.Popen[bytes] | None = None
    asked: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        if number in asked:  # a second SIGTERM would end a training that still saves
            return
        asked.append(number)
        if child is not None:
            _pass_on(number, child.pid)

    for number in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, stop)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _reserve(folder / "exit.json")
    _write(folder / "process.json", _identity(os.getpid()))
    held = _hold(command["gpus"], folder / "waits", asked)
    if asked:
        _end(folder, -asked[0], held)
        return
    try:
        with (folder / "log").open("ab", buffering=0) as log:
            child = subprocess.Popen(
                command["arguments"],
                cwd=command["folder"],
                env=command["environment"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock, *(name.fileno() for name in held)),
                preexec_fn=lambda: _prepare(command),
            )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        with suppress(OSError):
            (folder / "log").write_text(f"error: cannot start {command['arguments'][0]}: {error}\n")
        code = 1 if isinstance(error, OSError) and error.errno in PASSING else 127  # which no other attempt would mend
        _end(folder, code, held)
        return
    if asked:
        _pass_on(asked[-1], child.pid)
    _end(folder, _wait_for(child, folder, command["cgroup"]), held)


def _wait_for(child: subprocess.Popen[bytes], folder: Path, cgroup: str | None) -> int:
    """Returns the exit code of the command, when nothing of it runs any more. Bounds its logs until then."""
    ended = threading.Event()
    bounding = threading.Thread(target=_bound_logs, args=(folder, ended))
    with suppress(RuntimeError):  # the system has no thread for it
        bounding.start()
    code = child.wait()
    _end_orphans()
    ended.set()
    if bounding.ident is not None:
        bounding.join()
    if cgroup:
        with suppress(OSError):
            os.rmdir(cgroup)
    return code


def _bound_logs(folder: Path, ended: threading.Event) -> None:
    log_limit = run_path(str(Path(__file__).parents[1] / "log_limit.py"))
    while not ended.wait(log_limit["EVERY_S"]):
        log_limit["limit_all"](folder)
    log_limit["limit_all"](folder)


def _end(folder: Path, code: int, held: Sequence[socket.socket]) -> None:
    """Frees the GPUs, and then writes the exit code, after which the next job may start."""
    for name in held:
        name.close()
    with suppress(FileNotFoundError):  # somebody has deleted the folder
        _fill(folder / "exit.json", {"code": code, "time": time.time()})


def _hold(gpus: Sequence[str], waits: Path, asked: Sequence[int]) -> list[socket.socket]:
    """Takes the names of GPUs, as soon as nobody else has them; gives up if the job was asked to end.

    Args:
        waits: the file that says what it waits for.
    """
    held = []
    for gpu in sorted(gpus):  # all runners in one order: none waits for one that waits for it
        held.append(socket.socket(socket.AF_UNIX))
        while not asked:
            try:
                held[-1].bind("\0" + GPU_NAME.format(gpu))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            with suppress(OSError):
                waits.write_text(f"GPU {gpu} is used by a job of another store of this machine")
            time.sleep(POLL_S)
    waits.unlink(missing_ok=True)
    return held


def start_time(pid: int) -> int:
    """Returns when a process began, in the kernel's clock ticks; with its number this names it for ever.

    Raises:
        ProcessLookupError: there is no such process, or it has ended and nobody has read its exit code.
    """
    try:
        # The name, in parentheses, may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    if fields[0] == "Z":
        raise ProcessLookupError(pid)
    return int(fields[19])


def find(folder: Path) -> dict[str, Any] | None:
    """Returns the runner of the attempt in a folder, which may be gone, as `process.json` has it, or None."""
    arguments = b"\0%b\0%b\0" % (__file__.encode(), os.fsencode(folder))
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if arguments in path.read_bytes():
                return _identity(int(path.parent.name))
    return None


def _identity(pid: int) -> dict[str, Any]:
    return {"pid": pid, "start_time": start_time(pid)}


def _prepare(command: dict[str, Any]) -> None:
    """Runs in the child before the command: a runner that is killed ends it with a signal to save."""
    _call_prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if command["cgroup"]:
        Path(command["cgroup"], "cgroup.procs").write_text(str(os.getpid()))
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if command["cpus"]:
        with suppress(OSError):  # the machine has lost a CPU since
            os.sched_setaffinity(0, command["cpus"])


def _pass_on(number: int, pid: int) -> None:
    if number == signal.SIGQUIT:
        _kill_descendants()
    else:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _kill_descendants() -> None:
    """Kills every process below this one, also those that have sessions of their own, until none runs."""
    for _ in range(100):
        found = _descendants(os.getpid())
        if not found:
            return
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def processes(folder: Path) -> list[int]:
    """Returns the processes of an attempt, by its folder: torchrun's ranks have other sessions, and no lock."""
    wanted = os.fsencode(f"{ATTEMPT}={folder}")
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # another user's, or it has ended
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def kill_processes(folder: Path) -> None:
    """Kills every process of an attempt whose runner is gone, and below it, until none runs."""
    for _ in range(100):
        found = processes(folder)
        if not found:
            return
        for number in [pid for each in found for pid in (*_descendants(each), each)]:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.02)


def _descendants(pid: int) -> list[int]:
    """Returns the processes below a process that have not ended."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, task.read_text().split()):
                state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
                found += [*([child] if state != "Z" else []), *_descendants(child)]
    return found


def _end_orphans() -> None:
    """Waits for what the command has left running, and ends it: an exit code means that nothing runs any more."""
    until = time.monotonic() + ORPHANS_S
    while time.monotonic() < until and _descendants(os.getpid()):
        time.sleep(0.05)
    _kill_descendants()
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:  # the dead of the job that became children of this process
            pass


def _call_prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _write(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _reserve(path: Path) -> None:
    """Writes blanks, which take the room of the exit code: the disk may be full when the job ends."""
    with path.with_suffix(".tmp").open("w") as file:
        file.write(" " * EXIT_BYTES)
        file.flush()
        os.fsync(file.fileno())


def _fill(path: Path, value: dict[str, Any]) -> None:
    """Writes the exit code into the room that is reserved for it."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("r+") as file:
        file.write(json.dumps(value).ljust(EXIT_BYTES))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
