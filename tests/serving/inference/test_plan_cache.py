"""The plan cache: requests that differ from an earlier one only in their tensor's bytes are not parsed again."""

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

import serving.inference.service
from protos.grpc_service_pb2 import ModelInferRequest, ModelInferResponse
from serving.errors import ServingError
from serving.inference.service import InferenceService
from serving.protocol.grpc_codec import decode
from tests.serving.fake_repository import PATIENCE_S, FakeRepository, make_service, twice


class ParsedRequests:
    """Counts the messages that the service parses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(serving.inference.service, "decode", self._counted)

    def _counted(self, kind: Any, payload: bytes) -> Any:
        self.count += 1
        return decode(kind, payload)


class Response(Future[bytes]):
    """A `ResponseSink` whose result can be waited for."""

    def succeed(self, payload: bytes) -> None:
        self.set_result(payload)

    def fail(self, error: ServingError) -> None:
        self.set_exception(error)


@pytest.fixture
def repository() -> Iterator[FakeRepository]:
    repository = FakeRepository(*(twice(version=str(number)) for number in range(1, 7)))
    yield repository
    repository.close()


def infer(service: InferenceService, version: int, number: float) -> float:
    """Returns twice the number, from this version of the model. All requests have the same length."""
    request = ModelInferRequest(model_name="twice", model_version=str(version))
    request.inputs.add(name="numbers", datatype="FP32", shape=[1, 3])
    request.raw_input_contents.append(np.array([number, 0, 0], np.float32).tobytes())
    response = Response()
    service.infer(request.SerializeToString(), response, None)
    message = ModelInferResponse.FromString(response.result(PATIENCE_S))
    assert message.model_version == str(version)
    return float(np.frombuffer(message.raw_output_contents[0], np.float32)[0])


def test_requests_of_the_same_length_do_not_evict_each_other(
    repository: FakeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, parsed = make_service(repository), ParsedRequests(monkeypatch)
    for number in range(5):
        assert [infer(service, version, number) for version in (1, 2, 3, 4)] == [2 * number] * 4
    assert parsed.count == 4


def test_the_latest_requests_of_a_length_stay_in_the_cache(
    repository: FakeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, parsed = make_service(repository), ParsedRequests(monkeypatch)
    for version in (1, 2, 3, 4, 5, 6):
        infer(service, version, 1)
    assert [infer(service, version, 2) for version in (3, 4, 5, 6)] == [4] * 4
    assert parsed.count == 6


def test_a_replaced_version_empties_the_cache(repository: FakeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    service, parsed = make_service(repository), ParsedRequests(monkeypatch)
    for version in (1, 2):
        infer(service, version, 1)
    repository.replace(twice(version="2"))
    assert [infer(service, version, 3) for version in (2, 1, 2, 1)] == [6] * 4
    assert parsed.count == 4
