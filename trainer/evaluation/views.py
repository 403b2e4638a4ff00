"""Test-time views: shifted or mirrored copies of an image, whose logits are averaged.

A headline accuracy is of one view, as the exported model computes it. A recipe with several views has a second figure.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from trainer.recipes import TestTimeViews

NUM_VIEWS: dict[TestTimeViews, int] = {"one": 1, "shifted": 5, "mirrored": 2, "mirrored-and-shifted": 6}
"""The number of views that each kind of `TestTimeViews` averages."""


def is_headline_averaged(views: TestTimeViews, with_views: float | None) -> bool:
    """Returns whether a recorded headline averages several views, as version 0.1 computed it.

    Args:
        views: the recipe's.
        with_views: the record's second figure, of accuracy or errors; None if it has none.
    """
    return views != "one" and with_views is None


def describe_with_views(num_errors: int | None, num_images: int, views: TestTimeViews) -> str:
    """Returns text to follow an accuracy of one view: the one with views, or nothing if `num_errors` is None."""
    if num_errors is None or num_images == 0:
        return ""
    accuracy = 100 * (1 - num_errors / num_images)
    return f", {accuracy:.2f} % with {NUM_VIEWS[views]} views of each image ({num_errors:,} wrong)"


def average_views(
    model: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, views: TestTimeViews
) -> torch.Tensor:
    """Returns the weighted mean of a model's logits over views of each image.

    `shifted` weights the image itself twice and each copy shifted by a pixel up, down, left and right once.
    `mirrored` adds the mirror image. `mirrored-and-shifted` gives half of the weight to the image and its mirror
    image, and half to both of them shifted by a pixel up-left and down-right (airbench, arXiv 2404.00498).

    Args:
        pixels: uint8 `[B, C, H, W]`.

    Returns:
        Logits, float32 `[B, classes]`.
    """
    if views == "one":
        return model(pixels).float()
    if views == "mirrored":
        return (model(pixels).float() + model(pixels.flip(-1)).float()) / 2
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels.float(), (1, 1, 1, 1), mode="reflect")

    def shifted(y: int, x: int, views: TestTimeViews) -> torch.Tensor:
        return average_views(model, padded[..., y : y + height, x : x + width], views)

    if views == "shifted":
        neighbours = [shifted(y, x, "one") for y, x in ((0, 1), (2, 1), (1, 0), (1, 2))]
        return (2 * model(pixels).float() + sum(neighbours)) / 6
    corners = shifted(0, 0, "mirrored") + shifted(2, 2, "mirrored")
    return average_views(model, pixels, "mirrored") / 2 + corners / 4
