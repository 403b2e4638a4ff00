"""What is refused or dropped before a model's queue is counted, wherever that happens."""

import threading
from collections.abc import Iterator

import pytest

from serving.errors import Cancelled, Internal, Unavailable
from serving.inference.request import NO_CONTEXT
from serving.inference.service import MAX_QUICK_BYTES, InferenceService
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


def test_a_defect(service: InferenceService, repository: FakeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "get", lambda name, version="": 1 / 0)
    response = Response()
    assert service.infer(message(1, 1), NO_CONTEXT, response) is None
    assert isinstance(response.exception(0), Internal)
    assert service.refusals.snapshot() == {("internal", ""): 1}
