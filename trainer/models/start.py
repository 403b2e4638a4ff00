"""The network with which a training starts: built, with weights from a file, a head for the classes, a frozen part.

The networks of other libraries and the user's own are tried on a few black images before the training, so that mistakes
in them are found at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from trainer.errors import ConfigError, TrainerError, in_one_line
from trainer.models import build_network, num_parameters
from trainer.models import efficientnet_lite as lite
from trainer.models.freezing import freeze_until
from trainer.models.head import check_logits, find_head, fit_head, has_gradient, run_once
from trainer.models.own import takes_num_channels
from trainer.models.randomness import NUM_TRIAL_IMAGES, seed_dropouts, train_once
from trainer.models.timm_nets import timm_normalization
from trainer.models.torchvision_nets import IMAGENET_MEAN, IMAGENET_STD, Normalization, torchvision_normalization
from trainer.models.weights import Weights, load_weights, read_weights
from trainer.network_files import has_weights
from trainer.recipes import Recipe
from trainer.user_code import is_reference, user_errors


@dataclass(frozen=True, slots=True, kw_only=True)
class StartingNetwork:
    """A network before the first step.

    Args:
        network: on the CPU.
        num_channels: of the images that it takes: 3 for colour, also where the images at hand are grey.
        normalization: mean and standard deviation of pixels, 0 to 255, for each channel; None: of the images at hand.
        frozen_norms: batch norms that stay in evaluation mode.
        head: the name of the last layer, where the recipe treats it on its own.
    """

    network: nn.Module
    num_channels: int
    normalization: Normalization | None
    frozen_norms: tuple[nn.Module, ...] = ()
    head: str | None = None


def starting_network(
    recipe: Recipe, *, num_channels: int, image_size: int, num_classes: int, log: Callable[[str], None]
) -> StartingNetwork:
    """Builds a recipe's network, with initial weights from torch's global generator or from the recipe's file.

    Args:
        num_channels: of the images at hand.
        log: prints one line for the user.

    Raises:
        ConfigError: the network cannot take such images, or the weights are of another one.
        DataError: the weights cannot be read.
    """
    takes = 3 if num_channels == 1 and _is_for_colour(recipe) else num_channels
    network = build_network(
        recipe.network, num_channels=takes, image_size=image_size, num_classes=num_classes, widths=recipe.widths
    )
    start = StartingNetwork(network=network, num_channels=takes, normalization=_normalization(recipe, takes))
    if recipe.weights is not None:
        start = _with_weights(start, recipe, num_classes, log)
    images = torch.zeros(NUM_TRIAL_IMAGES, takes, image_size, image_size)
    if is_foreign(recipe.network):
        with trial_errors(recipe, image_size):
            start = _adapt(start, recipe, images, num_classes, log)
    if start.num_channels > num_channels:
        log(f"the images are grey, and {recipe.network} takes colours: their channel is repeated")
    if recipe.freeze_until is not None:
        start = _freeze(start, recipe, log)
    if recipe.head_lr != 1 or "head" in recipe.param_groups:
        start = replace(start, head=find_head(network, images[:1].expand(1, start.num_channels, -1, -1)))
    return start


def is_foreign(network: str) -> bool:
    """Returns whether a network is the user's own, torchvision's or timm's."""
    return is_reference(network) or _kind(network) in ("torchvision", "timm")


@contextmanager
def trial_errors(recipe: Recipe, image_size: int) -> Iterator[None]:
    """Context in which a network is tried: its errors become a line that names it, or the user's file and line."""
    try:
        if is_reference(recipe.network):
            with user_errors(recipe.network):
                yield
        else:
            yield
    except TrainerError:
        raise
    except Exception as error:
        reason = in_one_line(error)[:200]
        raise ConfigError(f"{recipe.network} cannot take images of {image_size} pixels: {reason}") from error


def _with_weights(
    start: StartingNetwork, recipe: Recipe, num_classes: int, log: Callable[[str], None]
) -> StartingNetwork:
    assert recipe.weights is not None
    path = Path(recipe.weights)
    weights = read_weights(path)
    own_normalization = _take_normalization(weights)
    log(load_weights(start.network, weights, file=path.name, num_classes=num_classes).describe())
    if own_normalization is None or recipe.pixel_mean:
        return start
    return replace(start, normalization=own_normalization)


def _take_normalization(weights: Weights) -> Normalization | None:
    """Returns the normalisation that a checkpoint of Convoy's holds beside the network, and removes it."""
    if not any(name.startswith("network.") for name in weights) or not {"mean", "deviation"} <= weights.keys():
        return None
    mean, std = weights.pop("mean"), weights.pop("deviation")
    return tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())


def _adapt(
    start: StartingNetwork, recipe: Recipe, images: torch.Tensor, num_classes: int, log: Callable[[str], None]
) -> StartingNetwork:
    """Fits a network that Convoy does not know to the images and classes, and makes its dropout reproducible."""
    network = start.network
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ConfigError(
                f"{recipe.network}: {name} is of {parameter.dtype}: make it float32, as network.float() does"
            )
    if images.size(1) == 1 and is_reference(recipe.network) and not takes_num_channels(recipe.network):
        images = _as_many_channels(network, images)
    replaced = fit_head(network, images, num_classes, name=recipe.network)
    if replaced is not None:
        log(f"{recipe.network}: the last layer ({replaced}) is new, for {num_classes:,} classes")
    if not has_gradient(network, images):
        raise ConfigError(
            f"{recipe.network} cannot be trained: what it returns depends on no parameter, as after detach()"
        )
    # The shape may depend on the number of images.
    check_logits(run_once(network, images[:1]), 1, num_classes, name=recipe.network)
    seed_dropouts(network, images)
    output, draws = train_once(network, images)
    check_logits(output, len(images), num_classes, name=f"in training, {recipe.network}")
    if draws:
        log(
            f"{recipe.network} draws random numbers of its own, so its weights depend on the number of ranks and on "
            "restarts; modules of torch.nn.Dropout would not"
        )
    if images.size(1) == start.num_channels:
        return start
    return replace(start, num_channels=images.size(1), normalization=_normalization(recipe, images.size(1)))


def _as_many_channels(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Returns grey images with one channel or with three, whichever the network takes."""
    try:
        run_once(network, images)
    except Exception:
        colour = images.expand(-1, 3, -1, -1)
        try:
            run_once(network, colour)
        except Exception:
            return images  # the error is about the images as they are
        return colour
    return images


def _freeze(start: StartingNetwork, recipe: Recipe, log: Callable[[str], None]) -> StartingNetwork:
    assert recipe.freeze_until is not None
    norms = freeze_until(start.network, recipe.freeze_until, name=recipe.network)
    trained = sum(each.numel() for each in start.network.parameters() if each.requires_grad)
    log(f"{trained:,} of {num_parameters(start.network):,} parameters are trained: those from {recipe.freeze_until} on")
    return replace(start, frozen_norms=tuple(norms))


def _is_for_colour(recipe: Recipe) -> bool:
    """Returns whether the network takes colour images only: its published weights do, or its code."""
    kind = _kind(recipe.network)
    return kind in ("torchvision", "pretrained") or (kind in ("timm", "efficientnet-lite0") and has_weights(recipe))


def _kind(network: str) -> str:
    """Returns the part of a network's name before its colon, or the whole name, as `build_network` tells them apart."""
    return network.partition(":")[0]


def _normalization(recipe: Recipe, num_channels: int) -> Normalization | None:
    """Returns the normalisation that a recipe gives, or with which its weights were trained."""
    if len(recipe.pixel_mean) != len(recipe.pixel_std):
        raise ConfigError("pixel_mean and pixel_std: give both, or none")
    if recipe.pixel_mean:
        if len(recipe.pixel_mean) != num_channels:
            raise ConfigError(f"pixel_mean {recipe.pixel_mean}: must have {num_channels} values, one for each channel")
        return recipe.pixel_mean, recipe.pixel_std
    kind, _, name = recipe.network.partition(":")
    if kind == "pretrained":
        return torchvision_normalization(name)
    if not has_weights(recipe) or num_channels != 3:
        return None
    match kind:
        case "torchvision":
            return torchvision_normalization(name)
        case "timm":
            return timm_normalization(name)
        case "efficientnet-lite0":
            return lite.MEAN, lite.STD
    return IMAGENET_MEAN, IMAGENET_STD
