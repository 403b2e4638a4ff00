"""The networks, one file per family, and what makes a classifier of them.

A network takes normalised float images `[B, C, H, W]` and gives logits `[B, classes]`. `Classifier` puts the
normalisation in front, so that what is trained, saved, exported and served takes the pixels as they are.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from trainer.models.airbench import AirbenchNet
from trainer.models.alexnet import AlexNet
from trainer.models.compact import CompactNet
from trainer.models.googlenet import GoogLeNet
from trainer.models.lecture import LectureNet
from trainer.models.lenet import LeNet5
from trainer.models.nin import BatchNormNin
from trainer.models.originals import build_pretrained
from trainer.models.resnet import ResNet
from trainer.models.vgg import Vgg
from trainer.recipes import PRETRAINED_PREFIX

_FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "lecture": LectureNet,
    "lenet5": LeNet5,
    "alexnet": partial(AlexNet, batch_norm=False),
    "bn-alexnet": partial(AlexNet, batch_norm=True),
    "bn-nin": BatchNormNin,
    "vgg16": partial(Vgg, depth=16),
    "vgg19": partial(Vgg, depth=19),
    "googlenet": GoogLeNet,
    "resnet18": partial(ResNet, depth=18),
    "resnet34": partial(ResNet, depth=34),
    "resnet50": partial(ResNet, depth=50),
    "resnet101": partial(ResNet, depth=101),
    "resnet152": partial(ResNet, depth=152),
}
"""Networks of fixed widths."""


def build_network(
    name: str, *, num_channels: int, image_size: int, num_classes: int, widths: tuple[int, ...]
) -> nn.Module:
    """The network of that name, with fresh weights from torch's global generator.

    Raises:
        ConfigError: it cannot take images of this size.
        DataError: its published weights cannot be fetched.
    """
    shape = {"num_channels": num_channels, "image_size": image_size, "num_classes": num_classes}
    if name in _FAMILIES:
        return _FAMILIES[name](**shape)
    if name.startswith(PRETRAINED_PREFIX):
        return build_pretrained(name.removeprefix(PRETRAINED_PREFIX), **shape)
    match name:
        case "airbench":
            return AirbenchNet(**shape, widths=widths)
        case "compact":
            return CompactNet(**shape, widths=widths)
    raise AssertionError(name)


class Classifier(nn.Module):
    """Pixels in, logits out: `(pixels - mean) / std`, then the network.

    Args:
        network: takes normalised images, gives logits.
        mean: float `[C]`, in units of pixels (0 to 255).
        std: float `[C]`, likewise.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, network: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1))
        # The state dict, and with it each checkpoint and `weights_sha256`, has `std` under this name.
        self.register_buffer("deviation", std.float().view(1, -1, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits float `[B, classes]` of pixels `[B, C, H, W]`, uint8 or float in 0..255."""
        logits: torch.Tensor = self.network(self.normalize(pixels))
        return logits

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Float32 `[B, C, H, W]`, channels last: mean 0 and standard deviation 1 over the training set."""
        images = (pixels.float() - self.mean) / self.deviation
        return images.contiguous(memory_format=torch.channels_last)


def num_parameters(model: nn.Module) -> int:
    """How many numbers are learnt (or could be: frozen ones count, buffers do not)."""
    return sum(parameter.numel() for parameter in model.parameters())
