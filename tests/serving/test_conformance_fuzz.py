"""Mutated messages on every front end: each gets a response that is right for it (`benchmarks/fuzz.py` sends more)."""

from collections.abc import Iterator

import grpc
import pytest

from protos import grpc_service_pb2 as pb
from tests.serving.conftest import SERVICE, Served
from tests.serving.fuzzing.grpc_sender import check_response, send_grpc
from tests.serving.fuzzing.http_sender import send_http
from tests.serving.fuzzing.messages import generator, grpc_message, http_message
from tests.serving.fuzzing.oracle import INVALID, OK, expect_infer
from tests.serving.fuzzing.requests import random_request, to_protobuf
from tests.serving.fuzzing.result import Result

NUM_MESSAGES = 1500
SEED = 15


@pytest.fixture(autouse=True)
def _serves_on(served: Served) -> Iterator[None]:
    """Checks after each test that good requests are still answered, and restores the models."""
    yield
    infer = served.channel.unary_unary(SERVICE + "ModelInfer")
    for number in range(20):
        payload = to_protobuf(random_request(generator(SEED, number)), typed=False).SerializeToString()
        response = pb.ModelInferResponse.FromString(infer(payload, timeout=60))
        assert check_response(response, expect_infer(payload)) is None
    unload = pb.RepositoryModelUnloadRequest(model_name="spare").SerializeToString()
    served.channel.unary_unary(SERVICE + "RepositoryModelUnload")(unload, timeout=60)


def wrong(results: Iterator[Result]) -> list[str]:
    """Returns what was wrong, for people: the message's number, what was changed, and the response."""
    found = list(results)
    assert len(found) == NUM_MESSAGES
    return [
        f"message {result.message.number} ({', '.join(result.message.changes)}): {result.problem}"
        for result in found
        if result.problem is not None
    ]


def test_mutated_messages_over_grpc(served: Served) -> None:
    messages = (grpc_message(SEED, number) for number in range(NUM_MESSAGES))
    assert wrong(send_grpc(served.target, messages)) == []


def test_mutated_messages_over_http(served: Served) -> None:
    messages = (http_message(SEED, number) for number in range(NUM_MESSAGES))
    assert wrong(send_http(served.server.http.port, messages)) == []


def test_messages_hold_every_kind_of_outcome() -> None:
    """A generator of nothing but invalid messages would prove little."""
    codes = [expected.codes for number in range(300) for expected in grpc_message(SEED, number).expected]
    assert sum(right == {OK} for right in codes) > 80
    assert sum(right == {INVALID} for right in codes) > 80
    assert len(set(codes)) > 5


@pytest.mark.parametrize("typed", [False, True])
def test_good_messages_cut_off_anywhere(served: Served, typed: bool) -> None:
    payload = to_protobuf(random_request(generator(SEED, 3)), typed=typed).SerializeToString()
    infer = served.channel.unary_unary(SERVICE + "ModelInfer")
    calls = {end: infer.future(payload[:end], timeout=60) for end in range(len(payload))}
    codes = {code: code.value[0] for code in grpc.StatusCode}
    for end, call in calls.items():
        assert codes[call.code()] in expect_infer(payload[:end]).codes, call.details()
