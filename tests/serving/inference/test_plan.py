"""Plans: what is checked once, and how answers look on the wire."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from google.protobuf.internal.decoder import _DecodeVarint  # type: ignore[attr-defined]
from hypothesis import given
from hypothesis import strategies as st

from protos.grpc_service_pb2 import ModelInferRequest, ModelInferResponse
from serving.errors import InvalidArgument
from serving.inference.batcher import Outputs
from serving.inference.plan import Plan, classify, varint
from serving.inference.request import InferInput, InferRequest
from serving.protocol.grpc_codec import parse_request
from serving.protocol.tensors import DATATYPES, Elements, Shape
from tests.serving.fake_repository import FakeRepository, add_without_batch


@given(st.integers(0, 2**40))
def test_varints_are_protobufs(number: int) -> None:
    encoded = varint(number)
    assert _DecodeVarint(encoded, 0) == (number, len(encoded))


def test_classification_gives_the_largest_values_first() -> None:
    rows = np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]], np.float32)
    assert classify(rows, 2, ["a", "b", "c"]).tolist() == [
        [b"0.700000:1:b", b"0.200000:2:c"],
        [b"0.500000:0:a", b"0.250000:1:b"],
    ]


def test_classification_without_labels_or_with_too_few() -> None:
    assert classify(np.array([[1, 3, 2]]), 9, ["zero", "one"]).tolist() == [
        [b"3.000000:1:one", b"2.000000:2", b"1.000000:0:zero"]
    ]


def test_classification_survives_what_is_no_number() -> None:
    strings = classify(np.array([[math.nan, 1.0, math.inf]], np.float32), 3, [])[0]
    assert strings.tolist()[0] == b"inf:2"
    assert len(strings) == 3


class Interrupted(list[Shape]):
    """Shapes that let another thread of the same plan come in while they are compared."""

    def __init__(self, shapes: list[Shape], interrupt: Callable[[], object]) -> None:
        super().__init__(shapes)
        self._interrupt = interrupt

    def __ne__(self, other: object) -> bool:
        differs = super().__ne__(other)
        self._interrupt()
        return differs


def test_an_answer_has_its_own_shape_whatever_other_instances_answer_meanwhile() -> None:
    repository = FakeRepository(add_without_batch())
    request = InferRequest("add", [InferInput(name, "INT64", (2,), bytes(16)) for name in "ab"])
    plan = Plan(repository.get("add"), request)
    short, long = (Outputs([np.arange(length)], None) for length in (2, 5))
    plan.encode(short, 0, b"")
    short.row_shapes = Interrupted(short.row_shapes, lambda: plan.encode(long, 0, b""))

    answer = ModelInferResponse.FromString(plan.encode(short, 0, b""))

    assert list(answer.outputs[0].shape) == [2]
    assert np.frombuffer(answer.raw_output_contents[0], np.int64).tolist() == [0, 1]
    repository.close()


class Untouched(list[int]):
    """Elements that nobody may look at."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("converted before they were counted")


def test_typed_contents_are_counted_before_they_are_converted() -> None:
    message = ModelInferRequest()
    message.inputs.add(name="a", datatype="INT64", shape=[2]).contents.int64_contents.extend([1, 2])
    parsed = parse_request(message).inputs[0].data
    assert isinstance(parsed, Elements)

    repository = FakeRepository(add_without_batch())
    request = InferRequest("add", [InferInput(name, "INT64", (2,), b"") for name in "ab"])
    plan = Plan(repository.get("add"), request)
    with pytest.raises(InvalidArgument, match=r"^input 'b' of model 'add': expected 2 INT64 elements .*, got 3$"):
        plan.bind_inputs([parsed, Elements(DATATYPES["INT64"], Untouched([1, 2, 3]))])
    assert plan.bind_inputs([parsed, parsed]) == (np.array([1, 2]).tobytes(),) * 2
    repository.close()
