"""How the client connects, retries, keeps deadlines and reports errors."""

import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from serving.client import Client, ClientError, Tls
from serving.client.connection import is_loopback, parse_target
from serving.client.errors import from_rpc
from tests.serving.certificates import Authority, write
from tests.serving.fake_server import Failure, FakeServer

UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE, "back soon")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target) as connected:
        yield connected


# ---- Failures --------------------------------------------------------------------------------------------------------


def test_an_unavailable_server_is_retried(server: FakeServer, client: Client) -> None:
    server.failures = [UNAVAILABLE, UNAVAILABLE]
    assert client.is_live()
    assert [call.get("grpc-previous-rpc-attempts") for call in server.metadata] == [None, "1", "2"]


def test_an_unavailable_server_gets_five_attempts(server: FakeServer, client: Client) -> None:
    server.failures = [UNAVAILABLE] * 9
    with pytest.raises(ClientError, match="UNAVAILABLE: back soon"):
        client.is_live()
    assert len(server.calls) == 5


FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
HINTS = ("grpc_retry_pushback_ms", "retry_pushback_ms")


@pytest.mark.parametrize("name", HINTS)
def test_the_server_s_pushback_is_followed(server: FakeServer, client: Client, name: str) -> None:
    client.is_live()
    server.failures = [Failure(FULL, "the queue is full", **{name: "700"})]
    began = time.monotonic()
    assert client.is_live()
    assert time.monotonic() - began >= 0.7  # the backoff alone is at most 0.12 s


def test_pushback_is_followed_until_the_deadline(server: FakeServer, client: Client) -> None:
    client.config("digits")
    server.failures = [Failure(FULL, "the queue is full", retry_pushback_ms="1")] * 20
    sent = np.arange(40).reshape(40, 1)  # ten requests
    np.testing.assert_array_equal(client.infer("digits", {"x": sent})["x"], sent)
    assert len(server.calls) == 1 + 20 + 10


def test_a_full_server_without_pushback_gets_five_attempts(server: FakeServer, client: Client) -> None:
    server.failures = [Failure(FULL, "the queue is full")] * 9
    with pytest.raises(ClientError, match="RESOURCE_EXHAUSTED: the queue is full"):
        client.is_live()
    assert len(server.calls) == 5


@pytest.mark.parametrize("name", HINTS)
@pytest.mark.parametrize("hint", ["-1", "soon", "9" * 5000])
def test_a_pushback_that_forbids_retries_is_followed(server: FakeServer, client: Client, name: str, hint: str) -> None:
    server.failures = [Failure(FULL, "too large", **{name: hint})]
    with pytest.raises(ClientError, match="RESOURCE_EXHAUSTED: too large"):
        client.is_live()
    assert len(server.calls) == 1


def test_a_large_request_is_retried(server: FakeServer, client: Client) -> None:
    server.config.max_batch_size = 0
    client.config("digits")
    server.failures = [UNAVAILABLE]
    sent = np.zeros((1, 3_000_000), np.uint8)
    assert client.infer("digits", {"x": sent})["x"].shape == sent.shape


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL])
def test_other_errors_are_not_retried(server: FakeServer, client: Client, code: grpc.StatusCode) -> None:
    server.failures = [Failure(code, "no\n  good")]
    with pytest.raises(ClientError) as caught:
        client.is_live()
    assert (caught.value.code, caught.value.message) == (code.name, "no good")
    assert len(server.calls) == 1


@pytest.mark.parametrize("rows", [1, 40])
def test_a_slow_server_exceeds_the_deadline(server: FakeServer, client: Client, rows: int) -> None:
    client.config("digits")
    server.delay_s = 0.3
    with pytest.raises(ClientError, match=f"no response from {server.target} within 0.2 s") as caught:
        client.infer("digits", {"x": np.zeros((rows, 1))}, timeout_s=0.2)
    assert caught.value.code == "DEADLINE_EXCEEDED"


def test_a_deadline_may_be_far_away_and_not_past(server: FakeServer, client: Client) -> None:
    rows = {"x": np.zeros((1, 1))}
    assert client.infer("digits", rows, timeout_s=float("inf")).version == "3"
    with pytest.raises(ClientError, match=r"DEADLINE_EXCEEDED: no response from .* within -1 s"):
        client.infer("digits", rows, timeout_s=-1)
    assert server.calls == ["ModelInfer"]


def test_the_first_call_s_question_counts(server: FakeServer, client: Client) -> None:
    """Which batches the model takes is asked once. Both together have the call's time."""
    pause = Failure(FULL, "full", retry_pushback_ms="200")
    for call in (
        lambda: client.infer("digits", {"x": np.zeros((9, 1))}, timeout_s=0.6),
        lambda: client.classify("digits", np.zeros((28, 28), np.uint8), timeout_s=0.6),
    ):
        client._configs.clear()
        server.failures, server.delay_s = [pause] * 2, 0.4
        with pytest.raises(ClientError, match=f"no response from {server.target} within 0.6 s"):
            call()


def test_a_client_that_is_closed(server: FakeServer) -> None:
    client = Client(server.target)
    client.close()
    with pytest.raises(ClientError, match="CANCELLED: the client is closed"):
        client.is_live()


def test_a_response_without_a_message() -> None:
    handler = grpc.unary_stream_rpc_method_handler(lambda request, context: iter(()))
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ServerLive": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}") as client, pytest.raises(ClientError, match="invalid: it has no message"):
        client.is_live()
    server.stop(0).wait()


class FakeError:
    """A `grpc.RpcError`."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code = lambda: code
        self.details = lambda: details


LISTENS = "what listens at h:1 takes no gRPC from this client: "
FAILED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "


@pytest.mark.parametrize(
    ("code", "details", "message"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Stream removed (Deadline Exceeded)", "no response from h:1 within 5 s"),
        (grpc.StatusCode.INTERNAL, "Exception deserializing response!", "the server's response is invalid: it cannot"),
        (grpc.StatusCode.UNKNOWN, "a\x1b[31m \0b", "a [31m b"),
        (
            grpc.StatusCode.UNAVAILABLE,
            f"{FAILED}Socket closed (1)",
            f"{LISTENS}Socket closed; is that the port of gRPC, by",
        ),
        (
            grpc.StatusCode.UNAVAILABLE,
            f"{FAILED}Tls handshake failed: SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER: OK",
            "no TLS connection to h:1: what listens there does not use TLS",
        ),
        (grpc.StatusCode.UNAVAILABLE, f"{FAILED}No such file or directory", "no server responds at h:1: No such file"),
    ],
)
def test_grpc_s_errors_in_words(code: grpc.StatusCode, details: str, message: str) -> None:
    assert from_rpc(FakeError(code, details), "h:1", 5).message.startswith(message)


def test_the_deadline_bounds_all_attempts_together(server: FakeServer, client: Client) -> None:
    server.failures = [Failure(FULL, "full", grpc_retry_pushback_ms="60000")]
    began = time.monotonic()
    with pytest.raises(ClientError, match="RESOURCE_EXHAUSTED: full"):
        client.infer("digits", {"x": np.zeros((1, 1))}, timeout_s=0.2)
    assert time.monotonic() - began < 10


def test_a_refused_connection() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused for certain
        target = f"127.0.0.1:{taken.getsockname()[1]}"
        with Client(target) as client, pytest.raises(ClientError) as caught:
            client.is_live()
    assert caught.value.message == (
        f"no server responds at {target}: Connection refused; start it with convoy serve --model-repository models"
    )


def test_a_missing_socket(tmp_path: Path) -> None:
    with Client(f"unix:{tmp_path}/none") as client, pytest.raises(ClientError) as caught:
        client.is_live()
    assert "none: No such file or directory; start it" in caught.value.message


def test_an_unknown_host() -> None:
    with (
        Client("nosuch.invalid:80") as client,
        pytest.raises(ClientError, match=r"resolve nosuch.invalid:80: [A-Z][^:]*$"),
    ):
        client.is_live()


# ---- Addresses, tokens, TLS ------------------------------------------------------------------------------------------


def test_a_unix_socket(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    with FakeServer(address=address), Client(address) as client:
        assert client.is_live()


def test_calls_go_to_several_servers_in_turn() -> None:
    with FakeServer() as first, FakeServer() as second, Client(f"ipv4:{first.target},{second.target}") as client:
        for _ in range(200):  # until both are connected
            client.is_live()
            if first.calls and second.calls:
                break
        first.calls.clear()
        second.calls.clear()
        for _ in range(20):
            client.is_live()
    assert (len(first.calls), len(second.calls)) == (10, 10)


def test_one_of_two_servers_may_be_down() -> None:
    with FakeServer() as first, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with Client(f"ipv4:127.0.0.1:{taken.getsockname()[1]},{first.target}") as client:
            assert all(client.is_live() for _ in range(10))


def test_each_call_carries_the_token(server: FakeServer) -> None:
    with Client(server.target, token="sesame") as client:
        client.infer("digits", {"x": np.zeros((9, 1))})
    assert {call.get("authorization") for call in server.metadata} == {"Bearer sesame"}


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def ca(authority: Authority, tmp_path: Path) -> Path:
    return ca_file(tmp_path, authority)


def ca_file(folder: Path, authority: Authority) -> Path:
    path = folder / "ca.pem"
    path.write_bytes(authority.certificate)
    return path


def tls_server(authority: Authority, *, mutual: bool) -> FakeServer:
    signed = authority.issue()
    trusted = authority.certificate if mutual else None
    pair = (signed.key, signed.certificate)
    return FakeServer(credentials=grpc.ssl_server_credentials([pair], trusted, require_client_auth=mutual))


def test_tls(authority: Authority, ca: Path) -> None:
    with tls_server(authority, mutual=False) as server:
        with Client(server.target, tls=Tls(ca=ca), token="sesame") as client:
            assert client.is_live()
        assert server.metadata[0]["authorization"] == "Bearer sesame"


def test_a_server_signed_by_another_authority_is_not_trusted(authority: Authority, tmp_path: Path) -> None:
    other = ca_file(tmp_path, Authority("other"))
    with (
        tls_server(authority, mutual=False) as server,
        Client(server.target, tls=Tls(ca=other)) as client,
        pytest.raises(
            ClientError, match=f"no TLS connection to {server.target}: .*CERTIFICATE_VERIFY_FAILED.*--tls-ca"
        ),
    ):
        client.is_live()
    assert not server.calls


def test_mutual_tls(authority: Authority, ca: Path, tmp_path: Path) -> None:
    certificate, key = write(tmp_path, authority.issue("client"))
    with tls_server(authority, mutual=True) as server:
        with Client(server.target, tls=Tls(ca=ca, certificate=certificate, key=key)) as client:
            assert client.is_live()
        with Client(server.target, tls=Tls(ca=ca)) as client, pytest.raises(ClientError):
            client.is_live()
        assert len(server.calls) == 1


def test_a_client_certificate_without_key_is_rejected(ca: Path) -> None:
    with pytest.raises(ClientError, match="must be given together"):
        Client("127.0.0.1:1", tls=Tls(certificate=ca))


def test_files_that_hold_something_else_are_named(authority: Authority, ca: Path, tmp_path: Path) -> None:
    certificate, key = write(tmp_path, authority.issue("client"))
    with pytest.raises(ClientError, match=f"{key} does not hold a certificate in PEM form"):
        Client("127.0.0.1:1", tls=Tls(ca=key))
    with pytest.raises(ClientError, match=f"{ca} does not hold an unencrypted private key"):
        Client("127.0.0.1:1", tls=Tls(certificate=certificate, key=ca))


@pytest.mark.parametrize("token", ["a b", "line\n", "grün", "a\x01"])
def test_a_token_that_cannot_be_sent(token: str) -> None:
    with pytest.raises(ClientError, match="the token must be ASCII without blanks and line breaks"):
        Client("127.0.0.1:1", token=token)


def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"cannot read .*ca.pem: No such file or directory"):
        Client("127.0.0.1:1", tls=Tls(ca=tmp_path / "ca.pem"))


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("127.0.0.1:8001", "dns:///127.0.0.1:8001"),
        ("serving.example", "dns:///serving.example:8001"),
        ("::1", "dns:///[::1]:8001"),
        ("[::1]:80", "dns:///[::1]:80"),
        ("unix:/run/serving", "unix:/run/serving"),
        ("dns:///serving:8001", "dns:///serving:8001"),
    ],
)
def test_targets(target: str, address: str) -> None:
    assert parse_target(target) == address


@pytest.mark.parametrize("target", ["", "h\udcff:1", "unix:/\udcff", "http://127.0.0.1:8000", "127.0.0.1:8000/v2"])
def test_invalid_targets(target: str) -> None:
    with pytest.raises(ClientError, match=re.escape(f"{target!r} is not an address: use host:port")):
        Client(target)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("dns:///127.0.0.1:8001", True),
        ("dns:///[::1]:8001", True),
        ("dns:///localhost:8001", True),
        ("unix:/run/serving", True),
        ("dns:///serving:8001", False),
        ("dns:///10.0.0.1:8001", False),
    ],
)
def test_no_proxy_is_used_to_this_machine(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback
