"""The networks, one file per family, and `Classifier`, which adds the normalisation of pixels.

A network maps normalised float images `[B, C, H, W]` to logits `[B, classes]`. A classifier maps pixels to logits: the
model that is trained, saved, exported and served therefore takes pixels as they are.
"""

from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import nn

from trainer.errors import unknown_name
from trainer.kernels.operations import normalize
from trainer.models.airbench import AirbenchNet
from trainer.models.alexnet import AlexNet
from trainer.models.compact import CompactNet
from trainer.models.efficientnet_lite import EfficientNetLite0
from trainer.models.googlenet import GoogLeNet
from trainer.models.lecture import LectureNet
from trainer.models.lenet import LeNet5
from trainer.models.nin import BatchNormNin
from trainer.models.own import build_own
from trainer.models.pretrained import build_pretrained
from trainer.models.resnet import ResNet
from trainer.models.timm_nets import build_timm
from trainer.models.torchvision_nets import build_torchvision
from trainer.models.vgg import Vgg
from trainer.user_code import is_reference

_FIXED_WIDTH_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "lecture": LectureNet,
    "lenet5": LeNet5,
    "alexnet": partial(AlexNet, batch_norm=False),
    "bn-alexnet": partial(AlexNet, batch_norm=True),
    "bn-nin": BatchNormNin,
    "vgg16": partial(Vgg, depth=16),
    "vgg19": partial(Vgg, depth=19),
    "googlenet": GoogLeNet,
    "efficientnet-lite0": EfficientNetLite0,
    "resnet18": partial(ResNet, depth=18),
    "resnet34": partial(ResNet, depth=34),
    "resnet50": partial(ResNet, depth=50),
    "resnet101": partial(ResNet, depth=101),
    "resnet152": partial(ResNet, depth=152),
}
"""Networks whose widths a recipe cannot choose."""
_NETWORKS_WITH_WIDTHS: dict[str, Callable[..., nn.Module]] = {
    "airbench": AirbenchNet,
    "airbench-residual": partial(AirbenchNet, is_residual=True),
    "airbench-strided": partial(AirbenchNet, stride=2),
    "compact": CompactNet,
}


def build_network(
    name: str, *, num_channels: int, image_size: int, num_classes: int, widths: tuple[int, ...]
) -> nn.Module:
    """Builds a network with initial weights from torch's global generator.

    Args:
        name: such as `resnet18`; `torchvision:NAME` or `timm:NAME`, one of their networks; `pretrained:NAME`, one of
            torchvision's with its published weights; `FILE.py:NAME`, the user's own.
        num_channels: channels of the images.
        image_size: height and width in pixels.
        num_classes: number of logits.
        widths: channels of the layers, for the `airbench` networks and `compact` alone.

    Raises:
        ConfigError: there is no such network, or it cannot take images of this size.
        DataError: the published weights cannot be fetched.
    """
    shape = {"num_channels": num_channels, "image_size": image_size, "num_classes": num_classes}
    if name in _FIXED_WIDTH_NETWORKS:
        return _FIXED_WIDTH_NETWORKS[name](**shape)
    if name in _NETWORKS_WITH_WIDTHS:
        return _NETWORKS_WITH_WIDTHS[name](**shape, widths=widths)
    if is_reference(name):
        return build_own(name, **shape)
    match name.partition(":"):
        case "pretrained", _, theirs:
            return build_pretrained(theirs, **shape)
        case "torchvision", _, theirs:
            return build_torchvision(theirs, image_size=image_size, num_classes=num_classes)
        case "timm", _, theirs:
            return build_timm(theirs, **shape)
    raise unknown_name("network", name, [*_FIXED_WIDTH_NETWORKS, *_NETWORKS_WITH_WIDTHS])


class Classifier(nn.Module):
    """Maps pixels to logits: computes `(pixels - mean) / std`, then the network.

    Args:
        network: maps normalised images to logits.
        mean: float `[C]`, in pixel units (0 to 255).
        std: float `[C]`, in pixel units.
        num_channels: channels of the pixels; C if None. Where it is 1 and C is 3, the grey channel is repeated.
        frozen_norms: batch norms of the network that stay in evaluation mode, whatever the mode of the rest.
        head: the name of the network's last layer, if the optimizer treats it on its own.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: torch.Tensor,
        std: torch.Tensor,
        *,
        num_channels: int | None = None,
        frozen_norms: tuple[nn.Module, ...] = (),
        head: str | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.num_channels = num_channels or mean.numel()
        self.head = head
        self._frozen_norms = frozen_norms
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1))
        # The state dict, and with it each checkpoint and `weights_sha256`, has `std` under this name.
        self.register_buffer("deviation", std.float().view(1, -1, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns logits, float `[B, classes]`, of pixels `[B, C, H, W]`, uint8 or float from 0 to 255."""
        logits: torch.Tensor = self.network(self._inputs(pixels))
        return logits

    def _inputs(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns normalised images; on GPUs in training by a kernel, in the type of the first convolution."""
        if not self.training or not getattr(self.network, "suits_kernels", False):
            return self.normalize(pixels)
        images = normalize(pixels, self.mean, self.deviation)
        return self.normalize(pixels) if images is None else images

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the network, but for its frozen batch norms."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns float32 `[B, C, H, W]`, channels last: `(pixels - mean) / std`, which repeats a grey channel."""
        images = (pixels.float() - self.mean) / self.deviation
        return images.contiguous(memory_format=torch.channels_last)


def num_parameters(model: nn.Module) -> int:
    """Returns the number of parameters, frozen ones included; buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())
