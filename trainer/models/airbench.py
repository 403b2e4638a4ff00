"""The airbench family of small residual-free convnets (Keller Jordan, arXiv 2404.00498), made for short trainings.

What differs from the paper: the last pooling is a global maximum, so that images of any size from 20 pixels up are
taken (the same for 32 pixels), the widths of the three stages are free, and the bias of the whitening learns to the
end of the run, where the paper's is frozen after three epochs.
"""

import torch
import torch.nn.functional as F
from torch import nn

from trainer.errors import ConfigError

MIN_IMAGE_SIZE = 20
_WHITENING_KERNEL = 2


class AirbenchNet(nn.Module):
    """Whitening conv 2x2, GELU, three stages of two 3x3 convs, global max-pool, linear head.

    Args:
        num_channels: of the images.
        image_size: height and width in pixels, at least 20.
        num_classes: logits.
        widths: channels of the three stages.

    Raises:
        ConfigError: the images are too small.
    """

    def __init__(self, *, num_channels: int, image_size: int, num_classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        if image_size < MIN_IMAGE_SIZE:
            raise ConfigError(
                f"the airbench net takes images of at least {MIN_IMAGE_SIZE} x {MIN_IMAGE_SIZE} pixels, "
                f"not {image_size} x {image_size}"
            )
        whitened = 2 * num_channels * _WHITENING_KERNEL**2
        self.whiten = nn.Conv2d(num_channels, whitened, _WHITENING_KERNEL)
        self.whiten.weight.requires_grad_(False)
        self.whiten.bias = nn.Parameter(torch.zeros(whitened))
        inputs = (whitened, *widths[:-1])
        self.stages = nn.Sequential(*(_Stage(before, width) for before, width in zip(inputs, widths, strict=True)))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            self.head.weight /= self.head.weight.std()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[B, num_classes]` of normalised images `[B, num_channels, image_size, image_size]`."""
        features = self.stages(F.gelu(self.whiten(images))).amax(dim=(2, 3))
        logits: torch.Tensor = self.head(features) / self.head.in_features
        return logits

    @torch.no_grad()
    def fit_whitening(self, images: torch.Tensor) -> None:
        """Fix the first layer so that its outputs over the patches of `images` are uncorrelated, with variance 1.

        Args:
            images: normalised, float32 `[N, C, H, W]`; a few thousand are enough.
        """
        patches = F.unfold(images, _WHITENING_KERNEL).transpose(1, 2).flatten(0, 1)
        values, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).double())
        filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(-1, *self.whiten.weight.shape[1:])
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


class _Stage(nn.Module):
    """conv, max-pool 2, norm, GELU, conv, norm, GELU; the convolutions begin as the identity where they can."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, width), _norm(width)
        self.conv2, self.norm2 = _conv(width, width), _norm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), kernel_size=2)))
        return F.gelu(self.norm2(self.conv2(x)))


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:inputs])
    return conv


def _norm(width: int) -> nn.BatchNorm2d:
    # torch's momentum is 1 minus the paper's: fast statistics for short trainings. The scale stays 1.
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm
