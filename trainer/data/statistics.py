"""Mean and standard deviation of pixels, exact for every number of threads: the sums are of whole numbers."""

import torch

_CHUNK = 2048


def pixel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of each channel of uint8 `[N, C, H, W]`, in pixel units, 0 to 255."""
    num_channels = images.size(1)
    total = torch.zeros(num_channels, dtype=torch.int64)
    squares = torch.zeros(num_channels, dtype=torch.int64)
    for chunk in images.split(_CHUNK):
        pixels = chunk.transpose(0, 1).reshape(num_channels, -1).int()
        total += pixels.sum(dim=1)
        squares += (pixels * pixels).sum(dim=1)
    num_pixels = max(1, images.numel() // num_channels)
    mean = total.double() / num_pixels
    std = (squares.double() / num_pixels - mean**2).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
