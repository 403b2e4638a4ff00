"""The plan cache: requests that differ only in their tensors and ids are parsed and checked once."""

import gc
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

import serving.inference.plan_cache
import serving.inference.service
from protos.grpc_service_pb2 import ModelInferRequest, ModelInferResponse
from serving.errors import ServingError
from serving.inference.plan_cache import PlanCache
from serving.inference.request import NO_CONTEXT
from serving.inference.service import InferenceService
from serving.protocol.grpc_codec import parse_request
from tests.serving.fake_repository import PATIENCE_S, FakeRepository, make_service, twice


class ParsedRequests:
    """Counts the messages that a service parses. Create it before the service."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(serving.inference.service, "parse_request", self._counted)

    def _counted(self, split: Any) -> Any:
        self.count += 1
        return parse_request(split)


class Response(Future[bytes]):
    """A `ResponseSink` whose result can be waited for."""

    def succeed(self, payload: bytes, /) -> None:
        self.set_result(payload)

    def fail(self, error: ServingError) -> None:
        self.set_exception(error)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> ParsedRequests:
    return ParsedRequests(monkeypatch)


@pytest.fixture
def repository() -> Iterator[FakeRepository]:
    repository = FakeRepository(*(twice(version=str(number)) for number in range(1, 7)))
    yield repository
    repository.close()


def message(version: int, *numbers: float, request_id: str = "", note: str = "") -> bytes:
    request = ModelInferRequest(model_name="twice", model_version=str(version), id=request_id)
    request.inputs.add(name="numbers", datatype="FP32", shape=[len(numbers), 3])
    if note:
        request.inputs[0].parameters["note"].string_param = note
    data = np.zeros((len(numbers), 3), np.float32)
    data[:, 0] = numbers
    request.raw_input_contents.append(data.tobytes())
    payload: bytes = request.SerializeToString()
    return payload


def send(service: InferenceService, payload: bytes) -> ModelInferResponse:
    response = Response()
    service.infer(payload, NO_CONTEXT, response)
    return ModelInferResponse.FromString(response.result(PATIENCE_S))


def infer(service: InferenceService, version: int, number: float, **options: str) -> float:
    """Returns twice the number, from this version of the model."""
    response = send(service, message(version, number, **options))
    assert response.model_version == str(version)
    assert response.id == options.get("request_id", "")
    return float(np.frombuffer(response.raw_output_contents[0], np.float32)[0])


def test_requests_with_the_same_header_are_parsed_once(parsed: ParsedRequests, repository: FakeRepository) -> None:
    service = make_service(repository)
    for number in range(5):
        assert [infer(service, version, number) for version in (1, 2, 3, 4)] == [2 * number] * 4
    assert parsed.count == 4


def test_every_request_gets_its_own_id(parsed: ParsedRequests, repository: FakeRepository) -> None:
    service = make_service(repository)
    assert [infer(service, 1, n, request_id=name) for n, name in enumerate(["a", "é" * 90, "", "7"])] == [0, 2, 4, 6]
    assert parsed.count == 1


def test_batches_of_other_sizes_have_plans_of_their_own(parsed: ParsedRequests, repository: FakeRepository) -> None:
    service = make_service(repository)
    for _ in range(2):
        for rows in (1, 3, 8):
            response = send(service, message(1, *range(rows)))
            assert np.frombuffer(response.raw_output_contents[0], np.float32)[::3].tolist() == [
                2 * n for n in range(rows)
            ]
    assert parsed.count == 3


def test_a_replaced_version_empties_the_cache(parsed: ParsedRequests, repository: FakeRepository) -> None:
    service = make_service(repository)
    for version in (1, 2):
        infer(service, version, 1)
    repository.replace(twice(version="2"))
    assert [infer(service, version, 3) for version in (2, 1, 2, 1)] == [6] * 4
    assert parsed.count == 4


def test_the_cache_is_bounded_and_keeps_what_is_used(
    parsed: ParsedRequests, repository: FakeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.inference.plan_cache, "MAX_PLANS", 3)
    service = make_service(repository)
    for version in (1, 2, 3, 1, 4):  # evicts 2, which was used least recently
        infer(service, version, 1)
    assert parsed.count == 4
    assert [infer(service, version, 2) for version in (1, 3, 4)] == [4] * 3
    assert parsed.count == 4
    infer(service, 2, 1)
    assert parsed.count == 5


def test_nothing_that_a_client_sends_is_kept(parsed: ParsedRequests, repository: FakeRepository) -> None:
    """40 answered requests with parameters of 8 MB once pinned 320 MB."""
    service = make_service(repository)
    payload = message(1, 1.0, note="x" * 8_000_000)
    before = sys.getrefcount(payload)
    for _ in range(3):
        send(service, payload)
    assert parsed.count == 3
    for _ in range(100):  # the batcher's thread lets go of its batch just after it has responded
        gc.collect()
        if sys.getrefcount(payload) == before:
            break
    assert sys.getrefcount(payload) == before
    assert all(len(key) < 4096 for key in service._grpc._encoders._plans)  # type: ignore[arg-type]


def test_a_plan_of_an_older_generation_is_not_added(repository: FakeRepository) -> None:
    """Else the newest version's requests would go to an older one until the next change."""
    cache: PlanCache[str] = PlanCache(repository)  # type: ignore[arg-type]
    generation = repository.generation
    repository.replace(twice(version="2"))  # while the plan is made
    cache.add("key", "for the old version", generation)
    assert cache.find("key") is None
    cache.add("key", "for the new version", repository.generation)
    assert cache.find("key") == "for the new version"
    repository.replace(twice(version="2"))
    assert cache.find("key") is None
