"""Tests of the golden batch, for data sets of several sizes."""

import numpy as np
import pytest
import torch

from trainer.data import ImageSet
from trainer.export.golden import golden_images


@pytest.mark.parametrize(
    ("num_classes", "num_images", "expected"), [(2, 100, 16), (10, 500, 16), (20, 500, 20), (100, 500, 64), (3, 7, 7)]
)
def test_the_golden_batch_has_every_class_and_no_image_twice(num_classes: int, num_images: int, expected: int) -> None:
    """The images are sorted by class, as in a folder; the first one is set aside for validation."""
    labels = torch.arange(num_images + 1) * num_classes // (num_images + 1)
    images = torch.arange(num_images + 1, dtype=torch.int32).view(torch.uint8).view(-1, 1, 2, 2)
    golden = golden_images(ImageSet(images, labels), torch.arange(1, num_images + 1))
    indices = golden.view(-1, 4).contiguous().view(torch.int32)[:, 0].tolist()
    assert len(set(indices)) == len(indices) == expected
    assert 0 not in indices
    assert len(np.unique(labels[indices])) == min(num_classes, expected)
