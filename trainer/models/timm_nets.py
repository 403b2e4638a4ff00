"""The networks of timm (PyTorch Image Models) by their names, with random weights. timm is an extra."""

from typing import Any

from torch import nn

from trainer.errors import ConfigError, in_one_line, unknown_name
from trainer.models.torchvision_nets import Normalization


def build_timm(name: str, *, num_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """Builds a network of timm. Downloads nothing.

    Args:
        name: timm's name, such as `convnext_tiny`; a tag of weights after a dot changes their normalisation only.

    Raises:
        ConfigError: timm is not installed, there is no such network, or it cannot take such images.
    """
    timm = _timm(name)
    if not timm.is_model(name):
        raise unknown_name("network of timm", name.partition(".")[0], timm.list_models())
    options: dict[str, Any] = {"in_chans": num_channels, "num_classes": num_classes}
    try:
        config = timm.get_pretrained_cfg(name)
        if config is not None and config.fixed_input_size:
            options |= {"img_size": image_size}
        network: nn.Module = timm.create_model(name, pretrained=False, exportable=True, **options)
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"timm:{name} cannot be built for images of {image_size} pixels: {in_one_line(error)}"
        ) from error
    return network


def timm_normalization(name: str) -> Normalization:
    """Returns mean and standard deviation of pixels, 0 to 255, with which timm's published weights were trained."""
    config = _timm(name).get_pretrained_cfg(name)
    mean, std = (config.mean, config.std) if config is not None else ((0.5,) * 3, (0.5,) * 3)
    return tuple(255 * value for value in mean), tuple(255 * value for value in std)


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError:
        raise ConfigError(f"timm:{name} needs timm, which is not installed: pip install timm") from None
    return timm
