"""Outputs of a batch: what is too large for a response is refused before it is copied."""

import numpy as np
import pytest

from serving.errors import ResourceExhausted
from serving.inference.outputs import Outputs
from serving.inference.plan import Plan, ValueEncoder
from serving.inference.request import InferInput, InferRequest, RequestedOutput
from serving.protocol.grpc_codec import ResponseEncoder
from tests.serving.fake_repository import FakeRepository, twice

HUGE = np.broadcast_to(np.float32(1), (4, 1 << 28))  # 4 GiB that take 4 bytes
SMALL = np.ones((4, 1), np.float32)


@pytest.mark.parametrize("encoder", [ResponseEncoder, ValueEncoder])
@pytest.mark.parametrize(
    ("rows", "outputs", "size"),
    [(4, [], 4 * 2**30 + 16), (2, [], 2 * 2**30 + 8), (3, ["twice"], 3 * 2**30)],
)
def test_a_response_that_would_be_too_large_is_refused(encoder, rows: int, outputs: list[str], size: int) -> None:
    repository = FakeRepository(twice())
    requested = [RequestedOutput(name) for name in outputs]
    request = InferRequest("twice", [InferInput("numbers", "FP32", (rows, 3), bytes(12 * rows))], outputs=requested)
    plan = Plan(repository.get("twice"), request)
    with pytest.raises(ResourceExhausted, match=rf"would have {size} bytes, but at most 2146435071 fit .* fewer rows"):
        encoder(plan).encode(Outputs([HUGE, SMALL], 4), 0, "")
    repository.close()


def test_only_the_requested_outputs_and_rows_count() -> None:
    outputs = Outputs([HUGE, SMALL], 4)
    assert outputs.is_large
    outputs.check_size([1], 4)
    outputs.check_size([0, 1], 1)
    assert not Outputs([SMALL, SMALL], 4).is_large
