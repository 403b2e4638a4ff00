"""The inferences of one stream, without gRPC."""

import threading
from typing import Any

import pytest

from serving.errors import ResourceExhausted
from serving.frontends.grpcio.infer_stream import InferStream
from serving.inference.message_memory import MessageMemory
from tests.serving.frontends.fake_service import FakeInference

WAIT_S = 30.0
SIZE = 100_000


@pytest.fixture
def service() -> FakeInference:
    made = FakeInference()
    made.message_memory = MessageMemory(3 * SIZE)
    return made


def read(service: Any, number: int) -> InferStream:
    """Returns a stream whose requests have all been answered, and none of whose responses has been read."""
    stream = InferStream(service, None)
    reading = threading.Thread(target=stream.read, args=([b"a" * SIZE] * number,))
    reading.start()
    reading.join(WAIT_S)
    return stream


def test_large_responses_that_nobody_reads_fill_the_memory_of_messages(service: FakeInference) -> None:
    stream = read(service, 5)
    assert service.message_memory.num_bytes == 3 * SIZE
    results = [result for _, result in stream.responses()]
    assert [len(result) if isinstance(result, bytes) else type(result) for result in results] == [
        *[SIZE] * 3,
        *[ResourceExhausted] * 2,
    ]
    assert service.message_memory.num_bytes == 0
    assert service.refusals.snapshot() == {("resource_exhausted", ""): 2}


def test_a_stream_that_ends_frees_the_responses_that_nobody_has_read(service: FakeInference) -> None:
    stream = read(service, 3)
    responses = stream.responses()
    assert next(responses) == ("", b"A" * SIZE)
    stream.cancel()
    assert service.message_memory.num_bytes == 0
