"""The supervisor of several workers: starts them, restarts those that die, and serves their metrics and health.

It holds the ports, so that no other server takes them, but never listens on them: each worker does (SO_REUSEPORT), and
the kernel spreads connections over those that do. It serves the one port of metrics and probes: ready when all workers
are, with the metrics of all added up. On SIGTERM all workers drain at the same time.
"""

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from prometheus_client.core import Metric

from convoy.cpus import num_available_cpus
from convoy.same_origin import host_check
from convoy.threads import ThreadPool
from serving.config import ServeConfig
from serving.errors import Internal, ServingError, StartupError
from serving.frontends.http.app import build_metrics_app
from serving.frontends.http.connections import METRICS_CONNECTIONS
from serving.frontends.http.server import HttpServer
from serving.observability.metrics import Families
from serving.observability.refusals import Refusals
from serving.server import log_addresses, read_credentials, stop_limit_s, stop_signals
from serving.workers.aggregate import lasting, merge
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
)
from serving.workers.process import WorkerProcess

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 30.0
"""Before a worker is started again: twice as long after each death, until one has lived for `STEADY_S`."""
STEADY_S = 60.0
SILENT_S = 60.0
"""Without a message, after which a worker counts as hung, as when a model in Python never releases the GIL."""
TURN_S = 0.25
"""How long a worker waits for its turn to change a model, before it looks whether its caller still waits."""
METRICS_TIMEOUT_S = 1.0
"""After which a worker's metrics are those of the last scrape."""
_STOP_MARGIN_S = 5.0


def supervise(config: ServeConfig) -> int:
    """Serves with several workers until SIGTERM or SIGINT.

    Returns:
        The exit code: 0 after a drain, 1 if a worker could not finish its requests.

    Raises:
        StartupError: an option is invalid, or a file, port or device that it names is not available.
    """
    config.check()
    with stop_signals() as wait_for_signal, ExitStack() as ports:
        supervisor = Supervisor(_hold_ports(config, ports))
        try:
            supervisor.start()
            supervisor.wait_for_end(wait_for_signal)
        finally:
            supervisor.stop()
        return supervisor.exit_code


class Supervisor:
    """The workers, and what they have in common.

    Args:
        config: with the ports that are held.

    Attributes:
        exit_code: once `stop` has returned.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.exit_code = 0
        self._config = config
        self._workers: dict[int, WorkerProcess] = {}
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._owners: dict[str, int] = {}
        self._changes: dict[str, Change] = {}
        self._pauses: dict[int, float] = {}
        self._began: dict[int, float] = {}
        self._scraped: dict[int, list[Metric]] = {}
        self._ended_metrics: list[Metric] = []
        self._is_ready = self._was_ready = self._is_stopping = False
        self._failure: str | None = None
        self._has_failed = threading.Event()
        tokens, _ = read_credentials(config)
        hosts = host_check(config.metrics_host or config.host, config.cors_origin)
        self._metrics_server = HttpServer(
            "http-metrics",
            lambda server: build_metrics_app(self, self._render, tokens, hosts),
            max_connections=lambda: METRICS_CONNECTIONS,
            refusals=Refusals(),
        )
        self._calls = ThreadPool(4 * config.workers, "workers")

    def is_live(self) -> bool:
        """Returns whether no worker must be restarted."""
        return all(worker.state.is_live for worker in list(self._workers.values())) and not self._has_silent()

    def is_ready(self) -> bool:
        """Returns whether all workers are ready."""
        return self._is_ready and not self._is_stopping and not self._has_silent()

    def _has_silent(self) -> bool:
        """Returns whether a worker has stopped sending its state, and logs which."""
        since = time.monotonic() - SILENT_S
        for worker in list(self._workers.values()):
            if worker.heard is not None and worker.heard < since:
                logger.error("worker %d hangs: it has told nothing for %g s", worker.number, SILENT_S)
                return True
        return False

    def start(self) -> None:
        """Starts the workers, and the port of metrics and probes.

        Raises:
            StartupError: that port is not available.
        """
        config = self._config
        self._metrics_server.listen(config.metrics_host or config.host, config.metrics_port)
        self._metrics_server.start()
        for number in range(1, config.workers + 1):
            self._start_worker(number)

    def wait_for_end(self, wait_for_signal: Callable[[], object]) -> None:
        """Returns when a signal has arrived.

        Raises:
            StartupError: a worker cannot start.
        """
        signalled = threading.Event()

        def wait() -> None:
            wait_for_signal()
            signalled.set()
            self._has_failed.set()

        threading.Thread(target=wait, name="signal-wait", daemon=True).start()
        self._has_failed.wait()
        if not signalled.is_set():
            raise StartupError(self._failure or "a worker cannot start")

    def stop(self) -> None:
        """Lets all workers drain, and ends. Ends them at once if one could not start."""
        with self._lock:
            self._is_stopping = True
            workers = list(self._workers.values())
        for worker in workers:
            worker.kill() if self._failure is not None else worker.terminate()
        patience_s = stop_limit_s(self._config) + _STOP_MARGIN_S
        until = time.monotonic() + patience_s
        codes = [worker.wait(max(0.0, until - time.monotonic())) for worker in workers]
        self.exit_code = int(any(codes))
        self._metrics_server.stop(1)
        self._calls.shutdown(wait=False, cancel_futures=True)

    # ---- Workers -----------------------------------------------------------------------------------------------------

    def _start_worker(self, number: int) -> None:
        with self._lock:
            if self._is_stopping:
                return
            self._began[number] = time.monotonic()
            models = next((worker.state.models for worker in self._workers.values() if worker.state.models), {})
            assignment = Assignment(number, self._config, tuple(self._changes.values()), models)
            self._workers[number] = WorkerProcess(assignment, self._handle, self._on_exit)

    def _on_exit(self, worker: WorkerProcess) -> None:
        """Starts a worker again that has died."""
        with self._lock:
            if self._is_stopping:
                return
            del self._workers[worker.number]
            self._owners = {model: owner for model, owner in self._owners.items() if owner != worker.number}
            self._ended_metrics = merge([self._ended_metrics, lasting(self._scraped.pop(worker.number, []))])
            self._changed.notify_all()
            lived_s = time.monotonic() - self._began[worker.number]
            pause_s = FIRST_PAUSE_S if lived_s > STEADY_S else self._pauses.get(worker.number, FIRST_PAUSE_S)
            self._pauses[worker.number] = min(MAX_PAUSE_S, 2 * pause_s)
        self._update()
        logger.error("worker %d %s: starting it again in %g s", worker.number, worker.describe_end(), pause_s)
        self._start_again(worker.number, pause_s)

    def _start_again(self, number: int, pause_s: float) -> None:
        """Starts a worker after a pause; if the system has no process or memory for it, until it has."""
        while True:
            time.sleep(pause_s)
            try:
                self._start_worker(number)
                return
            except (OSError, RuntimeError) as error:
                pause_s = min(MAX_PAUSE_S, 2 * pause_s)
                logger.error("worker %d cannot be started: %s: trying again in %g s", number, error, pause_s)

    def _handle(self, worker: WorkerProcess, name: str, argument: Any) -> Any:
        """Answers a call of a worker."""
        if name == STATE:
            is_news, worker.state, worker.heard = argument != worker.state, argument, time.monotonic()
            if is_news:
                self._update(worker)
        elif name == FAILED:
            if self._was_ready:
                logger.error("worker %d cannot start: %s", worker.number, argument)
            else:
                self._failure = argument
                self._has_failed.set()
        elif name == BEGIN:
            return self._begin_change(worker, argument)
        elif name == END:
            self._end_change(worker, *argument)
        return None

    def _update(self, told: WorkerProcess | None = None) -> None:
        """Tells the workers whether all of them are ready, if that has changed or one is new."""
        with self._lock:
            workers = list(self._workers.values())
            is_ready = len(workers) == self._config.workers and all(worker.state.is_ready for worker in workers)
            has_changed, self._is_ready = is_ready != self._is_ready, is_ready
            is_first, self._was_ready = is_ready and not self._was_ready, self._was_ready or is_ready
        for worker in workers:
            if has_changed or worker is told:
                worker.channel.tell(MAY_BE_READY, is_ready)
        if is_first:
            config, metrics_port = self._config, self._metrics_server.port
            log_addresses(
                config,
                grpc_port=config.grpc_port,
                http_port=config.http_port,
                metrics_port=metrics_port,
                models=[
                    f"{name} version {version}"
                    for name, versions in workers[0].state.models.items()
                    for version in sorted(versions)
                ],
            )

    # ---- Changes of models -------------------------------------------------------------------------------------------

    def _begin_change(self, worker: WorkerProcess, model: str) -> bool:
        """Returns whether a worker may change a model, after a moment if another one does: its caller may give up."""
        with self._lock:
            is_free = self._changed.wait_for(lambda: model not in self._owners, TURN_S)
            is_there = self._workers.get(worker.number) is worker  # else nobody would end the change
            if is_free and is_there:
                self._owners[model] = worker.number
            return is_free and is_there

    def _end_change(self, worker: WorkerProcess, model: str, change: Change | None, is_made: bool) -> None:
        """Lets all other workers make the change that one has made, if only in part."""
        try:
            if change is not None:
                failures = self._make_everywhere(worker, change, is_made)
                if failures and is_made:
                    reasons = "; ".join(failures)
                    raise Internal(f"the change of model '{model}' has not been made everywhere: {reasons}")
        finally:
            with self._lock:
                self._owners.pop(model, None)
                self._changed.notify_all()

    def _make_everywhere(self, maker: WorkerProcess, change: Change, is_made: bool) -> list[str]:
        """Lets the other workers make a change. Returns why some could not."""
        with self._lock:
            before = self._changes.get(change.model)
            is_loaded = before is not None and before.verb == "load"
            if not is_loaded or (change.verb != "follow" and is_made):  # `follow` changes no configuration
                self._changes[change.model] = change
            others = [worker for worker in self._workers.values() if worker is not maker]

        def make(worker: WorkerProcess) -> str | None:
            try:
                worker.channel.call(CHANGE, change)
            except ServingError as error:
                # One that has ended makes the change when it starts again.
                return None if worker.exit_code is not None else f"worker {worker.number}: {error}"
            return None

        return [failure for failure in self._calls.map(make, others) if failure is not None]

    # ---- Metrics -----------------------------------------------------------------------------------------------------

    def _render(self, accept: str) -> tuple[bytes, str]:
        """Returns the metrics of all workers, and what those that have ended have counted."""
        with self._lock:
            workers = list(self._workers.values())
        for worker, families in zip(workers, self._calls.map(_scrape, workers), strict=True):
            with self._lock:
                if families is not None and self._workers.get(worker.number) is worker:
                    self._scraped[worker.number] = families
        with self._lock:
            parts: Iterable[list[Metric]] = [*self._scraped.values(), self._ended_metrics]
            return Families(merge(parts)).render(accept)


def _scrape(worker: WorkerProcess) -> list[Metric] | None:
    try:
        families: list[Metric] = worker.channel.call(METRICS, timeout_s=METRICS_TIMEOUT_S)
    except ServingError:
        return None
    return families


def _hold_ports(config: ServeConfig, stack: ExitStack) -> ServeConfig:
    """Binds the ports of the API until the end of the context. Returns the options with their numbers.

    Raises:
        StartupError: a port is not available.
    """
    ports = {}
    for name in ("grpc_port", "http_port"):
        held = stack.enter_context(_bind(config.host, getattr(config, name)))
        ports[name] = held.getsockname()[1]
    threads = config.num_threads or max(1, num_available_cpus() // config.workers)
    return replace(config, **ports, num_threads=threads)


def _bind(host: str, port: int) -> socket.socket:
    """Returns a socket that holds a port, which others share that set SO_REUSEPORT too; it does not listen."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if port and not _is_free(family, address):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        held = socket.socket(family, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with suppress(OSError):  # IPv4 as well, where the host is ::
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        held.bind(address)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise StartupError(f"cannot listen on {host} port {port}: {why}") from error
    return held


def _is_free(family: int, address: Any) -> bool:
    """Returns whether nobody listens on a port, not even another server that shares it."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True
