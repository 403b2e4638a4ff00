"""What the service recognises: requests that differ from an earlier one in their tensor's bytes alone."""

from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest

import serving.inference.service
from protos.grpc_service_pb2 import ModelInferRequest, ModelInferResponse
from serving.errors import ServingError
from serving.inference.service import Service
from tests.serving.fake_repository import PATIENCE_S, FakeRepository, make_service, twice


class Parses:
    """How many messages the service has parsed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._decode = serving.inference.service.decode_request
        monkeypatch.setattr(serving.inference.service, "decode_request", self._counted)

    def _counted(self, payload: bytes) -> ModelInferRequest:
        self.count += 1
        return self._decode(payload)


class Answer(Future[bytes]):
    """A call whose answer can be waited for."""

    def succeed(self, payload: bytes) -> None:
        self.set_result(payload)

    def fail(self, error: ServingError) -> None:
        self.set_exception(error)


@pytest.fixture
def repository() -> Iterator[FakeRepository]:
    repository = FakeRepository(*(twice(version=str(number)) for number in range(1, 7)))
    yield repository
    repository.close()


def ask(service: Service, version: int, number: float) -> float:
    """Twice the number, by a version of the model; all these messages are of one length."""
    request = ModelInferRequest(model_name="twice", model_version=str(version))
    request.inputs.add(name="numbers", datatype="FP32", shape=[1, 3])
    request.raw_input_contents.append(np.array([number, 0, 0], np.float32).tobytes())
    answer = Answer()
    service.infer(request.SerializeToString(), answer, None)
    response = ModelInferResponse.FromString(answer.result(PATIENCE_S))
    assert response.model_version == str(version)
    return float(np.frombuffer(response.raw_output_contents[0], np.float32)[0])


def test_clients_whose_messages_have_one_length_do_not_push_each_other_out(
    repository: FakeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, parses = make_service(repository), Parses(monkeypatch)
    for number in range(5):
        assert [ask(service, version, number) for version in (1, 2, 3, 4)] == [2 * number] * 4
    assert parses.count == 4


def test_of_too_many_the_latest_are_recognised(repository: FakeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    service, parses = make_service(repository), Parses(monkeypatch)
    for version in (1, 2, 3, 4, 5, 6):
        ask(service, version, 1)
    assert [ask(service, version, 2) for version in (3, 4, 5, 6)] == [4] * 4
    assert parses.count == 6


def test_what_is_recognised_ends_with_its_version(repository: FakeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    service, parses = make_service(repository), Parses(monkeypatch)
    for version in (1, 2):
        ask(service, version, 1)
    repository.replace(twice(version="2"))
    assert [ask(service, version, 3) for version in (2, 1, 2, 1)] == [6] * 4
    assert parses.count == 4
