"""A gRPC channel whose calls all have a token, a deadline, retries, and errors of one line.

Knows no method and no message: both are arguments.
"""

import contextlib
import ipaddress
import json
import random
import re
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from convoy.grpc_core import keepalive_options
from convoy.named_files import read_file
from convoy.tls import load_authority, load_chain
from convoy.token_lines import is_token
from serving.client.errors import DEFAULT_PORT, ClientError, from_rpc, invalid_argument, invalid_response, no_response

Response = TypeVar("Response", bound=Message)

NUM_IN_FLIGHT = 4
"""Concurrent calls for the parts of one large input: the server computes one while the others are transferred."""
_MAX_TIMEOUT_S = 1e8
"""gRPC lets a call with a much larger one fail at once."""
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
"""All calls are retried: an inference has no side effects, and loading or unloading twice is the same as once. The
deadline of the call bounds all attempts. `_retry_delay_s` handles RESOURCE_EXHAUSTED, because gRPC ignores the pushback
of servers that cannot send its reserved header. A grpcio server that stops answers CANCELLED to calls that arrive while
it closes the connection."""
_PUSHBACK_HEADERS = ("grpc-retry-pushback-ms", "retry-pushback-ms")
"""When to retry. The second name comes from servers that cannot send the first, which gRPC reserves."""
_TOO_LARGE = "message larger than max"
"""gRPC's words in the details of a RESOURCE_EXHAUSTED that a retry cannot change."""
_OPTIONS = (
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # gRPC does not retry a larger request. Its default, 256 KiB, is less than a batch of photographs.
    ("grpc.per_rpc_retry_buffer_size", 64 * _MIB),
    # Pings detect a dead server during a call. Idle connections are not pinged, because a server with gRPC's default
    # settings closes a connection that is.
    *keepalive_options(every_s=30, timeout_s=10),
    ("grpc.keepalive_permit_without_calls", 0),
    # By default gRPC resolves a name at most every 30 s, and new pods get no calls for as long.
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """The client's TLS settings.

    Args:
        ca: PEM file with the authorities that sign server certificates; None for those that gRPC trusts.
        certificate: PEM file of this client's certificate chain, for mutual TLS; with `key`.
        key: PEM file of its private key.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> Any:
        """Returns gRPC's channel credentials.

        Raises:
            ClientError: a file cannot be read or is invalid, or only one of certificate and key is given.
        """
        if (self.certificate is None) != (self.key is None):
            raise invalid_argument("a client certificate and its key must be given together")
        ca, key, certificate = (_read(path) for path in (self.ca, self.key, self.certificate))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # gRPC would not say what is wrong with a file
        try:
            if self.ca is not None and ca is not None:
                load_authority(context, self.ca, ca)
            if self.certificate is not None and self.key is not None and certificate is not None:
                load_chain(context, self.certificate, self.key, certificate)
        except ValueError as error:
            raise invalid_argument(str(error)) from error
        return grpc.ssl_channel_credentials(ca, key, certificate)


class Connection:
    """Calls to one target. Thread-safe.

    Args:
        timeout_s: default timeout of a call.
        token: sent with each call as `authorization: Bearer TOKEN`; without TLS, everyone on the network can read it.

    Raises:
        ClientError: the target or the token is invalid, or a TLS file cannot be used.
    """

    def __init__(self, target: str, *, timeout_s: float, token: str | None, tls: Tls | None) -> None:
        address = parse_target(target)
        if token and not is_token(token):
            raise invalid_argument("the token must be ASCII without blanks and line breaks")
        self.target = target
        self._timeout_s = timeout_s
        self._is_closed = False
        self._metadata = (("authorization", f"Bearer {token}"),) if token else None
        options = [*_OPTIONS, ("grpc.enable_http_proxy", 0 if is_loopback(address) else 1)]
        if "," in address:  # gRPC's default authority is the whole list, which strict servers reject
            options.append(("grpc.default_authority", address.partition(":")[2].partition(",")[0]))
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            self._channel = grpc.secure_channel(address, tls.credentials(), options=options)

    def close(self) -> None:
        """Cancels running calls and closes the channel."""
        self._is_closed = True
        self._channel.close()

    def call(self, method: str, request: Message, kind: type[Response], timeout_s: float | None = None) -> Response:
        """Makes one unary call.

        Args:
            method: full path of the method.
            kind: type of the response.

        Raises:
            ClientError: the call fails.
        """
        (response,) = self.call_many(method, [request], kind, timeout_s)
        return response

    def call_many(
        self,
        method: str,
        requests: Iterable[Message],
        kind: type[Response],
        timeout_s: float | None = None,
        spent_s: float = 0.0,
    ) -> Iterator[Response]:
        """Makes calls, a few at a time, under one deadline. Yields the responses in the order of the requests.

        Args:
            spent_s: how much of the time-out has passed.

        Raises:
            ClientError: a call fails; the others are cancelled.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        left_s = min(timeout_s, _MAX_TIMEOUT_S) - spent_s
        if not left_s > 0:
            raise no_response(self.target, timeout_s)
        deadline = time.monotonic() + left_s
        pending: deque[_RetriedCall] = deque()
        try:
            with self._translated_errors(timeout_s):
                for request in requests:
                    if len(pending) == NUM_IN_FLIGHT:
                        yield pending.popleft().result()
                    stub = self._channel.unary_unary(method, type(request).SerializeToString, kind.FromString)
                    pending.append(_RetriedCall(partial(stub.future, request, metadata=self._metadata), deadline))
                while pending:
                    yield pending.popleft().result()
        finally:
            for call in pending:
                call.cancel()

    @contextlib.contextmanager
    def _translated_errors(self, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc(error, self.target, timeout_s) from None
        except ValueError:
            if not self._is_closed:
                raise
            raise ClientError("CANCELLED", "the client is closed") from None


class _RetriedCall:
    """A running call, which is repeated if the server's queue is full.

    Args:
        start: starts an attempt; its argument is `timeout`, in seconds.
        deadline: on the clock of `time.monotonic`.
    """

    def __init__(self, start: Callable[..., Any], deadline: float) -> None:
        self._start = start
        self._deadline = deadline
        self._future = self._start_attempt()

    def result(self) -> Any:
        """Waits for the response.

        Raises:
            grpc.RpcError: the call fails, or the next attempt would start after the deadline.
            ClientError: the response has no message.
        """
        attempt = 1
        while True:
            try:
                response = self._future.result()
                if response is None:
                    raise invalid_response("it has no message")
                return response
            except grpc.RpcError as error:
                delay_s = _retry_delay_s(error, attempt)
                if delay_s is None or time.monotonic() + delay_s >= self._deadline:
                    raise
            time.sleep(delay_s)
            attempt += 1
            self._future = self._start_attempt()

    def cancel(self) -> None:
        self._future.cancel()

    def _start_attempt(self) -> Any:
        return self._start(timeout=max(0.0, self._deadline - time.monotonic()))


def _retry_delay_s(error: Any, attempt: int) -> float | None:
    """Returns the delay before the next attempt, or None if the call must not be repeated.

    The delay is what the server asks for, or else gRPC's exponential backoff (gRFC A6: "Pushback", "Exponential
    Backoff"), with jitter, so that clients that were rejected together do not retry together.
    """
    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or _TOO_LARGE in (error.details() or ""):
        return None
    trailers = dict(error.trailing_metadata() or ())
    pushback_ms = next((trailers[name] for name in _PUSHBACK_HEADERS if name in trailers), None)
    if pushback_ms is None:
        return random.uniform(0.8, 1.2) * min(2.0, 0.1 * 2 ** (attempt - 1)) if attempt < _MAX_ATTEMPTS else None
    return random.uniform(1, 1.2) * int(pushback_ms) * 1e-3 if re.fullmatch("[0-9]{1,9}", pushback_ms) else None


def parse_target(target: str) -> str:
    """Returns a server's address in gRPC's form.

    Args:
        target: `host`, `host:port`, `unix:/path`, or any of gRPC's own forms. If a host name has several addresses,
            calls go to them in turn.

    Raises:
        ClientError: the target is empty or a URL.
    """
    if target.partition(":")[0] in _SCHEMES and target.isprintable():
        return target
    if not target or "/" in target or not target.isprintable():
        raise invalid_argument(
            f"{target!r} is not an address: use host:port, such as 127.0.0.1:{DEFAULT_PORT}, or unix:/path"
        )
    with contextlib.suppress(ValueError):
        return f"dns:///[{ipaddress.IPv6Address(target)}]:{DEFAULT_PORT}"
    has_port = re.search(r":\d+$", target)
    return f"dns:///{target}" if has_port else f"dns:///{target}:{DEFAULT_PORT}"


def is_loopback(address: str) -> bool:
    """Returns whether the address is on this machine; then no HTTP proxy from the environment may be used."""
    if address.startswith("unix"):
        return True
    host = address.rpartition("/")[2].rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else read_file(path)
    except OSError as error:
        raise invalid_argument(f"cannot read {path}: {error.strerror}") from error
