"""A gRPC channel and what every call over it carries: a token, a deadline, retries, errors in one line.

Knows method names and messages only as arguments.
"""

import contextlib
import ipaddress
import json
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from serving.client.errors import from_rpc, invalid

Answer = TypeVar("Answer", bound=Message)

DEFAULT_PORT = 8001
NUM_IN_FLIGHT = 4
"""Parts of one large input that are under way together: the server computes one while others travel."""
_MIB = 2**20
_SCHEMES = ("dns", "unix", "unix-abstract", "ipv4", "ipv6", "vsock", "xds")
_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
                },
            }
        ],
    }
)
"""Every call may be repeated: an inference has no effects, and loading or unloading twice comes to the same. The
server's `grpc-retry-pushback-ms` takes the place of the backoff (gRFC A6); the call's deadline bounds all attempts.
CANCELLED is what a grpcio server that stops answers to a call that was on its way when it closed the connection."""
_OPTIONS = (
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A request larger than this is not repeated (by default 256 KiB: less than 64 photographs).
    ("grpc.per_rpc_retry_buffer_size", 64 * _MIB),
    # A dead peer is found in the middle of a call. Idle connections are not pinged: a server with gRPC's defaults would
    # take that for abuse and close them.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # By default names are looked up every half minute at most, whatever happens: new pods get no calls for so long.
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How to trust the server, and to be trusted by it.

    Args:
        ca: PEM file of the authorities that sign servers; None for those that gRPC brings.
        certificate: PEM file of this client's certificate chain, for mutual TLS; with `key`.
        key: PEM file of its private key.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> Any:
        """gRPC's form of it.

        Raises:
            ClientError: a file cannot be read, or only one of certificate and key is given.
        """
        if (self.certificate is None) != (self.key is None):
            raise invalid("a client certificate and its key belong together: give both or none")
        return grpc.ssl_channel_credentials(*(_read(path) for path in (self.ca, self.key, self.certificate)))


class Connection:
    """Calls to one target. Thread-safe.

    Args:
        timeout_s: deadline of a call that names none.
        token: sent with each call as `authorization: Bearer`; over plain text too, which is fine on one machine only.
    """

    def __init__(self, target: str, *, timeout_s: float, token: str | None, tls: Tls | None) -> None:
        address = parse_target(target)
        self.target = target
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {token}"),) if token else None
        options = [*_OPTIONS, ("grpc.enable_http_proxy", 0 if is_loopback(address) else 1)]
        if "," in address:  # gRPC would name the whole list as the authority, which strict servers refuse as malformed
            options.append(("grpc.default_authority", address.partition(":")[2].partition(",")[0]))
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            self._channel = grpc.secure_channel(address, tls.credentials(), options=options)

    def close(self) -> None:
        """Cancel what is under way and close."""
        self._channel.close()

    def call(self, method: str, request: Message, answer: type[Answer], timeout_s: float | None = None) -> Answer:
        """One unary call. `method` is the full path.

        Raises:
            ClientError: no answer, or an error as the answer.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        with self._tidy_errors(timeout_s):
            response: Answer = self._method(method, request, answer)(
                request, timeout=timeout_s, metadata=self._metadata
            )
        return response

    def call_each(
        self, method: str, requests: Iterable[Message], answer: type[Answer], timeout_s: float | None = None
    ) -> Iterator[Answer]:
        """Several calls, a few of them under way at any time; answers in the order of the requests, under one deadline.

        Raises:
            ClientError: the first error; the other calls are cancelled.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        until = time.monotonic() + timeout_s
        pending: deque[Any] = deque()
        try:
            with self._tidy_errors(timeout_s):
                for request in requests:
                    if len(pending) == NUM_IN_FLIGHT:
                        yield pending.popleft().result()
                    left = max(0.0, until - time.monotonic())
                    start = self._method(method, request, answer).future
                    pending.append(start(request, timeout=left, metadata=self._metadata))
                while pending:
                    yield pending.popleft().result()
        finally:
            for call in pending:
                call.cancel()

    def _method(self, method: str, request: Message, answer: type[Message]) -> Any:
        return self._channel.unary_unary(method, type(request).SerializeToString, answer.FromString)

    @contextlib.contextmanager
    def _tidy_errors(self, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc(error, self.target, timeout_s) from None


def parse_target(target: str) -> str:
    """gRPC's form of an address: `host`, `host:port`, `unix:/path` or another of gRPC's own forms.

    A host's name stands for all of its addresses, which take turns.

    Raises:
        ClientError: a URL, or nothing.
    """
    if target.partition(":")[0] in _SCHEMES:
        return target
    if not target or "/" in target:
        raise invalid(f"{target!r} is no address: give host:port, such as 127.0.0.1:{DEFAULT_PORT}, or unix:/path")
    with contextlib.suppress(ValueError):
        return f"dns:///[{ipaddress.IPv6Address(target)}]:{DEFAULT_PORT}"
    has_port = re.search(r":\d+$", target)
    return f"dns:///{target}" if has_port else f"dns:///{target}:{DEFAULT_PORT}"


def is_loopback(address: str) -> bool:
    """Whether the address stays on this machine: a proxy that the environment names has no business there."""
    if address.startswith("unix"):
        return True
    host = address.rpartition("/")[2].rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise invalid(f"cannot read {path}: {error.strerror}") from error
