"""The jobs of this machine without a service: each command makes a pass itself, and so does each job that ends."""

import getpass
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from trainer.errors import ConfigError
from trainer.service.controller import Controller
from trainer.service.operations import Operations
from trainer.service.store import JobStore, StoreError

_WAIT_FOR_PASS_S = 5.0
_STORE_PAUSE_S = 10.0
"""Until a store is tried again that could not be used."""
_STORE_TRIES = 8640
"""For a day."""


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
def open_jobs(store: str, tell: Callable[[str], None]) -> Iterator[Operations]:
    """Context of the operations on a store.

    Args:
        store: the path of a file, or a URL.
        tell: see `Operations`.

    Raises:
        ConfigError: the store cannot be opened.
    """
    with JobStore(store) as jobs:
        controller = Controller(jobs, engine_folder(store), after_end=pass_command(store))
        make_pass = partial(advance, jobs, controller)
        yield Operations(jobs, controller, advance=make_pass, refresh=make_pass, tell=tell)


def advance(jobs: JobStore, controller: Controller) -> None:
    """Makes one pass, or waits until another process, such as a service, begins one: it sees the same jobs."""
    until = time.monotonic() + _WAIT_FOR_PASS_S
    try:
        begun = None
        while not controller.make_pass() and time.monotonic() < until:
            newest = jobs.lease_end()
            if begun is not None and newest > begun:
                return
            begun = newest
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
    """Makes passes while a job waits for the pause before its retry. Others wait for the end of one that runs."""
    for _ in range(_STORE_TRIES):
        try:
            with JobStore(store) as jobs:
                controller = Controller(jobs, engine_folder(store), after_end=pass_command(store))
                advance(jobs, controller)
                while (pause_s := jobs.next_pause_s()) is not None:
                    time.sleep(pause_s)
                    advance(jobs, controller)
                return
        except (StoreError, ConfigError):  # its disk is full, or it is away: nobody else may start what waits
            time.sleep(_STORE_PAUSE_S)


if __name__ == "__main__":  # an attempt has ended: the next job may start
    advance_until_idle(sys.argv[1])
