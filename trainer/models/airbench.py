"""The airbench family: small convnets without residual connections, made for short trainings.

Keller Jordan, arXiv 2404.00498. Differences from the paper: the last pooling is a global maximum, which is the same for
32x32 pixels and takes any size from 20 pixels up; the widths of the three stages are free. The paper freezes
the bias of the whitening layer after three epochs, and a recipe after its `whitening_bias_until`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from trainer.kernels.operations import conv_bias_gelu, convolution, global_maximum, norm_activation
from trainer.models.layers import check_image_size, check_widths

MIN_IMAGE_SIZE = 20
"""With a stride of 1."""
_WHITENING_KERNEL = 2


class AirbenchNet(nn.Module):
    """A 2x2 whitening convolution, GELU, three stages of two 3x3 convolutions, global max-pool, linear head.

    With `is_residual` a stage has a third convolution, and a connection past its last two, as the paper's net for 96 %.
    With a stride of 2 the whitening convolution reads patches that do not overlap: images of twice the size take about
    the same time, and each feature sees twice as far.

    Args:
        image_size: height and width in pixels, at least 20 times the stride.
        widths: channels of the stages, such as 64, 256, 256.
        stride: of the whitening convolution, 1 or 2.

    Raises:
        ConfigError: the images are too small, or the widths are impossible.
    """

    suits_kernels = True
    """Weights are used in their layers alone, so that a step may cast them together; a forward pass keeps no state."""

    def __init__(
        self,
        *,
        num_channels: int,
        image_size: int,
        num_classes: int,
        widths: tuple[int, ...],
        is_residual: bool = False,
        stride: int = 1,
    ) -> None:
        super().__init__()
        check_image_size("the airbench net", image_size, MIN_IMAGE_SIZE * stride)
        check_widths("the airbench net", widths, (64, 256, 256), any_number=True)
        num_filters = 2 * num_channels * _WHITENING_KERNEL**2
        self.whiten = nn.Conv2d(num_channels, num_filters, _WHITENING_KERNEL, stride=stride)
        self.whiten.weight.requires_grad_(False)
        self.whiten.bias = nn.Parameter(torch.zeros(num_filters))
        pairs = zip((num_filters, *widths[:-1]), widths, strict=True)
        stage = _ResidualStage if is_residual else _Stage
        self.stages = nn.Sequential(*(stage(in_channels, width) for in_channels, width in pairs))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            self.head.weight /= self.head.weight.std()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, num_classes]` of normalised images `[B, num_channels, image_size, image_size]`."""
        features = global_maximum(self.stages(conv_bias_gelu(images, self.whiten)), is_training=self.training)
        logits: torch.Tensor = self.head(features) / self.head.in_features
        return logits

    @torch.no_grad()
    def init_whitening(self, images: torch.Tensor) -> None:
        """Sets the first layer so that its outputs over the patches of `images` are uncorrelated, with variance 1.

        Args:
            images: normalised, float32 `[N, C, H, W]`; a few thousand are enough.
        """
        patches = F.unfold(images, _WHITENING_KERNEL).transpose(1, 2).flatten(0, 1)
        # On the CPU: a GPU's solver takes longer for so small a matrix.
        values, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).double().cpu())
        filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(-1, *self.whiten.weight.shape[1:])
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


def whitening_bias(network: nn.Module) -> nn.Parameter | None:
    """Returns the bias of an airbench network's whitening layer, unless it is frozen from the start."""
    bias = network.whiten.bias if isinstance(network, AirbenchNet) else None
    return bias if isinstance(bias, nn.Parameter) and bias.requires_grad else None


class _Stage(nn.Module):
    """conv, max-pool 2, norm, GELU, conv, norm, GELU."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(in_channels, width), _norm(width)
        self.conv2, self.norm2 = _conv(width, width), _norm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = norm_activation(convolution(x, self.conv1), self.norm1, "gelu", pool=2)
        return norm_activation(self.conv2(x), self.norm2, "gelu")


class _ResidualStage(_Stage):
    """conv, max-pool 2, norm, GELU, conv, norm, GELU, conv, norm, the output of the first GELU added, GELU."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(in_channels, width)
        self.conv3, self.norm3 = _conv(width, width), _norm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = norm_activation(convolution(x, self.conv1), self.norm1, "gelu", pool=2)
        x = norm_activation(self.conv2(first), self.norm2, "gelu")
        return norm_activation(self.conv3(x), self.norm3, "gelu", residual=first)


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Returns a convolution whose first output channels are initialised with the identity."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:in_channels])
    return conv


def _norm(width: int) -> nn.BatchNorm2d:
    # torch's momentum is 1 minus the paper's. It is large, so that statistics settle within a short training.
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm
