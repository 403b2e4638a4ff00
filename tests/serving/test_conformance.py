"""Inference on both gRPC front ends, with tritonclient as an independent client.

All other RPCs are in `test_conformance_control`, malformed requests in `test_conformance_bad_input`, batching and
deadlines in `test_conformance_batching`, random bytes in `test_conformance_fuzz`.
"""

import asyncio
import queue
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio

from protos import grpc_service_pb2 as pb
from serving.protocol.tensors import DATATYPES, Array
from tests.serving.conftest import SERVICE, Served, tensor
from tests.serving.onnx_models import LABELS, LOADED, NUMBERS, PIXEL_WEIGHTS, WEIGHTS

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def infer(served: Served, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    call = served.channel.unary_unary(
        SERVICE + "ModelInfer", pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
    )
    response: pb.ModelInferResponse = call(request, timeout=60)
    return response


# ---- Inference -------------------------------------------------------------------------------------------------------


def test_one_input_all_outputs(client: triton.InferenceServerClient) -> None:
    response = client.infer("rows", [tensor("x", X)])
    np.testing.assert_array_equal(response.as_numpy("echo"), X)
    np.testing.assert_allclose(response.as_numpy("product"), X @ WEIGHTS, atol=1e-5)
    head = response.get_response()
    assert (head.model_name, head.model_version, head.id) == ("rows", "1", "")
    assert [(output.name, output.datatype, list(output.shape)) for output in head.outputs] == [
        ("echo", "FP32", [3, 4]),
        ("product", "FP32", [3, 3]),
    ]


def test_the_response_has_the_requests_id(client: triton.InferenceServerClient) -> None:
    for request_id in ("", "first", "second", "é" * 40):
        assert client.infer("rows", [tensor("x", X)], request_id=request_id).get_response().id == request_id


def test_requested_outputs_keep_their_order(client: triton.InferenceServerClient) -> None:
    for names in (["product"], ["product", "echo"], ["echo", "product"]):
        asked = [triton.InferRequestedOutput(name) for name in names]
        response = client.infer("rows", [tensor("x", X)], outputs=asked)
        assert [output.name for output in response.get_response().outputs] == names
        assert len(response.get_response().raw_output_contents) == len(names)


def test_several_inputs_in_any_order(client: triton.InferenceServerClient) -> None:
    a, b = np.array([[1, 2], [3, 4]], np.float32), np.array([[10], [-20]], np.int64)
    for inputs in ([tensor("a", a), tensor("b", b)], [tensor("b", b), tensor("a", a)]):
        response = client.infer("pair", inputs)
        np.testing.assert_array_equal(response.as_numpy("sum"), a + b)
        np.testing.assert_array_equal(response.as_numpy("twice"), 2 * b)


def test_every_type(client: triton.InferenceServerClient) -> None:
    arrays = {name: extremes(name) for name in NUMBERS}
    response = client.infer("types", [tensor(f"in_{name}", array) for name, array in arrays.items()])
    for name, array in arrays.items():
        got = response.as_numpy(f"out_{name}")
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)


def extremes(datatype: str) -> Array:
    dtype = DATATYPES[datatype].dtype
    if dtype.kind == "b":
        return np.array([[False, True]])
    limits: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return np.array([[limits.min, limits.max]], dtype)


def test_every_type_in_typed_contents(served: Served) -> None:
    request = pb.ModelInferRequest(model_name="types")
    for name in NUMBERS:
        given = request.inputs.add(name=f"in_{name}", datatype=name, shape=[1, 2])
        getattr(given.contents, str(DATATYPES[name].contents)).extend(extremes(name).ravel().tolist())

    response = infer(served, request)

    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        name = output.name.removeprefix("out_")
        assert raw == extremes(name).tobytes()


def test_fp16_as_raw_bytes(client: triton.InferenceServerClient) -> None:
    halves = extremes("FP16")
    np.testing.assert_array_equal(client.infer("halves", [tensor("in_FP16", halves)]).as_numpy("out_FP16"), halves)


def test_typed_contents(served: Served) -> None:
    request = pb.ModelInferRequest(model_name="pair", id="typed")
    request.inputs.add(name="a", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1.5, -2])
    request.inputs.add(name="b", datatype="INT64", shape=[1, 1]).contents.int64_contents.append(-4096)
    response = infer(served, request)
    assert response.id == "typed"
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [1.5 - 4096, -2 - 4096]
    assert np.frombuffer(response.raw_output_contents[1], np.int64).tolist() == [-8192]


def test_strings(client: triton.InferenceServerClient) -> None:
    words = np.array([["", "grün"], ["a" * 1000, "\n"]], object)
    got = client.infer("strings", [tensor("text", words)]).as_numpy("echo")
    assert [word.decode() for word in got.ravel()] == words.ravel().tolist()


def test_typed_strings(served: Served) -> None:
    request = pb.ModelInferRequest(model_name="strings")
    given = request.inputs.add(name="text", datatype="BYTES", shape=[2, 1])
    given.contents.bytes_contents.extend([b"one", b""])
    assert infer(served, request).raw_output_contents[0] == b"\x03\0\0\0one\0\0\0\0"


def test_without_a_batch_dimension(client: triton.InferenceServerClient) -> None:
    for length in (1, 5, 300):
        x = np.arange(length, dtype=np.float32)
        response = client.infer("whole", [tensor("x", x)])
        np.testing.assert_array_equal(response.as_numpy("doubled"), 2 * x)
        np.testing.assert_array_equal(response.as_numpy("total"), [x.sum()])


def test_versions(client: triton.InferenceServerClient) -> None:
    x = np.zeros((1, 1), np.float32)
    for version, answering in (("", "2"), ("1", "1"), ("2", "2"), ("", "2")):
        response = client.infer("versions", [tensor("x", x)], model_version=version)
        assert response.as_numpy("y").tolist() == [[float(answering)]]
        assert response.get_response().model_version == answering


@pytest.mark.parametrize("top_k", [1, 3, 10, 99])
def test_classification(client: triton.InferenceServerClient, top_k: int) -> None:
    images = np.random.default_rng(2).integers(0, 256, (4, 1, 4, 4), dtype=np.uint8)
    asked = [triton.InferRequestedOutput("probabilities", class_count=top_k), triton.InferRequestedOutput("logits")]

    response = client.infer("digits", [tensor("images", images)], outputs=asked)

    logits = images.reshape(4, 16).astype(np.float32) @ PIXEL_WEIGHTS
    np.testing.assert_allclose(response.as_numpy("logits"), logits, atol=1e-4)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    cells = response.as_numpy("probabilities")
    assert cells.shape == (4, min(top_k, 10))
    for row, scores in zip(cells, probabilities, strict=True):
        assert [int(cell.split(b":")[1]) for cell in row] == np.argsort(-scores)[:top_k].tolist()
        for cell in row:
            score, index, label = cell.decode().split(":", 2)
            assert float(score) == pytest.approx(scores[int(index)], abs=2e-6)
            assert label == LABELS[int(index)]


def test_classification_without_labels(client: triton.InferenceServerClient) -> None:
    asked = [triton.InferRequestedOutput("echo", class_count=2)]
    response = client.infer("rows", [tensor("x", np.array([[0, 5, 1, 5]], np.float32))], outputs=asked)
    assert response.as_numpy("echo").tolist() == [[b"5.000000:1", b"5.000000:3"]]


# ---- The stream ------------------------------------------------------------------------------------------------------


def test_a_stream_responds_in_order_and_continues_after_an_error(served: Served) -> None:
    responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(served.target) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        for number in range(20):
            name = "rows" if number != 7 else "nothing"
            client.async_stream_infer(name, [tensor("x", X + number)], request_id=str(number))
        got = [responses.get(timeout=60) for _ in range(20)]
        client.stop_stream()
    for number, (result, error) in enumerate(got):
        if number == 7:
            assert "unknown model 'nothing'" in str(error)
        else:
            assert error is None
            assert result.get_response().id == str(number)
            np.testing.assert_array_equal(result.as_numpy("echo"), X + number)


# ---- The same client, asynchronous -----------------------------------------------------------------------------------


def test_asynchronous_client(served: Served) -> None:
    async def ask() -> None:
        async with triton_aio.InferenceServerClient(served.target) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("rows")
            assert (await client.get_server_metadata()).name == "convoy"
            assert (await client.get_model_metadata("rows")).name == "rows"
            assert (await client.get_model_config("rows")).config.max_batch_size == 8
            assert (await client.get_inference_statistics("rows")).model_stats[0].name == "rows"
            assert len((await client.get_model_repository_index()).models) > len(LOADED)
            await client.load_model("spare")
            await client.unload_model("spare")
            responses = await asyncio.gather(*(client.infer("rows", [tensor("x", X + n)]) for n in range(50)))
            for number, response in enumerate(responses):
                np.testing.assert_array_equal(response.as_numpy("echo"), X + number)

            async def requests() -> Any:
                for number in range(5):
                    yield {"model_name": "rows", "inputs": [tensor("x", X + number)]}

            number = 0
            async for result, error in client.stream_infer(requests()):
                assert error is None
                np.testing.assert_array_equal(result.as_numpy("echo"), X + number)
                number += 1
            assert number == 5

    asyncio.run(ask())
