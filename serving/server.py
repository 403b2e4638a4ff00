"""The server process: start -> serve -> drain -> stop.

SIGTERM or Ctrl-C: health says NOT_SERVING at once, requests are served on for the drain delay, then refused while those
under way finish, and the models go last. What outlives the grace is cut off. A second signal leaves at once.
"""

import gc
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version

from convoy.auth import CredentialError, TlsFiles, Token
from serving.config import ServeConfig
from serving.errors import StartupError
from serving.frontends import Frontend
from serving.frontends.common.services import Services
from serving.frontends.http import HttpAddress, HttpFrontend
from serving.inference.service import InferenceService
from serving.models.repository import Repository
from serving.observability.health import Health
from serving.observability.logging import AccessLog
from serving.protocol.admin import AdminService

logger = logging.getLogger(__name__)

EXIT_CUT_OFF = 1
CLEAN_UP_S = 4.0
"""After the grace, for what is left: batches that are being computed, models to be freed."""


def serve(config: ServeConfig) -> None:
    """Serve until a signal comes.

    Raises:
        StartupError: the options make no sense, or something that they name cannot be had.
    """
    config.check()
    with signalled() as stop:
        server = Server(config)
        server.start()
        loader = threading.Thread(target=server.load, name="loader", daemon=True)
        loader.start()
        stop.wait()
        server.drain()
        _leave_after(config.grace_s + CLEAN_UP_S)
        server.stop()


def _leave_after(seconds: float) -> None:
    """End the process then, if it is still there: a model that computes cannot be stopped."""

    def leave() -> None:
        logger.warning("leaving with work under way: the grace is over")
        os._exit(EXIT_CUT_OFF)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()


class Server:
    """The parts of the server, and the order in which they come and go."""

    def __init__(self, config: ServeConfig) -> None:
        """Build the parts; no port is open yet.

        Raises:
            StartupError: the repository, a certificate or the token cannot be read.
        """
        self._config = config
        self.health = Health()
        self.repository = Repository.from_config(config)
        self.repository.check()
        self.services = Services(
            inference=InferenceService(self.repository),
            admin=AdminService(self.repository, self.health, version=version("convoy-vision")),
        )
        token, tls = _read_credentials(config)
        access_log = AccessLog() if config.access_log else None
        self.transport_name, self._why = config.choose_transport()
        self.grpc = _build_transport(config, self.transport_name, self.services, token, tls, access_log)
        self.http = HttpFrontend(
            self.services,
            HttpAddress(host=config.host, port=config.http_port, metrics_port=config.metrics_port),
            max_message_bytes=config.max_message_bytes,
            token=token,
            tls=tls,
            access_log=access_log,
        )

    def start(self) -> None:
        """Open the ports: the server is live, and not ready.

        Raises:
            StartupError: a port is taken.
        """
        with ExitStack() as undo:
            self.grpc.start()
            undo.callback(self.grpc.stop, 0)
            self.http.start()
            undo.pop_all()
        logger.info("gRPC by %s: %s", self.transport_name, self._why)

    def load(self) -> None:
        """Load the models; the server is ready when all that were asked for are."""
        self.repository.subscribe(self._tell_health)
        self.repository.start()
        self._tell_health()
        gc.collect()
        gc.freeze()
        names = [f"{model.spec.name} version {model.version}" for model in self.repository.ready_models()]
        logger.info("%s: %s", self.describe(), ", ".join(names) or "no model")

    def describe(self) -> str:
        """Where the server listens."""
        config = self._config
        grpc = config.grpc_address if config.grpc_socket is not None else f"{config.host}:{self.grpc.port}"
        return (
            f"serving on grpc {grpc} ({self.transport_name}), http {config.host}:{self.http.port}, "
            f"metrics {config.host}:{self.http.metrics_port}"
        )

    def drain(self) -> None:
        """Tell load balancers, and serve on until they know."""
        self.health.drain()
        logger.info("draining: NOT_SERVING, serving on for %g s", self._config.drain_delay_s)
        threading.Event().wait(self._config.drain_delay_s)

    def stop(self) -> None:
        """Refuse what comes, finish what is under way, close."""
        stoppers = [threading.Thread(target=part.stop, args=(self._config.grace_s,)) for part in (self.grpc, self.http)]
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join()
        self.repository.close()
        logger.info("stopped")

    def _tell_health(self) -> None:
        ready = {entry.name: False for entry in self.repository.index(ready_only=False)}
        ready |= {model.spec.name: True for model in self.repository.ready_models()}
        self.health.update(self.repository.is_ready(), ready)


def _read_credentials(config: ServeConfig) -> tuple[Token | None, TlsFiles | None]:
    """The token and the certificates that the options name.

    Raises:
        StartupError: a file cannot be used.
    """
    try:
        token = None if config.token_file is None else Token(config.token_file)
        if config.tls_cert is None or config.tls_key is None:
            return token, None
        return token, TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
    except CredentialError as error:
        raise StartupError(str(error)) from error


def _build_transport(
    config: ServeConfig,
    name: str,
    services: Services,
    token: Token | None,
    tls: TlsFiles | None,
    access_log: AccessLog | None,
) -> Frontend:
    """Only the transport that is used is imported."""
    if name == "native":
        from serving.frontends.native import NativeFrontend

        return NativeFrontend(
            services,
            address=config.grpc_address,
            max_message_bytes=config.max_message_bytes,
            token=token,
            access_log=access_log,
        )
    from serving.frontends.grpcio import GrpcioFrontend

    return GrpcioFrontend(
        services,
        address=config.grpc_address,
        max_message_bytes=config.max_message_bytes,
        token=token,
        tls=tls,
        access_log=access_log,
    )


@contextmanager
def signalled() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or Ctrl-C sets; the second one ends the process at once."""
    event = threading.Event()

    def handle(number: int, frame: object) -> None:
        if event.is_set():
            os._exit(128 + number)
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
