"""The grpcio server: its address, options and certificates; how it starts and stops."""

import time

import grpc

from convoy.auth import TokenFile
from convoy.grpc_core import METADATA_OPTIONS, ignore_clients_faults, keepalive_options
from convoy.threads import ThreadPool
from convoy.tls import Certificates, TlsFiles
from serving.errors import StartupError
from serving.frontends.common import limits
from serving.frontends.common.address import ABSTRACT, UNIX, check_address
from serving.frontends.common.services import Services
from serving.frontends.grpcio.completion_queue import attach
from serving.frontends.grpcio.handlers import Handlers
from serving.frontends.grpcio.streams import OpenStreams

NUM_SPARE_THREADS = 64
"""For unary RPCs, beside one thread for each open stream. Threads start when they are needed."""
MAX_PING_STRIKES = 0
"""Clients may ping as often as they like. By default gRPC closes the connection, with all its calls, at the third ping
within 10 minutes, and many clients are configured to ping every 10 or 30 s."""
MAX_PENDING = 16_384
"""Calls that may wait inside gRPC's core for the thread that takes them. By default the core cancels calls at random
when 1,000 wait, which a busy server reaches within 0.1 s."""
HANDSHAKE_TIMEOUT_S = 20
"""Time that a new connection has for TLS and HTTP/2's first frame."""
MAX_CONNECTION_AGE_S = 1800
"""Age at which a connection is asked to renew, so that clients find new pods. Open calls and streams are not cut."""

MESSAGE_GRACE_S = 5.0
"""Time that calls have to send their messages while the server stops."""

_POLL_S = 0.05
_JOIN_TIMEOUT_S = 5.0

ignore_clients_faults()


class GrpcioFrontend:
    """A `Frontend` on grpcio.

    Args:
        address: `host:port` or `unix:/path`.
        max_message_bytes: size of the largest request; gRPC's core refuses larger ones while they arrive.
        tokens: of which clients must send one, except for health checks; None for no authentication.
        tls: None for plain text.
        access_log: whether the access log gets an entry when an RPC ends.
        reuse_port: whether other processes listen on the port too; the kernel spreads connections over them.
    """

    def __init__(  # noqa: PLR0913 (one of them is of the transport only)
        self,
        services: Services,
        *,
        address: str,
        max_message_bytes: int,
        tokens: TokenFile | None = None,
        tls: TlsFiles | None = None,
        access_log: bool = False,
        reuse_port: bool = False,
    ) -> None:
        self.port = 0
        self._address = address
        self._reuse_port = reuse_port
        self._tls = tls
        self._streams = OpenStreams(tokens)
        num_streams = limits.MAX_STREAMS + limits.MAX_WATCHES + limits.MAX_REFLECTIONS
        self._threads = ThreadPool(num_streams + NUM_SPARE_THREADS, "grpcio")
        self._server = grpc.server(
            self._threads,
            handlers=(Handlers(services, self._streams, tokens=tokens, access_log=access_log),),
            options=_options(max_message_bytes, reuse_port),
        )
        self._queue = attach(self._server, services, tokens=tokens, access_log=access_log)

    def start(self) -> None:
        """Starts to listen.

        Raises:
            StartupError: the address is not available.
        """
        if not self._reuse_port:
            check_address(self._address)
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(self._address)
            else:
                port = self._server.add_secure_port(self._address, _credentials(self._tls))
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {self._address}: {error}") from error
        self.port = 0 if self._address.startswith((UNIX, ABSTRACT)) else port
        self._server.start()
        if self._queue is not None:
            self._queue.start()

    def stop(self, grace_s: float) -> None:
        """Refuses new RPCs, finishes those in flight within `grace_s`, then closes all connections."""
        try:
            stopped = self._server.stop(grace_s)
        except RuntimeError:  # it stops, but has no thread that cancels the calls after the grace period
            stopped = None
        self._streams.end()
        if self._queue is not None:
            self._queue.stop()
        if stopped is None:
            until = time.monotonic() + grace_s
            while self._num_open() and time.monotonic() < until:
                time.sleep(_POLL_S)
            stopped = self._server.stop(None)
        if self._queue is None:
            stopped.wait()
        else:
            if not stopped.wait(min(grace_s, MESSAGE_GRACE_S)):
                self._queue.refuse_silent()
            # Without calls, the core waits for the handshakes of silent connections only.
            while not stopped.wait(_POLL_S) and self._num_open():
                pass
            self._queue.join(_JOIN_TIMEOUT_S)
        self._threads.shutdown(wait=False)

    def _num_open(self) -> int:
        return self._streams.num_open + (self._queue.num_open if self._queue is not None else 0)


def _options(max_message_bytes: int, reuse_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", int(reuse_port)),  # 0: a port in use is an error
        ("grpc.max_receive_message_length", max_message_bytes),
        *METADATA_OPTIONS,
        *keepalive_options(every_s=limits.KEEPALIVE_S, timeout_s=limits.KEEPALIVE_TIMEOUT_S),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", MAX_PING_STRIKES),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_connection_age_ms", 1000 * MAX_CONNECTION_AGE_S),
        ("grpc.max_allowed_incoming_connections", limits.max_connections()),
        ("grpc.server.max_pending_requests", MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
        ("grpc.server_handshake_timeout_ms", 1000 * HANDSHAKE_TIMEOUT_S),
    ]


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Returns credentials that use the current certificates for each new connection."""
    loaded = tls.current()

    def reload() -> grpc.ServerCertificateConfiguration | None:
        nonlocal loaded
        current = tls.current()
        if current is loaded:
            return None
        loaded = current
        return _configuration(current)

    return grpc.dynamic_ssl_server_credentials(_configuration(loaded), reload, tls.requires_client_certificate)


def _configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    pairs = [(certificates.key, certificates.chain)]
    return grpc.ssl_server_certificate_configuration(pairs, certificates.client_ca)
