"""The jobs of this machine without a service: each command makes a pass itself, and so does each job that ends."""

import getpass
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from trainer.errors import ConfigError
from trainer.service.controller import Controller
from trainer.service.jobs import ACTIVE
from trainer.service.operations import Operations
from trainer.service.store import JobStore

_WAIT_FOR_PASS_S = 5.0


def default_store() -> Path:
    """Returns `$XDG_STATE_HOME/convoy/jobs.db`, or that below `~/.local/state`."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return Path(state if os.path.isabs(state) else os.path.expanduser("~/.local/state")) / "convoy" / "jobs.db"


def engine_folder(store: str) -> Path:
    """Returns the folder for the engines' files: beside the file of an SQLite store, else in the default place."""
    is_file = "://" not in store
    return (Path(store).absolute() if is_file else default_store()).parent


def pass_command(store: str) -> list[str]:
    """Returns the command that a job's runner becomes at its end: it starts the next job."""
    return [sys.executable, "-m", "trainer.service.embedded", store]


@contextmanager
def open_jobs(store: str) -> Iterator[Operations]:
    """Context of the operations on a store.

    Args:
        store: the path of a file, or a URL.

    Raises:
        ConfigError: the store cannot be opened.
    """
    with JobStore(store) as jobs:
        controller = Controller(jobs, engine_folder(store), after_end=pass_command(store))
        make_pass = partial(advance, controller)
        yield Operations(jobs, controller, advance=make_pass, refresh=make_pass)


def advance(controller: Controller) -> None:
    """Makes one pass; waits for another process's for a moment, which then sees the same jobs."""
    until = time.monotonic() + _WAIT_FOR_PASS_S
    try:
        while not controller.make_pass() and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        controller.resign()


def user_name() -> str:
    """Returns the name of the user of this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have none
        return str(os.getuid())


def advance_until_idle(store: str) -> None:
    """Makes passes while a job waits for the pause before its retry, and none runs whose end would make the next one.

    Raises:
        ConfigError: the store cannot be opened.
    """
    with JobStore(store) as jobs:
        controller = Controller(jobs, engine_folder(store), after_end=pass_command(store))
        while True:
            advance(controller)
            waiting = jobs.unfinished()
            if any(job.state in ACTIVE for job in waiting) or not waiting:
                return
            pause = min(job.not_before for job in waiting) - jobs.now()
            if pause <= 0:  # this machine can never run them
                return
            time.sleep(pause)


if __name__ == "__main__":  # an attempt has ended: the next job may start
    try:
        advance_until_idle(sys.argv[1])
    except ConfigError as error:
        sys.exit(f"error: {error}")
