"""Exact means and standard deviations."""

import torch

from trainer.data.statistics import pixel_statistics


def test_they_equal_the_plain_computation() -> None:
    images = torch.randint(0, 256, (5000, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = pixel_statistics(images)
    pixels = images.double().transpose(0, 1).flatten(1)
    assert torch.allclose(torch.tensor(mean).double(), pixels.mean(dim=1))
    assert torch.allclose(torch.tensor(std).double(), pixels.std(dim=1, correction=0))


def test_threads_change_nothing() -> None:
    images = torch.randint(0, 256, (3000, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        results.append(pixel_statistics(images))
    assert results[0] == results[1]


def test_one_value_has_no_deviation() -> None:
    assert pixel_statistics(torch.full((4, 1, 3, 3), 7, dtype=torch.uint8)) == ((7.0,), (0.0,))
