"""Tests of the measurement of forward passes."""

import pytest
import torch

from trainer.models import Classifier, build_network
from trainer.studies.latency import measure, prepare


def test_a_runtime_leaves_the_model_unchanged() -> None:
    network = build_network("lenet5", num_channels=3, image_size=32, num_classes=10, widths=())
    model = Classifier(network, torch.zeros(3), torch.ones(3)).eval()
    before = [parameter.stride() for parameter in model.parameters()]
    prepare("eager", model, 32)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert [parameter.stride() for parameter in model.parameters()] == before


@pytest.mark.parametrize(("seconds", "num_calls"), [(0.0, 1 + 3), (60.0, 3 + 50)], ids=["at-least", "at-most"])
def test_the_number_of_calls_is_limited(seconds: float, num_calls: int) -> None:
    calls: list[None] = []
    assert measure(lambda: calls.append(None), seconds) >= 0
    assert len(calls) == num_calls
