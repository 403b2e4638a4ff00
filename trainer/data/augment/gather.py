"""Gathers a batch from a set of images, and crops, moves and resizes it: on GPUs in one kernel.

Elsewhere each operation is one of torch's. Both give the same whole numbers; interpolated ones differ in rounding.
"""

import torch

from trainer.data.augment.geometry import crop_and_resize, move, resize
from trainer.kernels.choice import is_fusible
from trainer.recipes.augmentation import Augment


def gather(
    augment: Augment, images: torch.Tensor, indices: torch.Tensor, drawn: dict[str, torch.Tensor], size: int | None
) -> torch.Tensor:
    """Returns `images[indices]` cropped, flipped, shifted, rotated, scaled, and resized.

    Args:
        images: uint8 `[N, C, H, W]`.
        drawn: the samples' parameters by operation, from `split_params`.
        size: height and width in pixels of the result; None for those of `images`.

    Returns:
        `[B, C, H, W]`, uint8, or float32 in 0..255 where pixels are interpolated.
    """
    has_kernel = "crop" not in drawn and augment.fill != "edge" and images.dtype == torch.uint8
    if has_kernel and images.is_contiguous() and is_fusible(indices):
        from trainer.kernels import batches

        params, upside_down = drawn["move"], drawn.get("upside_down")
        if not augment.is_affine:
            return batches.gather_and_shift(images, indices, params, upside_down, fill=augment.fill, size=size)
        moved = batches.gather_and_warp(images, indices, params, upside_down)
        return moved if size is None else resize(moved, size)
    batch = images.index_select(0, indices)  # on a CPU ten times as fast as images[indices]
    if "crop" in drawn:
        batch = crop_and_resize(batch.float(), drawn["crop"])
    batch = move(augment, batch, drawn)
    return batch if size is None else resize(batch, size)
