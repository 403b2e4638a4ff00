"""Tests of the preparation of digits: light on dark, fitted into 20 x 20, centred by mass."""

import numpy as np
import pytest
from PIL import Image

from convoy.digits import is_inverted, prepare_digit
from tests.drawings import drawings
from trainer.data import Dataset

SHAPE = (1, 28, 28)


def test_drawings_look_like_mnist() -> None:
    for image, _ in drawings(30, seed=1):
        pixels = prepare_digit(image, SHAPE)[0].astype(float)
        assert not is_inverted(pixels.astype(np.uint8))
        assert pixels.max() == 255
        rows, columns = np.flatnonzero(pixels.max(axis=1) > 60), np.flatnonzero(pixels.max(axis=0) > 60)
        assert 18 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 20
        down, across = (pixels.sum(axis=axis) @ np.arange(28) / pixels.sum() for axis in (1, 0))
        assert abs(down - 13.5) <= 0.6 or min(rows[0], 27 - rows[-1]) == 0
        assert abs(across - 13.5) <= 0.6


def test_images_of_mnist_stay_as_they_are(mini: Dataset) -> None:
    for digit in mini.train.images[:50, 0].numpy():
        np.testing.assert_array_equal(prepare_digit(Image.fromarray(digit), SHAPE)[0], digit)


def test_ink_may_be_dark_or_light_grey_or_coloured() -> None:
    [(drawing, _)] = drawings(1, seed=2)
    expected = prepare_digit(drawing, SHAPE).astype(int)
    grey = np.asarray(drawing)
    negative = Image.fromarray(255 - grey)
    colour = Image.fromarray(np.stack([grey, grey, np.full_like(grey, 240)], axis=2))
    veiled = Image.fromarray(np.stack([np.zeros_like(grey), 255 - grey], axis=2), mode="LA")
    for image in (negative, colour, veiled):
        assert np.abs(prepare_digit(image, SHAPE) - expected).mean() < 8
    three = prepare_digit(drawing, (3, 28, 28))
    np.testing.assert_array_equal(three, np.repeat(expected, 3, axis=0))


def test_a_small_digit_on_a_large_sheet() -> None:
    sheet = np.full((2000, 3000), 240, np.uint8)
    sheet[300:420, 2500:2515] = 30
    pixels = prepare_digit(Image.fromarray(sheet), SHAPE)[0]
    assert pixels[4:24, 12:16].max(axis=1).min() > 150
    assert pixels[:3].max() == 0


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_image_is_prepared_like_any_other(level: int) -> None:
    blank = Image.new("L", (60, 40), level)
    np.testing.assert_array_equal(prepare_digit(blank, SHAPE), np.full(SHAPE, level))


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (3, 2)])
def test_tiny_and_narrow_images(size: tuple[int, int]) -> None:
    pixels = np.full(size, 250, np.uint8)
    pixels[0, 0] = 0
    assert prepare_digit(Image.fromarray(pixels), SHAPE).shape == SHAPE
