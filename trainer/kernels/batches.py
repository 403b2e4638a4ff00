"""Batches of images by one kernel each: gather with flip, shift and resize, gather with a warp, colours, normalisation.

Import this only where Triton is installed; see `choice`.
"""

import torch

from trainer.kernels import image_kernels as kernels
from trainer.kernels.launch import empty_images, launch, power_of_two

_BLOCK = 1024
_ROWS = 256


def gather_and_shift(
    images: torch.Tensor,
    indices: torch.Tensor,
    params: torch.Tensor,
    upside_down: torch.Tensor | None,
    *,
    fill: str,
    size: int | None,
) -> torch.Tensor:
    """Returns `images[indices]`, flipped, shifted and resized.

    Args:
        images: uint8 `[N, C, H, W]`, contiguous.
        params: float32 `[B, 6]`, a slice of rows of `draw_params`: mirrored, dx, dy in whole pixels, ….
        upside_down: float32 `[B, 1]`, a slice of the same rows; None if images are not flipped vertically.
        fill: `reflect` or `zero`.
        size: of the result in pixels; None for that of the images.

    Returns:
        `[B, C, H, W]`, uint8; float32 in 0..255 with a size.
    """
    _, channels, height, width = images.shape
    out_height, out_width = (height, width) if size is None else (size, size)
    dtype = images.dtype if size is None else torch.float32
    out = torch.empty(len(indices), channels, out_height, out_width, dtype=dtype, device=images.device)
    launch(
        kernels.gather_and_shift,
        _grid(out),
        images,
        indices,
        params,
        params if upside_down is None else upside_down,
        out,
        params.stride(0),
        channels,
        height,
        width,
        out_height,
        out_width,
        RESIZE=size is not None,
        UPSIDE_DOWN=upside_down is not None,
        FILL=fill,
        BLOCK=_BLOCK,
    )
    return out


def gather_and_warp(
    images: torch.Tensor, indices: torch.Tensor, params: torch.Tensor, upside_down: torch.Tensor | None
) -> torch.Tensor:
    """Returns `images[indices]`, flipped, shifted, rotated and scaled, float32 `[B, C, H, W]` in 0..255.

    The arguments are those of `gather_and_shift`.
    """
    out = torch.empty(len(indices), *images.shape[1:], dtype=torch.float32, device=images.device)
    launch(
        kernels.gather_and_warp,
        _grid(out),
        images,
        indices,
        params,
        params if upside_down is None else upside_down,
        out,
        params.stride(0),
        *images.shape[1:],
        UPSIDE_DOWN=upside_down is not None,
        BLOCK=_BLOCK,
    )
    return out


def jitter(
    images: torch.Tensor, params: torch.Tensor, *, brightness: bool, contrast: bool, saturation: bool
) -> torch.Tensor:
    """Returns images with other colours, float32 in 0..255.

    Args:
        images: uint8 or float32 `[B, C, H, W]` in 0..255, contiguous; C is 1 or 3.
        params: float32 `[B, 3]` or wider, a slice of rows: factors of brightness, contrast and saturation.
        brightness: whether this is changed, as for the others.
    """
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    launch(
        kernels.jitter,
        (len(images),),
        images,
        params,
        out,
        params.stride(0),
        images.size(2) * images.size(3),
        CHANNELS=images.size(1),
        BRIGHTNESS=brightness,
        CONTRAST=contrast,
        SATURATION=saturation,
        BLOCK=_BLOCK,
    )
    return out


def normalize(pixels: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Returns `(pixels - mean) / deviation`, channels last.

    Args:
        pixels: uint8 or float32 `[B, C, H, W]`.
        dtype: of the result.
    """
    pixels = pixels.contiguous()
    batch_size, channels, height, width = pixels.shape
    out = empty_images(pixels, height, width, dtype)
    rows = batch_size * height * width
    launch(
        kernels.normalize,
        (-(-rows // _ROWS),),
        pixels,
        mean,
        deviation,
        out,
        rows,
        height * width,
        CHANNELS=channels,
        BC=power_of_two(channels),
        BM=_ROWS,
    )
    return out


def _grid(out: torch.Tensor) -> tuple[int, int]:
    return len(out), -(-out[0].numel() // _BLOCK)
