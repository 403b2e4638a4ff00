"""The client against a server that fails, waits and tells what came."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from serving.client import Client, ClientError, ModelState, Prediction, Tls
from serving.client.connection import is_loopback, parse_target
from tests.serving.certificates import Authority, write
from tests.serving.fake_server import Failure, FakeServer, image_config

AWAY = Failure(grpc.StatusCode.UNAVAILABLE, "back soon")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target) as connected:
        yield connected


# ---- Inference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint64", "float16", "float32", "float64"])
def test_arrays_come_back_as_they_went(client: Client, dtype: str) -> None:
    sent = np.arange(6).reshape(1, 2, 3).astype(dtype)

    answer = client.infer("digits", {"x": sent}, request_id="seven")

    assert answer["x"].dtype == sent.dtype
    np.testing.assert_array_equal(answer["x"], sent)
    assert (answer.model, answer.version, answer.id) == ("digits", "3", "seven")
    answer["x"][:] = 0  # the caller's own


def test_strings_and_bytes_travel_as_bytes(client: Client) -> None:
    answer = client.infer("digits", {"a": [["grün", ""]], "b": np.array([[b"\x00\xff"]], object)})
    assert answer["a"].tolist() == [["grün".encode(), b""]]
    assert answer["b"].tolist() == [[b"\x00\xff"]]


def test_a_typed_answer_is_read_too(server: FakeServer, client: Client) -> None:
    server.typed = True
    assert client.infer("digits", {"x": np.array([[1.5, -2]], np.float32)})["x"].tolist() == [[1.5, -2.0]]


def test_an_answer_that_makes_no_sense_is_an_error(server: FakeServer, client: Client) -> None:
    server.typed = True  # and float64 has been read as float32: twice the elements
    with pytest.raises(ClientError, match="INTERNAL: the server's answer makes no sense: cannot reshape"):
        client.infer("digits", {"x": np.ones((1, 3), np.float32)} | {"y": np.ones((1, 3), np.int64)})


def test_an_array_that_cannot_travel_is_refused_before_it_is_sent(server: FakeServer, client: Client) -> None:
    with pytest.raises(ClientError, match="input 'x': no tensor of the protocol holds complex128"):
        client.infer("digits", {"x": np.ones(3, complex)})
    assert not server.calls


def test_the_wanted_outputs_and_the_version_are_asked_for(server: FakeServer, client: Client) -> None:
    client.infer("digits", {"x": np.zeros((1, 1))}, outputs=["a", "b"], version="2")
    assert [output.name for output in server.infers[0].outputs] == ["a", "b"]
    assert server.infers[0].model_version == "2"


def test_a_large_input_goes_in_parts_and_comes_back_in_order(server: FakeServer, client: Client) -> None:
    server.delay_s = 0.02
    sent = {"x": np.arange(4 * 25 - 1).reshape(-1, 1), "y": np.arange(4 * 25 - 1, dtype=np.float32)}

    answer = client.infer("digits", sent)

    assert sorted({tuple(infer.inputs[0].shape) for infer in server.infers}) == [(3, 1), (4, 1)]
    assert len(server.infers) == 25
    assert 1 < server.most_at_once <= 4
    for name, array in sent.items():
        np.testing.assert_array_equal(answer[name], array)


def test_a_request_of_many_megabytes_goes_in_parts_too(server: FakeServer, client: Client) -> None:
    server.config.max_batch_size = 64
    sent = np.arange(10, dtype=np.uint8)[:, None].repeat(1 << 20, axis=1)
    np.testing.assert_array_equal(client.infer("digits", {"x": sent})["x"], sent)
    assert {infer.inputs[0].shape[0] for infer in server.infers} == {3, 1}


@pytest.mark.parametrize(("rows", "limit"), [(4, 4), (1, 4), (99, 0)])
def test_what_fits_goes_in_one_request(server: FakeServer, client: Client, rows: int, limit: int) -> None:
    server.config.max_batch_size = limit
    client.infer("digits", {"x": np.zeros((rows, 2))})
    assert len(server.infers) == 1


def test_an_error_in_one_part_is_the_answer(server: FakeServer, client: Client) -> None:
    client.config("digits")
    server.failures = [Failure(grpc.StatusCode.INTERNAL, "the model broke")]
    with pytest.raises(ClientError, match=r"^INTERNAL: the model broke$"):
        client.infer("digits", {"x": np.zeros((400, 2))})
    assert len(server.infers) < 20, "the other parts are no longer sent"


def test_the_configuration_is_asked_for_once_and_again_after_an_error(server: FakeServer, client: Client) -> None:
    for _ in range(2):
        client.infer("digits", {"x": np.zeros((9, 2))})
    assert server.calls.count("ModelConfig") == 1
    server.config.max_batch_size = 9
    server.failures = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "batch-size must be <= 2")]
    with pytest.raises(ClientError):
        client.infer("digits", {"x": np.zeros((9, 2))})
    client.infer("digits", {"x": np.zeros((9, 2))}, request_id="last")
    assert [list(infer.inputs[0].shape) for infer in server.infers if infer.id == "last"] == [[9, 2]]


def test_threads_share_a_client(server: FakeServer, client: Client) -> None:
    wrong = []

    def ask(number: int) -> None:
        for row in range(20):
            sent = np.full((6, 3), number * 100 + row)
            if not np.array_equal(client.infer("digits", {"x": sent})["x"], sent):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- Classes of images -----------------------------------------------------------------------------------------------


def test_classes_have_indices_labels_and_probabilities(client: Client) -> None:
    black, white = np.zeros((28, 28), np.uint8), np.full((28, 28), 255, np.uint8)
    first, second = client.classify("digits", [black, white], top_k=2)
    assert first.predictions == (Prediction(0, "light: very", 0.0), Prediction(1, "1", 1.0))
    assert second.predictions[0].probability == 1
    assert (first.name, second.name, first.warning) == ("image 1", "image 2", None)


def test_many_images_are_classified_in_order(client: Client) -> None:
    images = np.arange(0, 250, 10, dtype=np.uint8)[:, None, None, None].repeat(28, 2).repeat(28, 3)
    found = [result.predictions[0].probability for result in client.classify("digits", images, top_k=1)]
    assert found == pytest.approx(np.arange(0, 250, 10) / 255, abs=1e-6)


def test_a_model_without_a_batch_dimension_gets_one_image_at_a_time(server: FakeServer, client: Client) -> None:
    server.config = image_config(max_batch_size=0)
    results = client.classify("digits", np.zeros((3, 28, 28), np.uint8), top_k=2)
    assert [len(result.predictions) for result in results] == [2, 2, 2]
    assert [list(infer.inputs[0].shape) for infer in server.infers] == [[1, 28, 28]] * 3


def test_nothing_to_classify_is_no_request(server: FakeServer, client: Client) -> None:
    assert client.classify("digits", []) == []
    assert not server.infers


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (image_config(2, 28, 28), r"takes images UINT8 \[2, 28, 28\], not images of a fixed size"),
        (image_config(1, -1, -1), "not images of a fixed size"),
        (image_config(outputs=("logits",)), "has no output 'probabilities', only logits"),
    ],
)
def test_a_model_that_does_not_classify_images_is_told_apart(
    server: FakeServer, client: Client, config: object, complaint: str
) -> None:
    server.config = config  # type: ignore[assignment]
    with pytest.raises(ClientError, match=complaint):
        client.classify("digits", np.zeros((28, 28), np.uint8))


def test_a_model_of_other_things_than_bytes_is_told_apart(server: FakeServer, client: Client) -> None:
    server.config.input[0].data_type = 11
    with pytest.raises(ClientError, match=r"takes images FP32 \[1, 28, 28\], not one UINT8 tensor"):
        client.classify("digits", np.zeros((28, 28), np.uint8))


def test_top_k_is_at_least_one(client: Client) -> None:
    with pytest.raises(ClientError, match="top_k must be at least 1, and is 0"):
        client.classify("digits", np.zeros((28, 28), np.uint8), top_k=0)


# ---- The server and its models ---------------------------------------------------------------------------------------


def test_what_the_server_tells_of_itself(client: Client) -> None:
    assert client.is_live()
    assert not client.is_ready()
    assert client.is_ready("digits")
    assert client.server().name == "fake"
    assert client.index()[1] == ModelState("torn", "", "UNAVAILABLE", "half a file")


def test_loading_forgets_the_configuration(server: FakeServer, client: Client) -> None:
    assert client.config("digits").max_batch_size == 4
    server.config.max_batch_size = 8
    assert client.config("digits").max_batch_size == 4
    client.load("digits")
    assert client.config("digits").max_batch_size == 8


# ---- Failures --------------------------------------------------------------------------------------------------------


def test_a_server_that_is_away_for_a_moment_is_asked_again(server: FakeServer, client: Client) -> None:
    server.failures = [AWAY, AWAY]
    assert client.is_live()
    assert [call.get("grpc-previous-rpc-attempts") for call in server.metadata] == [None, "1", "2"]


def test_a_server_that_stays_away_is_asked_five_times(server: FakeServer, client: Client) -> None:
    server.failures = [AWAY] * 9
    with pytest.raises(ClientError, match="UNAVAILABLE: back soon"):
        client.is_live()
    assert len(server.calls) == 5


def test_the_servers_hint_when_to_come_again_is_followed(server: FakeServer, client: Client) -> None:
    client.is_live()
    server.failures = [Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", pushback="700")]
    began = time.monotonic()
    assert client.is_live()
    assert time.monotonic() - began >= 0.7  # the backoff alone is at most 0.12 s


def test_a_server_that_asks_not_to_be_asked_again_is_not(server: FakeServer, client: Client) -> None:
    server.failures = [Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "too large", pushback="-1")]
    with pytest.raises(ClientError, match="RESOURCE_EXHAUSTED: too large"):
        client.is_live()
    assert len(server.calls) == 1


def test_a_large_request_is_repeated_too(server: FakeServer, client: Client) -> None:
    server.config.max_batch_size = 0
    client.config("digits")
    server.failures = [AWAY]
    sent = np.zeros((1, 3_000_000), np.uint8)
    assert client.infer("digits", {"x": sent})["x"].shape == sent.shape


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL])
def test_other_errors_are_final(server: FakeServer, client: Client, code: grpc.StatusCode) -> None:
    server.failures = [Failure(code, "no\n  good")]
    with pytest.raises(ClientError) as caught:
        client.is_live()
    assert (caught.value.code, caught.value.message) == (code.name, "no good")
    assert len(server.calls) == 1


@pytest.mark.parametrize("rows", [1, 40])
def test_a_slow_server_meets_the_deadline(server: FakeServer, client: Client, rows: int) -> None:
    client.config("digits")
    server.delay_s = 0.3
    with pytest.raises(ClientError, match=f"no answer from {server.target} within 0.2 s") as caught:
        client.infer("digits", {"x": np.zeros((rows, 1))}, timeout_s=0.2)
    assert caught.value.code == "DEADLINE_EXCEEDED"


def test_the_deadline_bounds_all_attempts_together(server: FakeServer, client: Client) -> None:
    server.failures = [Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", pushback="60000")]
    began = time.monotonic()
    with pytest.raises(ClientError):
        client.infer("digits", {"x": np.zeros((1, 1))}, timeout_s=0.2)
    assert time.monotonic() - began < 10


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused for certain
        target = f"127.0.0.1:{taken.getsockname()[1]}"
        with Client(target) as client, pytest.raises(ClientError) as caught:
            client.is_live()
    assert caught.value.message == (
        f"no server at {target} answers: Connection refused; start it with python -m serving --model-repository models"
    )


def test_no_such_socket(tmp_path: Path) -> None:
    with Client(f"unix:{tmp_path}/none") as client, pytest.raises(ClientError) as caught:
        client.is_live()
    assert "none answers: No such file or directory; start it" in caught.value.message


def test_no_such_host() -> None:
    with Client("nosuch.invalid:80") as client, pytest.raises(ClientError, match="no address is known for nosuch"):
        client.is_live()


# ---- Ways to the server ----------------------------------------------------------------------------------------------


def test_a_unix_socket(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    with FakeServer(address=address), Client(address) as client:
        assert client.is_live()


def test_servers_take_turns() -> None:
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


def test_one_of_two_servers_may_be_gone() -> None:
    with FakeServer() as first, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with Client(f"ipv4:127.0.0.1:{taken.getsockname()[1]},{first.target}") as client:
            assert all(client.is_live() for _ in range(10))


def test_the_token_goes_with_each_call(server: FakeServer) -> None:
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


def test_a_server_that_another_authority_signed_is_not_trusted(authority: Authority, tmp_path: Path) -> None:
    other = ca_file(tmp_path, Authority("other"))
    with (
        tls_server(authority, mutual=False) as server,
        Client(server.target, tls=Tls(ca=other)) as client,
        pytest.raises(ClientError, match=f"no TLS connection to {server.target}: .*CERTIFICATE_VERIFY_FAILED"),
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


def test_half_a_client_certificate_is_refused(ca: Path) -> None:
    with pytest.raises(ClientError, match="belong together"):
        Client("127.0.0.1:1", tls=Tls(certificate=ca))


def test_a_certificate_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"cannot read .*ca.pem: No such file or directory"):
        Client("127.0.0.1:1", tls=Tls(ca=tmp_path / "ca.pem"))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("127.0.0.1:8001", "dns:///127.0.0.1:8001"),
        ("serving.example", "dns:///serving.example:8001"),
        ("::1", "dns:///[::1]:8001"),
        ("[::1]:80", "dns:///[::1]:80"),
        ("unix:/run/serving", "unix:/run/serving"),
        ("dns:///serving:8001", "dns:///serving:8001"),
    ],
)
def test_targets(given: str, meant: str) -> None:
    assert parse_target(given) == meant


@pytest.mark.parametrize("given", ["", "http://127.0.0.1:8000", "127.0.0.1:8000/v2"])
def test_what_is_no_target(given: str) -> None:
    with pytest.raises(ClientError, match=f"{given!r} is no address: give host:port"):
        Client(given)


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
def test_no_proxy_on_the_way_to_this_machine(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback
