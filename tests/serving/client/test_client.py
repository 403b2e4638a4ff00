"""The client's methods, against a server that records its calls. `test_connection` tests retries and deadlines."""

import pickle
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from serving.client import Client, ClientError, ModelState, Prediction
from tests.serving.fake_server import Failure, FakeServer, image_config


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target) as connected:
        yield connected


# ---- Inference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint64", "float16", "float32", "float64", ">f4"])
def test_arrays_keep_data_type_and_values(client: Client, dtype: str) -> None:
    """Whatever their memory looks like: in columns here, and of another byte order."""
    sent = np.arange(6).reshape(3, 1, 2).astype(dtype).transpose(1, 2, 0)

    answer = client.infer("digits", {"x": sent}, request_id="seven")

    assert answer["x"].dtype == sent.dtype.newbyteorder("=")
    np.testing.assert_array_equal(answer["x"], sent)
    assert (answer.model, answer.version, answer.id) == ("digits", "3", "seven")
    answer["x"][:] = 0  # writable


def test_strings_and_bytes_are_sent_as_bytes(client: Client) -> None:
    answer = client.infer("digits", {"a": [["grün", ""]], "b": np.array([[b"\x00\xff"]], object), "c": [[b"\x00\x00"]]})
    assert answer["a"].tolist() == [["grün".encode(), b""]]
    assert answer["b"].tolist() == [[b"\x00\xff"]]
    assert answer["c"].tolist() == [[b"\x00\x00"]]


def test_typed_contents_are_read(server: FakeServer, client: Client) -> None:
    server.typed = True
    assert client.infer("digits", {"x": np.array([[1.5, -2]], np.float32)})["x"].tolist() == [[1.5, -2.0]]


def test_an_invalid_response_is_an_error(server: FakeServer, client: Client) -> None:
    server.typed = True  # the server writes int64 as float32: twice the elements
    with pytest.raises(ClientError, match="INTERNAL: the server's response is invalid: cannot reshape"):
        client.infer("digits", {"x": np.ones((1, 3), np.float32)} | {"y": np.ones((1, 3), np.int64)})


class Tensor:
    """Of a library that cannot convert it for numpy."""

    def __array__(self, *arguments: object) -> None:
        raise TypeError("numpy has no bfloat16")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones(3, complex), "input 'x': the protocol has no data type for complex128"),
        ([[1], [1, 2]], "input 'x' cannot be converted to an array: "),
        (Tensor(), "input 'x' cannot be converted to an array: numpy has no bfloat16"),
        (["a", None], "input 'x' has an element of type NoneType: strings and bytes become BYTES"),
        (["\udcff"], "input 'x' has a string that is not UTF-8: "),
    ],
)
def test_what_cannot_be_sent_is_rejected_before(
    server: FakeServer, client: Client, value: object, message: str
) -> None:
    with pytest.raises(ClientError, match=message) as caught:
        client.infer("digits", {"x": value})
    assert caught.value.code == "INVALID_ARGUMENT"
    assert not server.calls


def test_outputs_and_version_are_requested(server: FakeServer, client: Client) -> None:
    client.infer("digits", {"x": np.zeros((1, 1))}, outputs=["a", "b"], version="2")
    assert [output.name for output in server.infers[0].outputs] == ["a", "b"]
    assert server.infers[0].model_version == "2"


def test_many_rows_are_sent_in_parts_and_returned_in_order(server: FakeServer, client: Client) -> None:
    server.delay_s = 0.02
    sent = {"x": np.arange(4 * 25 - 1).reshape(-1, 1), "y": np.arange(4 * 25 - 1, dtype=np.float32)}

    answer = client.infer("digits", sent)

    assert sorted({tuple(infer.inputs[0].shape) for infer in server.infers}) == [(3, 1), (4, 1)]
    assert len(server.infers) == 25
    assert 1 < server.most_at_once <= 4
    for name, array in sent.items():
        np.testing.assert_array_equal(answer[name], array)


@pytest.mark.parametrize("kind", ["numbers", "bytes"])
def test_large_rows_are_sent_in_parts(server: FakeServer, client: Client, kind: str) -> None:
    server.config.max_batch_size = 64
    sent = np.arange(10, dtype=np.uint8)[:, None].repeat(1 << 20, axis=1)
    if kind == "bytes":
        sent = np.array([[row.tobytes()] for row in sent], object)
    np.testing.assert_array_equal(client.infer("digits", {"x": sent})["x"], sent)
    assert {infer.inputs[0].shape[0] for infer in server.infers} == {3, 1}


@pytest.mark.parametrize(("rows", "limit"), [(4, 4), (1, 4), (99, 0)])
def test_rows_that_fit_are_sent_in_one_request(server: FakeServer, client: Client, rows: int, limit: int) -> None:
    server.config.max_batch_size = limit
    client.infer("digits", {"x": np.zeros((rows, 2))})
    assert len(server.infers) == 1


def test_an_error_in_one_part_fails_the_call(server: FakeServer, client: Client) -> None:
    client.config("digits")
    server.failures = [Failure(grpc.StatusCode.INTERNAL, "the model broke")]
    with pytest.raises(ClientError, match=r"^INTERNAL: the model broke$"):
        client.infer("digits", {"x": np.zeros((400, 2))})
    assert len(server.infers) < 20, "no further parts are sent"


def test_the_configuration_is_cached_until_an_error(server: FakeServer, client: Client) -> None:
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


def test_no_images_send_no_request(server: FakeServer, client: Client) -> None:
    assert client.classify("digits", []) == []
    assert not server.infers


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (image_config(2, 28, 28), r"takes images UINT8 \[2, 28, 28\], not images of a fixed size"),
        (image_config(1, -1, -1), "not images of a fixed size"),
        (image_config(outputs=("logits",)), "has no output 'probabilities', only logits"),
    ],
)
def test_a_model_that_does_not_classify_images_is_rejected(
    server: FakeServer, client: Client, config: object, message: str
) -> None:
    server.config = config  # type: ignore[assignment]
    with pytest.raises(ClientError, match=message):
        client.classify("digits", np.zeros((28, 28), np.uint8))


def test_a_server_without_the_extension_is_told(server: FakeServer, client: Client) -> None:
    server.classifies = False
    with pytest.raises(ClientError, match=r"UNIMPLEMENTED: the server does not support .* classification extension"):
        client.classify("digits", np.zeros((28, 28), np.uint8))


def test_a_model_with_another_input_type_is_rejected(server: FakeServer, client: Client) -> None:
    server.config.input[0].data_type = 11
    with pytest.raises(ClientError, match=r"takes images FP32 \[1, 28, 28\], not one UINT8 tensor"):
        client.classify("digits", np.zeros((28, 28), np.uint8))


@pytest.mark.parametrize(("top_k", "message"), [(0, "top_k must be at least 1, got 0"), (2**63, "cannot be sent")])
def test_top_k_has_bounds(client: Client, top_k: int, message: str) -> None:
    with pytest.raises(ClientError, match=message):
        client.classify("digits", np.zeros((28, 28), np.uint8), top_k=top_k)


# ---- The server and its models ---------------------------------------------------------------------------------------


def test_state_of_the_server_and_its_models(client: Client) -> None:
    assert client.is_live()
    assert not client.is_ready()
    assert client.is_ready("digits")
    assert client.server_metadata().name == "fake"
    assert client.index()[1] == ModelState("torn", "", "UNAVAILABLE", "half a file")


def test_names_that_are_not_utf8_are_rejected(client: Client) -> None:
    with pytest.raises(ClientError, match=r"INVALID_ARGUMENT: one of '.udcff', '' cannot be sent"):
        client.is_ready("\udcff")


def test_an_error_can_be_sent_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(ClientError("NOT_FOUND", "no model")))
    assert (error.code, error.message, str(error)) == ("NOT_FOUND", "no model", "NOT_FOUND: no model")


def test_load_clears_the_cached_configuration(server: FakeServer, client: Client) -> None:
    assert client.config("digits").max_batch_size == 4
    server.config.max_batch_size = 8
    assert client.config("digits").max_batch_size == 4
    client.load("digits")
    assert client.config("digits").max_batch_size == 8
