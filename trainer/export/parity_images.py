"""The images of the parity check: those on which exported files are compared with the trained model."""

import hashlib
from collections.abc import Iterator

import torch

from trainer.data import Images
from trainer.export.repository import largest_batch


class ParityImages:
    """All validation images, then training images up to a number in all.

    It holds no test images, and reads images a batch at a time. The first N images are a random sample for every N,
    although folders of images are sorted by class: validation images are in the order of their digests, and training
    images are shuffled.

    Args:
        validation: the images, and the indices of those that are set aside for validation.
        training: the images, and the indices of those that the model was trained on.
        size: number of images in all; more if there are more validation images.
    """

    def __init__(
        self, validation: tuple[Images, torch.Tensor], training: tuple[Images, torch.Tensor], size: int
    ) -> None:
        validation_indices, self.validation_sha256 = _ordered(*validation)
        training_indices = _spread(training[1], size - len(validation_indices))
        self._parts = (("validation", validation[0], validation_indices), ("training", training[0], training_indices))
        self.num_validation = len(validation_indices)
        self.labels = torch.cat([images.labels[indices] for _, images, indices in self._parts]).numpy()
        """Int64 `[N]`, validation images first."""

        self.largest_batch = largest_batch(training[0].shape)
        """Number of images."""

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, num_images: int) -> Iterator[torch.Tensor]:
        """Yields the first `num_images` images, uint8 `[size, C, H, W]`; the last batch may be smaller."""
        for start in range(0, num_images, size):
            yield torch.cat(list(self._slices(start, min(start + size, num_images))))

    def describe(self, position: int) -> str:
        """Returns, for example, `training image 123`, where 123 is the image's index in the data set."""
        for name, _, indices in self._parts:
            if position < len(indices):
                return f"{name} image {int(indices[position])}"
            position -= len(indices)
        raise IndexError(position)

    def _slices(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        for _, images, indices in self._parts:
            yield images.take(indices[max(0, start) : max(0, stop)])
            start, stop = start - len(indices), stop - len(indices)


def _ordered(images: Images, indices: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Returns the indices in the order of their images' digests, and a SHA-256 of these images with their labels."""
    digests = images.digests(indices)
    labels = images.labels[indices].tolist()
    order = sorted(range(len(digests)), key=lambda position: (digests[position], labels[position]))
    digest = hashlib.sha256(str(list(images.shape)).encode())
    for position in order:
        digest.update(digests[position] + labels[position].to_bytes(8, "little"))
    return indices[torch.tensor(order, dtype=torch.long)], digest.hexdigest()


def _spread(indices: torch.Tensor, number: int) -> torch.Tensor:
    """Returns that many evenly spread indices, or all if there are fewer, shuffled."""
    number = min(len(indices), max(0, number))
    spread = torch.linspace(0, len(indices) - 1, number).long()
    return indices[spread[torch.randperm(number, generator=torch.Generator().manual_seed(0))]]
