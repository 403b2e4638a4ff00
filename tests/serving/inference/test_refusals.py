"""What is refused or dropped before a model's queue is counted, wherever that happens."""

import contextlib
import threading
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory as Block
from typing import cast

import pytest

from protos.grpc_service_pb2 import ModelInferRequest
from serving.errors import Cancelled, Internal, Unavailable
from serving.inference.message_memory import MessageMemory
from serving.inference.request import NO_CONTEXT
from serving.inference.service import MAX_QUICK_BYTES, InferenceService
from serving.inference.shared_memory import Region, SharedMemory
from serving.models.repository import Repository
from tests.serving.fake_repository import PATIENCE_S, FakeRepository, make_service, twice
from tests.serving.inference.test_plan_cache import Response, message

LARGE = "a" * (MAX_QUICK_BYTES + 1)


@pytest.fixture
def repository() -> Iterator[FakeRepository]:
    repository = FakeRepository(twice())
    yield repository
    repository.close()


@pytest.fixture
def service(repository: FakeRepository) -> InferenceService:
    return make_service(repository)


def test_a_large_request_that_is_cancelled_before_it_is_parsed(
    service: InferenceService, repository: FakeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_parsing, go_on = threading.Event(), threading.Event()
    get = repository.get

    def get_slowly(name: str, version: str = "") -> object:
        is_parsing.set()
        assert go_on.wait(PATIENCE_S)
        return get(name, version)

    monkeypatch.setattr(repository, "get", get_slowly)
    first, dropped, last = Response(), Response(), Response()
    service.infer(message(1, 1, note=LARGE), NO_CONTEXT, first)
    assert is_parsing.wait(PATIENCE_S)
    request = service.infer(message(1, 2, note=LARGE), NO_CONTEXT, dropped)
    service.infer(message(1, 3, note=LARGE), NO_CONTEXT, last)
    assert request is not None
    request.cancel()
    go_on.set()
    assert first.result(PATIENCE_S)
    assert last.result(PATIENCE_S)
    assert isinstance(dropped.exception(0), Cancelled)
    assert service.refusals.snapshot() == {("cancelled", ""): 1}


def test_a_model_that_is_replaced_again_and_again(service: InferenceService, repository: FakeRepository) -> None:
    repository.get("twice").batcher.close()
    response = Response()
    assert service.infer(message(1, 1), NO_CONTEXT, response) is None
    assert isinstance(response.exception(0), Unavailable)
    assert service.refusals.snapshot() == {("unavailable", ""): 1}


def test_shared_memory_that_cannot_be_read(repository: FakeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on the thread that parses: its request would wait for ever."""

    def fail(self: Region, offset: int, num_bytes: int) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Region, "read", fail)
    memory, messages = SharedMemory(1 << 20), MessageMemory()
    service = InferenceService(cast(Repository, repository), shared_memory=memory, message_memory=messages)
    with contextlib.closing(Block(create=True, size=1 << 20)) as block:
        memory.register("r", block.name, 0, 1 << 20)
        for note in ("", LARGE):
            response = Response()
            service.infer(shared_message("r", 12 << 10, note), NO_CONTEXT, response)
            assert isinstance(response.exception(PATIENCE_S), Internal)
        block.unlink()
    assert service.refusals.snapshot() == {("internal", ""): 2}
    assert messages.num_bytes == 0


def shared_message(region: str, rows: int, note: str) -> bytes:
    request = ModelInferRequest.FromString(message(1, note=note))
    del request.inputs[:], request.raw_input_contents[:]
    given = request.inputs.add(name="numbers", datatype="FP32", shape=[rows, 3])
    given.parameters["shared_memory_region"].string_param = region
    given.parameters["shared_memory_byte_size"].int64_param = 12 * rows
    return request.SerializeToString()


def test_a_defect(service: InferenceService, repository: FakeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "get", lambda name, version="": 1 / 0)
    response = Response()
    assert service.infer(message(1, 1), NO_CONTEXT, response) is None
    assert isinstance(response.exception(0), Internal)
    assert service.refusals.snapshot() == {("internal", ""): 1}
