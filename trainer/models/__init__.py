"""The networks, one file per family, and what makes a classifier of them.

A network takes normalised float images `[B, C, H, W]` and gives logits `[B, classes]`. `Classifier` puts the
normalisation in front, so that what is trained, saved, exported and served takes the pixels as they are.
"""

import torch
from torch import nn

from trainer.models.airbench import AirbenchNet
from trainer.models.compact import CompactNet
from trainer.models.lecture import LectureNet


def build_network(
    name: str, *, num_channels: int, image_size: int, num_classes: int, widths: tuple[int, ...]
) -> nn.Module:
    """The network of that name, with fresh weights from torch's global generator.

    Raises:
        ConfigError: it cannot take images of this size.
    """
    shape = {"num_channels": num_channels, "image_size": image_size, "num_classes": num_classes}
    match name:
        case "lecture":
            return LectureNet(**shape)
        case "airbench":
            return AirbenchNet(**shape, widths=widths)
        case "compact":
            return CompactNet(**shape, widths=widths)
    raise AssertionError(name)


class Classifier(nn.Module):
    """Pixels in, logits out: `(pixels - mean) / deviation`, then the network.

    Args:
        network: takes normalised images, gives logits.
        mean: float `[C]`, in units of pixels (0 to 255).
        deviation: float `[C]`, likewise.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, network: nn.Module, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1))
        self.register_buffer("deviation", deviation.float().view(1, -1, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits float `[B, classes]` of pixels `[B, C, H, W]`, uint8 or float in 0..255."""
        logits: torch.Tensor = self.network(self.normalize(pixels))
        return logits

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Float32 `[B, C, H, W]`, channels last: mean 0 and deviation 1 over the training set."""
        images = (pixels.float() - self.mean) / self.deviation
        return images.contiguous(memory_format=torch.channels_last)


def num_parameters(model: nn.Module) -> int:
    """How many numbers are learnt (or could be: frozen ones count, buffers do not)."""
    return sum(parameter.numel() for parameter in model.parameters())
