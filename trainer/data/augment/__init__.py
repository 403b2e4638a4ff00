"""Augmentation of whole batches on the device, by random parameters that belong to the sample.

The parameters are a pure function of (seed, epoch, sample): the rank that gets a sample, its batch and the number of
restarts do not change how it is augmented. What may be done to an image is the recipe's `Augment`.

The order is that of torchvision's reference scripts (references/classification: presets.py, then the collate function
of train.py), and timm's, too, for the operations that both have:

1. random resized crop: by the decoder for streamed images, here for images that are in memory;
2. flips, shift, rotation and scale, as one map, so that pixels are interpolated once;
3. the size of the recipe's `resolutions`: shifts are in pixels of the images themselves;
4. the policy (TrivialAugment);
5. colours: brightness, contrast, saturation, hue;
6. erasing: after the colours, whose means would see the erased rectangle;
7. mixing (`mix_batch`): last, as it looks at two images. (timm erases after mixing where a GPU loads the data, and
   before it elsewhere.)

Nothing here waits for a value on a GPU or chooses a shape by one: a CUDA graph can hold all of it.
"""

import torch

from trainer.data.augment.boxes import draw_crops
from trainer.data.augment.colour import jitter
from trainer.data.augment.erasing import erase
from trainer.data.augment.gather import gather
from trainer.data.augment.geometry import resize
from trainer.data.augment.mixing import mix
from trainer.data.augment.params import draw_params, split_params
from trainer.data.augment.trivial import apply_trivial
from trainer.recipes.augmentation import Augment

__all__ = ["augment_batch", "draw_crops", "draw_params", "mix_batch", "resize"]


def augment_batch(
    augment: Augment,
    images: torch.Tensor,
    indices: torch.Tensor,
    augment_params: torch.Tensor,
    size: int | None = None,
) -> torch.Tensor:
    """Returns the augmented batch `images[indices]`, before mixing.

    Args:
        images: uint8 `[N, C, H, W]`, the images into which `indices` point. C is 1 or 3 where colours change.
        indices: int64 `[B]`, on the device of `images`.
        augment_params: float32 `[B, P]`, the rows of `draw_params` that belong to the samples.
        size: height and width in pixels of the augmented images; None for those of `images`.

    Returns:
        `[B, C, H, W]`, uint8, or float32 in 0..255 where an operation computes in floating point.
    """
    drawn = split_params(augment, augment_params)
    batch = gather(augment, images, indices, drawn, size)
    if "policy" in drawn:
        batch = apply_trivial(batch.float(), drawn["policy"], augment.fill)
    if "jitter" in drawn:
        batch = jitter(augment, batch, drawn["jitter"])
    if "erase" in drawn:
        batch = erase(batch, drawn["erase"])
    return batch


def mix_batch(
    augment: Augment, images: torch.Tensor, augment_params: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes each image of an augmented shard with its partner, the image at the same place in the reverse order.

    Args:
        augment: with mixup or CutMix.
        images: `[B, C, H, W]`, from `augment_batch`.
        augment_params: float32 `[B, P]`, the rows of `draw_params` that belong to the samples.

    Returns:
        The mixed images, `[B, C, H, W]`, uint8 or float32, and each image's own share of its mixture, float32 `[B]`.
    """
    drawn = split_params(augment, augment_params)
    return mix(images, drawn.get("mixup"), drawn.get("cutmix"))
