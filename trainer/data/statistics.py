"""Mean and standard deviation of pixels, exact for every number of threads: the sums are of whole numbers."""

import torch

_CHUNK_BYTES = 1 << 23
"""Pixels are widened to int32 twice."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and population standard deviation of each channel, in pixel units, 0 to 255."""


class PixelSums:
    """Sums over the pixels of each channel."""

    def __init__(self, num_channels: int) -> None:
        self._total = torch.zeros(num_channels, dtype=torch.int64)
        self._squares = torch.zeros(num_channels, dtype=torch.int64)
        self._num_pixels = 0

    def add(self, images: torch.Tensor) -> None:
        """Adds images, uint8 `[B, C, H, W]`."""
        pixels = images.transpose(0, 1).reshape(images.size(1), -1).int()
        self._total += pixels.sum(dim=1)
        self._squares += (pixels * pixels).sum(dim=1)
        self._num_pixels += pixels.size(1)

    def result(self) -> Statistics:
        num_pixels = max(1, self._num_pixels)
        mean = self._total.double() / num_pixels
        std = (self._squares.double() / num_pixels - mean**2).clamp(min=0).sqrt()
        return tuple(mean.tolist()), tuple(std.tolist())


def pixel_statistics(images: torch.Tensor) -> Statistics:
    """Returns the mean and standard deviation of each channel of images, uint8 `[N, C, H, W]`."""
    sums = PixelSums(images.size(1))
    for chunk in images.split(max(1, _CHUNK_BYTES // max(1, images[:1].numel()))):
        sums.add(chunk)
    return sums.result()
