"""The classification networks of torchvision by their names, with random weights. torchvision is imported by a call."""

from typing import Any

from torch import nn

from trainer.errors import ConfigError, in_one_line, unknown_name

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel's pixels, 0 to 255."""
IMAGENET_MEAN = (123.675, 116.28, 103.53)
"""Of pixels from 0 to 255, by which nearly all published networks were trained."""
IMAGENET_STD = (58.395, 57.12, 57.375)


def build_torchvision(name: str, *, image_size: int, num_classes: int) -> nn.Module:
    """Builds a network for colour images, without auxiliary heads.

    Args:
        name: torchvision's name, such as `convnext_tiny`.
        image_size: height and width in pixels, for the networks whose weights depend on it.
        num_classes: number of logits.

    Raises:
        ConfigError: there is no such network, or it cannot take images of this size.
    """
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise unknown_name("network of torchvision", name, names)
    options: dict[str, Any] = {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    if name.startswith("vit_"):
        options |= {"image_size": image_size}
    if name.startswith("maxvit"):
        options |= {"input_size": (image_size, image_size)}
    try:
        network: nn.Module = models.get_model(name, weights=None, **options)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"torchvision:{name} cannot take images of {image_size} pixels: {in_one_line(error)}"
        ) from error
    return network


def torchvision_normalization(name: str) -> Normalization:
    """Returns mean and standard deviation of pixels, 0 to 255, with which torchvision's own weights were trained."""
    from torchvision import models

    if name in ("googlenet", "inception_v3"):  # ported from TensorFlow: torchvision's own have pixels from -1 to 1
        return (127.5,) * 3, (127.5,) * 3
    preset = next(iter(models.get_model_weights(name))).transforms()
    return tuple(255 * value for value in preset.mean), tuple(255 * value for value in preset.std)
