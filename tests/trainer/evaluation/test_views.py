"""The average over views, against the same sum written out."""

import torch
import torch.nn.functional as F

from trainer.evaluation.views import (
    NUM_VIEWS,
    TestTimeViews,
    average_views,
    describe_with_views,
    is_headline_averaged,
)


def _first_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """A linear model, float32 `[B, 7]`."""
    return pixels.float().flatten(1)[:, :7]


def test_views_are_averaged_with_their_weights() -> None:
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = _first_pixels
    mirrored = (model(pixels) + model(pixels.flip(-1))) / 2
    assert torch.allclose(average_views(model, pixels, "one"), model(pixels))
    assert torch.allclose(average_views(model, pixels, "mirrored"), mirrored)
    padded = F.pad(pixels.float(), (1, 1, 1, 1), mode="reflect")
    near = [padded[..., :8, 1:9], padded[..., 2:, 1:9], padded[..., 1:9, :8], padded[..., 1:9, 2:]]
    weighted = (2 * model(pixels) + sum(map(model, near))) / 6
    assert torch.allclose(average_views(model, pixels, "shifted"), weighted)
    corners = [padded[..., :8, :8], padded[..., 2:, 2:]]
    shifted = sum((model(corner) + model(corner.flip(-1))) / 2 for corner in corners) / 2
    assert torch.allclose(average_views(model, pixels, "mirrored-and-shifted"), (mirrored + shifted) / 2)


def test_the_number_of_views_is_that_of_the_models_calls() -> None:
    pixels = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    kinds: tuple[TestTimeViews, ...] = ("one", "shifted", "mirrored", "mirrored-and-shifted")
    for views in kinds:
        calls = []

        def model(batch: torch.Tensor, calls: list[int] = calls) -> torch.Tensor:
            calls.append(len(batch))
            return _first_pixels(batch)

        average_views(model, pixels, views)
        assert len(calls) == NUM_VIEWS[views], views


def test_the_figure_with_views_is_named_so() -> None:
    assert describe_with_views(37, 10_000, "shifted") == ", 99.63 % with 5 views of each image (37 wrong)"
    assert describe_with_views(None, 10_000, "one") == describe_with_views(0, 0, "mirrored") == ""


def test_a_headline_without_the_second_figure_averages_the_views_of_its_recipe() -> None:
    """Version 0.1 recorded the average over views alone."""
    assert is_headline_averaged("shifted", None)
    assert not is_headline_averaged("shifted", 0)
    assert not is_headline_averaged("one", None)
