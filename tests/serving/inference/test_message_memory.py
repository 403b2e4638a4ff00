"""The memory of large messages: what is counted, for how long, and who is refused."""

from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory as Block
from typing import cast

import pytest

from protos.grpc_service_pb2 import ModelInferRequest
from serving.errors import ResourceExhausted, ServingError
from serving.inference.message_memory import UNCOUNTED_BYTES, MemoryShare, MessageMemory
from serving.inference.request import NO_CONTEXT
from serving.inference.service import InferenceService
from serving.inference.shared_memory import SharedMemory
from serving.models.repository import Repository
from tests.serving.fake_repository import (
    PATIENCE_S,
    BlockingBackend,
    FakeRepository,
    backend_of,
    make_model,
    make_service,
    tensor,
    twice,
)
from tests.serving.inference.test_plan_cache import Response, message

LARGE = UNCOUNTED_BYTES + 1


@pytest.fixture
def memory() -> MessageMemory:
    return MessageMemory(2 * LARGE)


def test_small_messages_pass_while_large_ones_fill_it() -> None:
    memory = MessageMemory(3 << 20)
    large = MemoryShare(memory)
    large.take(3 << 20)
    small = MemoryShare(memory)
    small.take(UNCOUNTED_BYTES)
    with pytest.raises(ResourceExhausted, match="requests fill the 3 MB that the server has for them") as refused:
        small.take(1)
    assert refused.value.retry_after_ms == 1000
    assert (memory.num_bytes, small.num_bytes) == (3 << 20, 0)


def test_a_message_counts_from_its_first_byte_until_it_is_free(memory: MessageMemory) -> None:
    share = MemoryShare(memory)
    share.take(UNCOUNTED_BYTES)
    assert memory.num_bytes == 0
    share.take(1)
    share.take(5)
    assert memory.num_bytes == LARGE + 5
    for _ in range(2):
        share.free()
        assert memory.num_bytes == 0


def test_a_message_that_is_alone_may_exceed_it(memory: MessageMemory) -> None:
    share = MemoryShare(memory)
    share.take(9 * LARGE)
    share.take(LARGE)
    with pytest.raises(ResourceExhausted):
        MemoryShare(memory).take(LARGE)


class TestCallsOverGrpc:
    @pytest.fixture
    def repository(self) -> Iterator[FakeRepository]:
        repository = FakeRepository(twice())
        yield repository
        repository.close()

    @pytest.fixture
    def backend(self, repository: FakeRepository) -> BlockingBackend:
        return backend_of(repository.get("twice"))

    @pytest.fixture
    def service(self, repository: FakeRepository) -> InferenceService:
        service = make_service(repository)
        service.message_memory.max_bytes = 2 * LARGE
        return service

    @pytest.mark.parametrize("end", ["answer", "cancel", "fail"])
    def test_are_counted_until_they_end(self, service: InferenceService, backend: BlockingBackend, end: str) -> None:
        large = message(1, 1, 2, 3, request_id="a" * LARGE)
        backend.free.clear()
        running, waiting, refused, small = Response(), Response(), Response(), Response()
        service.infer(large, NO_CONTEXT, running)
        assert backend.began.acquire(timeout=PATIENCE_S)
        service.message_memory.max_bytes = 3 * LARGE
        request = service.infer(large, NO_CONTEXT, waiting)
        counted = service.message_memory.num_bytes
        assert counted == 2 * len(large)
        assert service.infer(large, NO_CONTEXT, refused) is None
        with pytest.raises(ResourceExhausted, match="requests fill the"):
            refused.result(0)
        assert service.refusals.snapshot() == {("resource_exhausted", ""): 1}
        service.infer(message(1, 1, 2, 3), NO_CONTEXT, small)
        if end == "cancel":
            assert request is not None
            request.cancel()
            assert service.message_memory.num_bytes == len(large)
        elif end == "fail":
            backend.function = lambda x: []
        backend.free.set()
        assert isinstance(small.exception(PATIENCE_S), ServingError if end == "fail" else type(None))
        assert service.message_memory.num_bytes == 0

    def test_a_message_that_is_refused_is_not_counted(self, service: InferenceService) -> None:
        wrong = Response()
        assert service.infer(message(9, 1, 2, 3, request_id="a" * LARGE), NO_CONTEXT, wrong) is None
        assert isinstance(wrong.exception(0), ServingError)
        assert service.message_memory.num_bytes == 0


class TestInputsInSharedMemory:
    WIDTH = LARGE // 4 + 1
    SIZE = 4 * WIDTH

    @pytest.fixture
    def repository(self) -> Iterator[FakeRepository]:
        tensors = [tensor("x", "FP32", -1, self.WIDTH)], [tensor("y", "FP32", -1, 1)]
        repository = FakeRepository(make_model("wide", lambda x: [x[:, :1]], tensors))
        yield repository
        repository.close()

    @pytest.fixture
    def region(self) -> Iterator[Block]:
        block = Block(create=True, size=self.SIZE)
        yield block
        block.close()
        block.unlink()

    @pytest.fixture
    def service(self, repository: FakeRepository, region: Block) -> InferenceService:
        memory = SharedMemory(self.SIZE)
        memory.register("region", region.name, 0, self.SIZE)
        return InferenceService(
            cast(Repository, repository), shared_memory=memory, message_memory=MessageMemory(2 * self.SIZE)
        )

    def message(self, region: str = "region") -> bytes:
        request = ModelInferRequest(model_name="wide")
        given = request.inputs.add(name="x", datatype="FP32", shape=[1, self.WIDTH])
        given.parameters["shared_memory_region"].string_param = region
        given.parameters["shared_memory_byte_size"].int64_param = self.SIZE
        payload: bytes = request.SerializeToString()
        return payload

    @pytest.mark.parametrize("end", ["answer", "cancel"])
    def test_count_until_the_request_ends(
        self, service: InferenceService, repository: FakeRepository, end: str
    ) -> None:
        backend = backend_of(repository.get("wide"))
        backend.free.clear()
        running, waiting, refused = Response(), Response(), Response()
        service.infer(self.message(), NO_CONTEXT, running)
        assert backend.began.acquire(timeout=PATIENCE_S)
        request = service.infer(self.message(), NO_CONTEXT, waiting)
        assert service.message_memory.num_bytes == 2 * self.SIZE
        assert service.infer(self.message(), NO_CONTEXT, refused) is None
        assert isinstance(refused.exception(0), ResourceExhausted)
        assert service.refusals.snapshot() == {("resource_exhausted", ""): 1}
        if end == "cancel":
            assert request is not None
            request.cancel()
            assert service.message_memory.num_bytes == self.SIZE
        backend.free.set()
        for response in [running] if end == "cancel" else [running, waiting]:
            assert response.result(PATIENCE_S)
        assert service.message_memory.num_bytes == 0

    def test_that_are_refused_do_not_count(self, service: InferenceService) -> None:
        unknown, wrong = Response(), Response()
        assert service.infer(self.message("none"), NO_CONTEXT, unknown) is None
        assert isinstance(unknown.exception(0), ServingError)
        service.infer(self.message().replace(b"wide", b"none"), NO_CONTEXT, wrong)
        assert isinstance(wrong.exception(0), ServingError)
        assert service.message_memory.num_bytes == 0
