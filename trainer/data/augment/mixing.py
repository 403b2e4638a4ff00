"""Mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899), each image with its own weight.

The images of a shard are mixed with the same images in reverse order, so that no image crosses from one rank to another
and, with virtual shards, the pairs do not depend on the number of ranks.
"""

import numpy as np
import torch

from trainer.data.augment.boxes import inside
from trainer.data.order import generator
from trainer.recipes.augmentation import Augment


def draw_mixup(augment: Augment, num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Draws each image's own share of the mixture, float32 `[num_samples, 1]`; 1 for images without mixup."""
    share = _draw_beta(augment.mixup, num_samples, "mixup", seed, epoch)
    is_mixed, is_cut = _draw_kinds(augment, num_samples, seed, epoch)
    return torch.where(is_mixed & ~is_cut, share, 1.0)[:, None]


def draw_cutmix(augment: Augment, num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Draws the rectangles that come from another image.

    The centre is uniform over the image, and what reaches beyond it is cut off, as in the paper.

    Returns:
        float32 `[num_samples, 4]`: top, left, height, width as fractions; zeros for images without CutMix.
    """
    share = _draw_beta(augment.cutmix, num_samples, "cutmix", seed, epoch)
    is_mixed, is_cut = _draw_kinds(augment, num_samples, seed, epoch)
    centre = torch.rand(num_samples, 2, generator=generator("cutmix centre", seed, epoch))
    half = (1 - share).sqrt()[:, None] / 2
    first, last = (centre - half).clamp_(min=0), (centre + half).clamp_(max=1)
    return torch.cat([first, last - first], dim=1).mul_((is_mixed & is_cut)[:, None])


def mix(
    images: torch.Tensor, mixup: torch.Tensor | None, cutmix: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes the images of a shard with the same images in reverse order.

    Args:
        images: `[B, C, H, W]`, uint8 or float32.
        mixup: float32 `[B, 1]`, rows of `draw_mixup`.
        cutmix: float32 `[B, 4]`, rows of `draw_cutmix`.

    Returns:
        The mixed images, float32 after mixup, and each image's own share of its mixture, float32 `[B]`.
    """
    images = images if mixup is None else images.float()
    partners, mixed = images.flip(0), images
    own = torch.ones(len(images), device=images.device)
    if mixup is not None:
        mixed = torch.lerp(partners, images, mixup[:, :, None, None])
        own = mixup[:, 0]
    if cutmix is not None:
        is_cut = inside(cutmix, *images.shape[2:])
        mixed = torch.where(is_cut, partners, mixed)
        own = own * (1 - is_cut.mean(dim=(1, 2, 3), dtype=torch.float32))
    return mixed, own


def _draw_kinds(augment: Augment, num_samples: int, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which images are mixed, and which of them by CutMix, bool `[num_samples]` each."""
    uniform = torch.rand(num_samples, 2, generator=generator("mix", seed, epoch))
    share_of_cutmix = 0.0 if augment.cutmix == 0 else 1.0 if augment.mixup == 0 else 0.5
    return uniform[:, 0] < augment.mix_share, uniform[:, 1] < share_of_cutmix


def _draw_beta(alpha: float, num_samples: int, purpose: str, seed: int, epoch: int) -> torch.Tensor:
    """Draws from Beta(alpha, alpha), float32 `[num_samples]`; torch's own distribution takes no generator."""
    random = np.random.default_rng(generator(purpose, seed, epoch).initial_seed())
    return torch.from_numpy(random.beta(alpha, alpha, num_samples)).float()
