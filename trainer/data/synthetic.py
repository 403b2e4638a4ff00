"""The data set `synthetic`: oriented stripes under noise, for smoke tests.

It is the same on every machine: integer arithmetic does not round, and the streams of NumPy's legacy generator are
frozen (https://numpy.org/neps/nep-0019-rng-policy.html).
"""

import numpy as np
import torch

from trainer.data.content import ImageSet
from trainer.data.published.formats import TrainAndTest

SIZE = 28
NUM_TRAIN = 4_000
NUM_TEST = 1_000
_COSINES = (1000, 951, 809, 588, 309, 0, -309, -588, -809, -951)  # of k * 18 degrees, times 1000
_SINES = (0, 309, 588, 809, 951, 1000, 951, 809, 588, 309)
_WAVELENGTH = 7_000

CLASSES = tuple(f"synthetic stripes at {18 * index} degrees" for index in range(10))


def generate_synthetic() -> TrainAndTest:
    """Generates images, uint8 [N, 1, 28, 28]. A class is a direction; phase, contrast and noise vary."""
    generator = np.random.RandomState(20180210)
    return _generate(NUM_TRAIN, generator), _generate(NUM_TEST, generator)


def _generate(num_samples: int, generator: np.random.RandomState) -> ImageSet:
    labels = np.arange(num_samples, dtype=np.int64) % len(CLASSES)
    across, down = np.arange(SIZE)[None, None, :], np.arange(SIZE)[None, :, None]
    cosines, sines = (np.asarray(table)[labels][:, None, None] for table in (_COSINES, _SINES))
    phase = generator.randint(0, _WAVELENGTH, (num_samples, 1, 1))
    contrast = generator.randint(40, 100, (num_samples, 1, 1))
    wave = (cosines * across + sines * down + phase) % _WAVELENGTH
    stripes = np.abs(2 * wave - _WAVELENGTH) * contrast // _WAVELENGTH  # a triangle wave from 0 to contrast
    noise = generator.randint(0, 120, (num_samples, SIZE, SIZE))
    images = (stripes + noise).astype(np.uint8)
    return ImageSet(torch.from_numpy(images[:, None]), torch.from_numpy(labels))
