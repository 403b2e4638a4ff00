"""Draws an epoch's augmentation parameters: one row for each sample, one group of columns for each operation in use."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainer.data.augment.boxes import draw_crops
from trainer.data.augment.erasing import draw_erased
from trainer.data.augment.mixing import draw_cutmix, draw_mixup
from trainer.data.augment.trivial import draw_trivial
from trainer.data.order import generator
from trainer.recipes.augmentation import Augment


@dataclass(frozen=True, slots=True)
class _Group:
    """Columns that one operation needs.

    Args:
        width: number of columns.
        is_used: whether a recipe's augmentation has the operation.
        draw: makes the columns, float32 `[N, width]`, from (augment, N, seed, epoch).
    """

    width: int
    is_used: Callable[[Augment], bool]
    draw: Callable[[Augment, int, int, int], torch.Tensor]


def draw_params(
    augment: Augment, num_samples: int, seed: int, epoch: int, *, image_size: tuple[int, int] | None = None
) -> torch.Tensor:
    """Draws an epoch's augmentation parameters.

    Args:
        image_size: (height, width) of images that are in memory, which the device crops; None for streamed images,
            which arrive cropped.

    Returns:
        float32 `[num_samples, P]`: mirrored (0 or 1), dx, dy (pixels), angle (radians), scale x, scale y, and then the
        columns of each further operation in use. `split_params` takes them apart.
    """
    columns = [group.draw(augment, num_samples, seed, epoch) for group in _groups(augment).values()]
    if augment.crops and image_size is not None:
        columns.append(draw_crops(augment, torch.tensor(image_size).expand(num_samples, 2), seed, epoch))
    return torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]


def split_params(augment: Augment, params: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the columns by operation in use: always `move`, and `crop` if they were drawn with an image size."""
    widths = {name: group.width for name, group in _groups(augment).items()}
    if params.size(1) > sum(widths.values()):
        widths["crop"] = 4
    return dict(zip(widths, params.split(list(widths.values()), dim=1), strict=True))


def _draw_move(augment: Augment, num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    uniform = torch.rand(num_samples, 5, generator=generator("augment", seed, epoch)) * 2 - 1
    params = torch.empty(num_samples, 6)
    params[:, 0] = _draw_mirrored(augment, num_samples, seed, epoch)
    steps = 2 * augment.shift + 1
    shifts = ((uniform[:, 0:2] + 1) / 2 * steps).floor_().clamp_(max=steps - 1) - augment.shift
    params[:, 1:3] = uniform[:, 0:2] * augment.shift if augment.is_affine else shifts
    params[:, 3] = uniform[:, 2] * augment.rotate_degrees * torch.pi / 180
    params[:, 4:6] = 1 + uniform[:, 3:5] * augment.scale
    return params


def _draw_mirrored(augment: Augment, num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    if augment.flip == "none":
        return torch.zeros(num_samples)
    if augment.flip == "random":
        return torch.randint(2, (num_samples,), generator=generator("flip", seed, epoch)).float()
    first = torch.randint(2, (num_samples,), generator=generator("mirror", seed))
    return (first ^ (epoch % 2)).float()


def _draw_upside_down(augment: Augment, num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randint(2, (num_samples, 1), generator=generator("flip vertical", seed, epoch)).float()


def _draw_jitter(augment: Augment, num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Returns factors of brightness, contrast and saturation, and the turn of the hue."""
    uniform = torch.rand(num_samples, 4, generator=generator("jitter", seed, epoch)) * 2 - 1
    most = torch.tensor([augment.brightness, augment.contrast, augment.saturation, augment.hue])
    return uniform * most + torch.tensor([1.0, 1.0, 1.0, 0.0])


_GROUPS = {
    "move": _Group(6, lambda augment: True, _draw_move),
    "upside_down": _Group(1, lambda augment: augment.flip_vertical != "none", _draw_upside_down),
    "policy": _Group(2, lambda augment: augment.policy != "none", draw_trivial),
    "jitter": _Group(4, lambda augment: augment.jitters, _draw_jitter),
    "erase": _Group(4, lambda augment: augment.erase > 0, draw_erased),
    "mixup": _Group(1, lambda augment: augment.mixes and augment.mixup > 0, draw_mixup),
    "cutmix": _Group(4, lambda augment: augment.mixes and augment.cutmix > 0, draw_cutmix),
}


def _groups(augment: Augment) -> dict[str, _Group]:
    return {name: group for name, group in _GROUPS.items() if group.is_used(augment)}
