"""One worker: a server that shares its ports with others, and follows a supervisor.

    python -m serving.workers.worker FILE_DESCRIPTOR

It opens its ports only once its models are loaded, so that the kernel gives it no connection before. If its supervisor
ends, it drains and ends too.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from convoy.processes import whole_command
from serving.errors import Internal, InvalidArgument, ServingError, StartupError
from serving.models.changes import Caller, LeftChange
from serving.observability.logging import set_up_logging
from serving.workers.channel import Channel
from serving.workers.messages import (
    BEGIN,
    CHANGE,
    END,
    FAILED,
    MAY_BE_READY,
    METRICS,
    STATE,
    Assignment,
    Change,
    State,
)

logger = logging.getLogger(__name__)

EXIT_CANNOT_START = 2

HEARTBEAT_S = 1.0
"""Pause between two messages to the supervisor, which hears nothing of a process that hangs as a whole."""


def main(file_descriptor: int) -> int:
    """Serves until SIGTERM. Returns the exit code, as `serving.__main__.main`."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    connection = Connection(file_descriptor)
    assignment: Assignment = connection.recv()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    set_up_logging(assignment.config.log_format, worker=assignment.number)
    try:
        Worker(connection, assignment).serve()
    except StartupError as error:
        connection.send(("call", -1, FAILED, str(error)))
        return EXIT_CANNOT_START
    return 0


class Worker:
    """The server of one worker process."""

    def __init__(self, connection: Connection, assignment: Assignment) -> None:
        from serving.server import build_server
        from serving.workers.listeners import HighListeners

        self._config = assignment.config
        self._changes = assignment.changes
        self._models = assignment.models
        self._server = build_server(assignment.config, is_worker=True)
        self._server.repository.serve_like(assignment.models)
        self._server.set_may_be_ready(False)
        self._channel = Channel(connection, self._handle, on_close=_end)
        self._server.admin.control.group = Group(self._channel)
        self._listeners = HighListeners()
        self._has_caught_up = threading.Event()
        self._is_up = False

    def serve(self) -> None:
        """Serves until SIGTERM."""
        from serving.frontends.common.limits import raise_file_limit
        from serving.server import stop_limit_s, stop_signals

        raise_file_limit()
        with stop_signals(stop_limit_s(self._config)) as wait_for_signal:
            self._channel.start()
            threading.Thread(target=self._load, name="loader", daemon=True).start()
            threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()
            wait_for_signal()
            self._server.drain()
            self._listeners.close()
            self._server.stop()

    def _load(self) -> None:
        """Loads the models as the other workers have, then opens the ports."""
        try:
            self._server.load()
            for change in self._changes:
                try:
                    self._make(change)
                except ServingError as error:
                    logger.warning("model '%s' could not be brought to where the others are: %s", change.model, error)
            self._compare()
            self._server.repository.serve_like({})
            self._has_caught_up.set()
            self._server.start()
            self._listeners.hold(self._server.grpc.port, self._server.http.port)
        except StartupError as error:
            self._channel.tell(FAILED, str(error))
            _end()
            return
        self._is_up = True
        self._server.repository.subscribe(self._tell_state)
        self._tell_state()

    def _compare(self) -> None:
        """Compares the models with those of the other workers, whose files may have been damaged since.

        A worker without a model must not take connections from those that have it. An older version is taken, as it is
        by a server that starts.

        Raises:
            StartupError: a model does not load in any version.
        """
        repository = self._server.repository
        for name, others in self._models.items():
            mine, _ = repository.standing(name)
            if mine in others:
                continue
            entries = [entry for entry in repository.index(False) if entry.name == name]
            reasons = "; ".join(f"version {entry.version}: {entry.reason}" for entry in entries if entry.reason)
            what = f"model '{name}', of which other workers serve version {others[0]}"
            if mine is None:
                raise StartupError(f"{what}, does not load: {reasons or 'it is gone'}")
            logger.warning("%s: this one serves version %d: %s", what, mine, reasons)

    def _send_heartbeats(self) -> None:
        while True:
            self._tell_state()
            time.sleep(HEARTBEAT_S)

    def _tell_state(self) -> None:
        repository = self._server.repository
        models: dict[str, tuple[int, ...]] = {}
        for model in repository.ready_models():
            models[model.spec.name] = (*models.get(model.spec.name, ()), int(model.version))
        for name, versions in models.items():
            default, _ = repository.standing(name)
            models[name] = tuple(sorted(versions, key=lambda version: (version != default, -version)))
        self._channel.tell(STATE, State(self._is_up and repository.is_ready(), not repository.is_unhealthy(), models))

    def _handle(self, name: str, argument: object) -> object:
        if name == METRICS:
            return self._server.http.metrics.families()
        if name == CHANGE:
            assert isinstance(argument, Change)
            self._has_caught_up.wait()
            self._make(argument)
        elif name == MAY_BE_READY:
            self._server.set_may_be_ready(bool(argument))
        return None

    def _make(self, change: Change) -> None:
        repository = self._server.repository
        if change.verb == "load":
            repository.load(change.model, change.config)
        elif change.verb == "unload":
            repository.unload(change.model)
        else:
            repository.promotions.follow(change.model)


class Group:
    """All workers, as one of them sees them; a `serving.models.group.Group`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @contextmanager
    def changing(self, verb: str, name: str, caller: Caller, config: str | None = None) -> Iterator[None]:
        while not self._channel.call(BEGIN, name):
            caller.check(name)
        change = Change(verb, name, config)
        try:
            yield
        except BaseException as error:
            if isinstance(left := error.__cause__, LeftChange):
                left.future.add_done_callback(lambda future: self._end_left(change, future))
            else:
                self._end(change, error)
            raise
        self._end(change)

    def _end_left(self, change: Change, future: Future[Any]) -> None:
        """Ends a change whose caller has left."""
        try:
            self._end(change, future.exception())
        except ServingError as error:
            logger.warning("%s", error)

    def _end(self, change: Change, error: BaseException | None = None) -> None:
        """Lets the others make the change. A load that failed may have loaded some versions; others change nothing."""
        is_partial = change.verb == "load" and isinstance(error, Internal | InvalidArgument)
        self._channel.call(END, (change.model, change if error is None or is_partial else None, error is None))


def _end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    with whole_command():
        sys.exit(main(int(sys.argv[1])))
