"""Plans: a request's form, checked once against a model."""

from collections.abc import Iterator

import numpy as np
import pytest

from protos.grpc_service_pb2 import ModelInferRequest
from serving.errors import InvalidArgument
from serving.inference.plan import Plan
from serving.inference.request import InferInput, InferRequest
from serving.protocol.grpc_codec import parse_request
from serving.protocol.tensors import DATATYPES, Elements
from serving.protocol.wire_format import SplitRequest
from tests.serving.fake_repository import FakeRepository, add_without_batch


class Unreadable(list[int]):
    """Elements that must not be read."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("the elements were converted before they were counted")


def test_typed_contents_are_counted_before_they_are_converted() -> None:
    message = ModelInferRequest()
    message.inputs.add(name="a", datatype="INT64", shape=[2]).contents.int64_contents.extend([1, 2])
    parsed = parse_request(SplitRequest(message.SerializeToString())).inputs[0].data
    assert isinstance(parsed, Elements)

    repository = FakeRepository(add_without_batch())
    request = InferRequest("add", [InferInput(name, "INT64", (2,), b"") for name in "ab"])
    plan = Plan(repository.get("add"), request)
    with pytest.raises(InvalidArgument, match=r"^input 'b' of model 'add': expected 2 INT64 elements .*, got 3$"):
        plan.bind_inputs([parsed, Elements(DATATYPES["INT64"], Unreadable([1, 2, 3]))])
    assert plan.bind_inputs([parsed, parsed]) == (np.array([1, 2]).tobytes(),) * 2
    repository.close()


def test_requests_whose_parameters_differ_in_type_have_plans_of_their_own() -> None:
    """1 == 1.0 == True: `"timeout": true` was accepted after `"timeout": 1`."""
    keys = {InferRequest("m", [], parameters={"timeout": value}).key for value in (1, 1.0, True)}
    assert len(keys) == 3
