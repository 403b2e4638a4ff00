"""The server process: start -> load -> drain -> stop.

On SIGTERM or Ctrl-C, health reports NOT_SERVING at once, and requests are served for the drain delay. Then new requests
are refused, running ones are finished, and the models are freed. After the grace period the process exits even if
requests are unfinished. A second signal ends the process at once.
"""

import gc
import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from convoy.allocator import limit_arenas
from convoy.auth import TokenFile
from convoy.credentials import CredentialError
from convoy.threads import ThreadPool
from convoy.tls import TlsFiles
from convoy.version import convoy_version
from serving.config import ServeConfig
from serving.errors import StartupError
from serving.frontends import Frontend
from serving.frontends.common.auth import SCOPES
from serving.frontends.common.limits import raise_file_limit
from serving.frontends.common.services import Services
from serving.frontends.http import HttpFrontend, HttpSettings, PageSettings
from serving.inference.message_memory import MessageMemory
from serving.inference.service import InferenceService
from serving.inference.shared_memory import SharedMemory
from serving.models.repository import Repository
from serving.observability.health import Health
from serving.observability.tracing import connect
from serving.protocol.admin import AdminService

logger = logging.getLogger(__name__)

EXIT_UNFINISHED = 1
CLEAN_UP_S = 4.0
"""Time after the grace period to finish batches that are being computed and to free the models."""


def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        StartupError: an option is invalid, or a file, port or device that it names is not available.
    """
    config.check()
    raise_file_limit()
    with stop_signals(stop_limit_s(config)) as wait_for_signal:
        server = build_server(config)
        server.start()
        loader = threading.Thread(target=lambda: server.log_ready(server.load()), name="loader", daemon=True)
        loader.start()
        wait_for_signal()
        server.drain()
        server.stop()


def stop_limit_s(config: ServeConfig) -> float:
    """Returns the time that a process has for its stop: a model that is computing cannot be interrupted."""
    return config.drain_delay_s + config.grace_s + CLEAN_UP_S


class Server:
    """The parts of the server, with a method for each phase of its life."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        repository: Repository,
        health: Health,
        grpc: Frontend,
        http: HttpFrontend,
        services: Services,
    ) -> None:
        self._config = config
        self.repository = repository
        self.health = health
        self.grpc = grpc
        self.http = http
        self.admin = services.admin
        self._tracing = services.inference.tracing
        self._may_be_ready = True
        self._stopper = ThreadPool(1, "stop")  # from the start: later, the system may have no thread

    def start(self) -> None:
        """Opens the ports: the server is live, but not ready.

        Raises:
            StartupError: a port is not available.
        """
        with ExitStack() as stop_on_error:
            self.grpc.start()
            stop_on_error.callback(self.grpc.stop, 0)
            self.http.start()
            stop_on_error.pop_all()
        logger.info("gRPC transport %s (%s)", *self._config.choose_transport())
        if self._config.sends_tokens_in_plain_text:
            logger.warning(
                "--token-file without TLS on %s: whoever is on the network can read the tokens; set --tls-cert and "
                "--tls-key, or let a service mesh encrypt",
                self._config.host,
            )

    def load(self) -> list[str]:
        """Loads the models. The server is ready once all are loaded.

        Returns:
            Names and versions of those that are ready.
        """
        self.repository.subscribe(self._update_health)
        self.repository.start()
        self._update_health()
        # The objects created so far live as long as the server: freezing them spares the garbage collector.
        gc.collect()
        gc.freeze()
        return [f"{model.spec.name} version {model.version}" for model in self.repository.ready_models()]

    def log_ready(self, models: list[str]) -> None:
        """Logs where the server can be reached, and what it serves."""
        config, http = self._config, self.http
        log_addresses(
            config, grpc_port=self.grpc.port, http_port=http.port, metrics_port=http.metrics_port, models=models
        )

    def set_may_be_ready(self, may_be_ready: bool) -> None:
        """Sets whether health may report that the server is ready: not while others behind its port are not."""
        self._may_be_ready = may_be_ready
        self._update_health()

    def drain(self) -> None:
        """Reports NOT_SERVING, and continues to serve until load balancers have noticed."""
        self.health.drain()
        logger.info("draining: health reports NOT_SERVING, serving for another %g s", self._config.drain_delay_s)
        threading.Event().wait(self._config.drain_delay_s)

    def stop(self) -> None:
        """Refuses new requests, finishes running ones within the grace period, and frees the models."""
        with self._stopper:
            http = self._stopper.submit(self.http.stop, self._config.grace_s)
            self.grpc.stop(self._config.grace_s)
            http.result()
        self.repository.close()
        if self._tracing is not None:
            self._tracing.close()
        logger.info("stopped")

    def _update_health(self) -> None:
        ready = {entry.name: False for entry in self.repository.index(ready_only=False)}
        ready |= {model.spec.name: True for model in self.repository.ready_models()}
        is_ready, is_live = self.repository.is_ready() and self._may_be_ready, not self.repository.is_unhealthy()
        self.health.update(is_ready, ready, live=is_live)


def log_addresses(
    config: ServeConfig, *, grpc_port: int, http_port: int, metrics_port: int, models: Sequence[str]
) -> None:
    """Logs that the server is ready."""
    transport, _ = config.choose_transport()
    grpc = config.grpc_address if config.grpc_socket is not None else f"{config.host}:{grpc_port}"
    logger.info(
        "serving on grpc %s (%s), http %s:%d, metrics %s:%d: %s",
        *(grpc, transport, config.host, http_port, config.metrics_host or config.host, metrics_port),
        ", ".join(models) or "no model",
    )


def build_server(config: ServeConfig, *, is_worker: bool = False) -> Server:
    """Builds the parts of the server. Opens no port and no model.

    Args:
        is_worker: whether other processes listen on the same ports, and another one serves the metrics.

    Raises:
        StartupError: the repository, a certificate or the token file cannot be read, or OpenTelemetry is missing.
    """
    limit_arenas()
    repository = Repository.from_config(config)
    repository.check()
    health = Health()
    tracing = None if config.trace_endpoint is None else connect(config.trace_endpoint, config.trace_sample)
    shared_memory = SharedMemory(config.max_message_bytes) if config.allow_client_shm else None
    inference = InferenceService(repository, tracing, shared_memory, MessageMemory(config.message_memory_bytes))
    calls = inference.refusals.calls
    admin = AdminService(repository, health, calls=calls, version=convoy_version(), shared_memory=shared_memory)
    services = Services(inference, admin)
    tokens, tls = read_credentials(config)
    page = PageSettings(save_images=config.save_images, num_workers=config.workers) if config.shows_page else None
    http = HttpFrontend(
        services,
        HttpSettings(
            host=config.host,
            port=config.http_port,
            metrics_port=None if is_worker else config.metrics_port,
            metrics_host=config.metrics_host,
            cors_origins=config.cors_origin,
            page=page,
            reuse_port=is_worker,
        ),
        max_message_bytes=config.max_message_bytes,
        tokens=tokens,
        tls=tls,
        access_log=config.access_log,
    )
    grpc = _build_grpc(config, services, tokens, tls, is_worker)
    return Server(config, repository=repository, health=health, grpc=grpc, http=http, services=services)


def read_credentials(config: ServeConfig) -> tuple[TokenFile | None, TlsFiles | None]:
    """Reads the files of the tokens and of the certificates, if the options name any.

    Raises:
        StartupError: a file cannot be read or is invalid.
    """
    try:
        tokens = None if config.token_file is None else TokenFile(config.token_file, SCOPES)
        if config.tls_cert is None or config.tls_key is None:
            return tokens, None
        return tokens, TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
    except CredentialError as error:
        raise StartupError(str(error)) from error


def _build_grpc(
    config: ServeConfig,
    services: Services,
    tokens: TokenFile | None,
    tls: TlsFiles | None,
    reuse_port: bool,
) -> Frontend:
    """Builds the front end for the transport that the options choose, and imports only that one."""
    make: Callable[..., Frontend]
    if config.choose_transport()[0] == "native":
        from serving.frontends.native import NativeFrontend

        make = NativeFrontend
    else:
        from serving.frontends.grpcio import GrpcioFrontend

        make = partial(GrpcioFrontend, tls=tls)
    return make(
        services,
        address=config.grpc_address,
        max_message_bytes=config.max_message_bytes,
        tokens=tokens,
        access_log=config.access_log,
        reuse_port=reuse_port,
    )


@contextmanager
def stop_signals(limit_s: float | None = None) -> Iterator[Callable[[], int]]:
    """Yields a function that waits for the first SIGTERM or SIGINT. The second one ends the process at once.

    The interpreter's C-level handler writes a signal's number to a socket, which a thread reads. A Python handler runs
    only when the main thread executes bytecode: if a signal arrives just before that thread begins to wait for a lock,
    the handler runs after the wait, which may never end.

    Args:
        limit_s: how long after the first signal the process ends if it still runs; None for never.
    """
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        with reader:
            if first := reader.recv(1):
                signals.put(first[0])
                reader.settimeout(limit_s)
            try:
                if second := reader.recv(1):
                    os._exit(128 + second[0])
            except TimeoutError:
                logger.warning("the grace period is over: exiting with unfinished requests")
                logging.shutdown()
                os._exit(EXIT_UNFINISHED)

    previous_wakeup = signal.set_wakeup_fd(writer.fileno())
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    threading.Thread(target=watch, name="signal-watch", daemon=True).start()
    try:
        yield signals.get
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_wakeup)
        writer.close()
