"""Serialised responses of ModelInfer, written without protobuf objects."""

from collections.abc import Callable

import numpy as np
import pytest
from google.protobuf.internal.decoder import _DecodeVarint  # type: ignore[attr-defined]
from hypothesis import given
from hypothesis import strategies as st

from protos.grpc_service_pb2 import InferParameter, ModelInferResponse, ModelStreamInferResponse
from serving.errors import NotFound
from serving.inference.outputs import Outputs
from serving.inference.plan import Plan
from serving.inference.request import InferInput, InferRequest
from serving.protocol.grpc_codec import (
    ResponseEncoder,
    encode_id,
    encode_stream_error,
    encode_stream_response,
    varint,
)
from serving.protocol.tensors import Shape
from tests.serving.fake_repository import FakeRepository, add_without_batch


@given(st.integers(0, 2**40))
def test_varints_are_protobufs(number: int) -> None:
    encoded = varint(number)
    assert _DecodeVarint(encoded, 0) == (number, len(encoded))


@pytest.mark.parametrize("request_id", ["", "7", "é" * 100])
def test_ids_are_a_field_of_the_response(request_id: str) -> None:
    assert encode_id(request_id) == ModelInferResponse(id=request_id).SerializeToString()


def test_stream_messages_are_protobufs() -> None:
    final = {"triton_final_response": InferParameter(bool_param=True)}
    for response in (ModelInferResponse(model_name="m", id="x" * 300), ModelInferResponse(model_name="m" * 100)):
        wrapped = ModelStreamInferResponse.FromString(encode_stream_response(response.SerializeToString()))
        response.parameters["triton_final_response"].bool_param = True
        assert wrapped == ModelStreamInferResponse(infer_response=response)
    failed = ModelStreamInferResponse.FromString(encode_stream_error(NotFound("no such model"), "7"))
    response = ModelInferResponse(id="7", parameters=final)
    assert failed == ModelStreamInferResponse(error_message="no such model", infer_response=response)


class Interrupted(list[Shape]):
    """Shapes that let another thread use the same encoder while they are compared."""

    def __init__(self, shapes: list[Shape], interrupt: Callable[[], object]) -> None:
        super().__init__(shapes)
        self._interrupt = interrupt

    def __ne__(self, other: object) -> bool:
        differs = super().__ne__(other)
        self._interrupt()
        return differs


def test_threads_that_share_an_encoder_do_not_mix_up_shapes() -> None:
    repository = FakeRepository(add_without_batch())
    request = InferRequest("add", [InferInput(name, "INT64", (2,), bytes(16)) for name in "ab"])
    encoder = ResponseEncoder(Plan(repository.get("add"), request))
    short, long = (Outputs([np.arange(length)], None) for length in (2, 5))
    encoder.encode(short, 0, "")
    short.row_shapes = Interrupted(short.row_shapes, lambda: encoder.encode(long, 0, ""))

    response = ModelInferResponse.FromString(encoder.encode(short, 0, ""))

    assert list(response.outputs[0].shape) == [2]
    assert np.frombuffer(response.raw_output_contents[0], np.int64).tolist() == [0, 1]
    repository.close()
