"""The gRPC server on grpcio: what it listens on, its limits, how it starts and stops."""

from concurrent.futures import ThreadPoolExecutor

import grpc

from convoy.auth import Certificates, TlsFiles, Token
from serving.errors import StartupError
from serving.frontends.address import UNIX, check_address
from serving.frontends.grpcio.completion_queue import attach
from serving.frontends.grpcio.handlers import Handlers
from serving.frontends.grpcio.streams import OpenStreams
from serving.inference.service import Service
from serving.observability.logging import AccessLog

MAX_STREAMS = 256
"""ModelStreamInfer, Watch and reflection at a time, each of which holds a thread. Threads are made as needed."""
NUM_THREADS = MAX_STREAMS + 64

KEEPALIVE_S = 60
"""A connection without traffic is tried after so long, so that callers that vanished are noticed."""
KEEPALIVE_TIMEOUT_S = 20
MIN_PING_INTERVAL_S = 5
"""Callers may ping so often, with calls or without; gRPC's own default of 5 minutes closes connections on clients that
ping every 10 or 30 s, as many are set up to do."""
MAX_CONNECTION_AGE_S = 1800
"""Then a client is asked to connect anew, which is how it finds pods that have been added since. Nothing is cut: calls
and streams that are open go on for as long as they like."""

_AFTER_STOP_S = 5.0


class GrpcioFrontend:
    """A `Frontend` on grpcio.

    Args:
        address: `host:port` or `unix:/path`.
        max_message_bytes: larger requests are refused by gRPC's core while they come in.
        token: what callers must show, but for health; None for no check.
        tls: None for plain text.
        access_log: told of each RPC when it is over.
    """

    def __init__(
        self,
        service: Service,
        *,
        address: str,
        max_message_bytes: int,
        token: Token | None = None,
        tls: TlsFiles | None = None,
        access_log: AccessLog | None = None,
    ) -> None:
        self.port = 0
        self._address = address
        self._tls = tls
        self._streams = OpenStreams(MAX_STREAMS)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grpcio")
        self._server = grpc.server(
            self._threads,
            handlers=(Handlers(service, self._streams, token=token, access_log=access_log),),
            options=_options(max_message_bytes),
        )
        self._lane = attach(self._server, service, token=token, access_log=access_log)

    def start(self) -> None:
        """Listen.

        Raises:
            StartupError: the address cannot be had.
        """
        check_address(self._address)
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(self._address)
            else:
                port = self._server.add_secure_port(self._address, _credentials(self._tls))
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {self._address}: {error}") from error
        self.port = 0 if self._address.startswith(UNIX) else port
        self._server.start()
        if self._lane is not None:
            self._lane.start()

    def stop(self, grace_s: float) -> None:
        """Refuse what comes, finish what is under way, at most for so long, then close."""
        stopped = self._server.stop(grace_s)
        self._streams.end()
        stopped.wait()
        if self._lane is not None:
            self._lane.join(_AFTER_STOP_S)
        self._threads.shutdown(wait=False)


def _options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # a port that is taken is an error, not shared
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_S),
        ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE_TIMEOUT_S),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000 * MIN_PING_INTERVAL_S),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_connection_age_ms", 1000 * MAX_CONNECTION_AGE_S),
    ]


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Each connection takes the certificates of its moment."""
    taken = tls.current()

    def renew() -> grpc.ServerCertificateConfiguration | None:
        nonlocal taken
        current = tls.current()
        if current is taken:
            return None
        taken = current
        return _configuration(current)

    return grpc.dynamic_ssl_server_credentials(_configuration(taken), renew, tls.requires_client_certificate)


def _configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    pairs = [(certificates.key, certificates.chain)]
    return grpc.ssl_server_certificate_configuration(pairs, certificates.client_ca)
