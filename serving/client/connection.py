"""A gRPC channel and what every call over it carries: a token, a deadline, retries, errors in one line.

Knows method names and messages only as arguments.
"""

import contextlib
import ipaddress
import json
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
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
_MAX_ATTEMPTS = 5
_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": _MAX_ATTEMPTS,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            }
        ],
    }
)
"""Every call may be repeated: an inference has no effects, and loading or unloading twice comes to the same. The
call's deadline bounds all attempts. RESOURCE_EXHAUSTED is not here but in `_pause_s`: gRPC does not read native's hint.
CANCELLED is what a grpcio server that stops answers to a call that was on its way when it closed the connection."""
_HINTS = ("grpc-retry-pushback-ms", "retry-pushback-ms")
"""When to come again; by the second name from servers that cannot send the first."""
_TOO_LARGE = "message larger than max"
"""In the details of a RESOURCE_EXHAUSTED that asking again cannot change, as gRPC's core words it."""
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
        (response,) = self.call_each(method, [request], answer, timeout_s)
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
        pending: deque[_GrpcCall] = deque()
        try:
            with self._tidy_errors(timeout_s):
                for request in requests:
                    if len(pending) == NUM_IN_FLIGHT:
                        yield pending.popleft().result()
                    stub = self._channel.unary_unary(method, type(request).SerializeToString, answer.FromString)
                    pending.append(_GrpcCall(partial(stub.future, request, metadata=self._metadata), until))
                while pending:
                    yield pending.popleft().result()
        finally:
            for call in pending:
                call.cancel()

    @contextlib.contextmanager
    def _tidy_errors(self, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc(error, self.target, timeout_s) from None


class _GrpcCall:
    """A call under way, which is made again where the server had no room for it.

    Args:
        start: begins the call; its argument is `timeout`, in seconds.
        until: its deadline, on the clock of `time.monotonic`.
    """

    def __init__(self, start: Callable[..., Any], until: float) -> None:
        self._start = start
        self._until = until
        self._future = self._begin()

    def result(self) -> Any:
        """The answer.

        Raises:
            grpc.RpcError: none came, or an error; also when the pause before the next attempt would pass the deadline.
        """
        attempt = 1
        while True:
            try:
                return self._future.result()
            except grpc.RpcError as error:
                pause_s = _pause_s(error, attempt)
                if pause_s is None or time.monotonic() + pause_s >= self._until:
                    raise
            time.sleep(pause_s)
            attempt += 1
            self._future = self._begin()

    def cancel(self) -> None:
        self._future.cancel()

    def _begin(self) -> Any:
        return self._start(timeout=max(0.0, self._until - time.monotonic()))


def _pause_s(error: Any, attempt: int) -> float | None:
    """How long to wait before a call is made again; None if it is not to be.

    As long as the server says, or with gRPC's backoff where it says nothing (gRFC A6, "Pushback", "Exponential
    Backoff"): those who were refused together do not come back together.
    """
    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or _TOO_LARGE in (error.details() or ""):
        return None
    trailers = dict(error.trailing_metadata() or ())
    hint = next((trailers[name] for name in _HINTS if name in trailers), None)
    if hint is None:
        return random.uniform(0.8, 1.2) * min(2.0, 0.1 * 2 ** (attempt - 1)) if attempt < _MAX_ATTEMPTS else None
    return random.uniform(1, 1.2) * int(hint) * 1e-3 if hint.isdecimal() else None


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
