"""The results between two log lines."""

import pytest
import torch

from trainer.loop.step_results import LOG_EVERY_STEPS, StepResults


def test_means_are_per_image_and_per_second_since_the_last_line() -> None:
    results = StepResults(torch.device("cpu"), seconds=10.0)
    for step in range(LOG_EVERY_STEPS):
        results.add(step, torch.tensor([50.0, 80.0]), num_images=100)
    assert results.means(seconds=12.0) == pytest.approx((0.5, 0.8, 100 * LOG_EVERY_STEPS / 2.0))
    results.clear(seconds=12.0)
    results.add(LOG_EVERY_STEPS, torch.tensor([10.0, 5.0]), num_images=10)
    assert results.means(seconds=13.0) == pytest.approx((1.0, 0.5, 10.0))


def test_the_first_loss_that_is_not_finite_is_found_with_its_step() -> None:
    results = StepResults(torch.device("cpu"), seconds=0.0)
    for step in range(LOG_EVERY_STEPS, LOG_EVERY_STEPS + 4):
        results.add(step, torch.tensor([1.0, 0.0]), num_images=1)
    assert results.find_not_finite(LOG_EVERY_STEPS + 3) is None
    results.add(LOG_EVERY_STEPS + 4, torch.tensor([float("inf"), 0.0]), num_images=1)
    results.add(LOG_EVERY_STEPS + 5, torch.tensor([float("nan"), 0.0]), num_images=1)
    assert results.find_not_finite(LOG_EVERY_STEPS + 5) == (LOG_EVERY_STEPS + 5, float("inf"))
