"""The one preprocessing: orientation, bit depth, transparency, channels, resizing and cropping."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convoy.images import EXTENSIONS, ImageError, Pixels, prepare_image, read_image

Read = Callable[..., Pixels]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Saves an image and reads the file."""

    def save_and_read(
        image: Image.Image, shape: tuple[int, int, int] = (3, 8, 8), name: str = "x.png", **options: Any
    ) -> Pixels:
        image.save(tmp_path / name, **options)
        pixels = read_image(tmp_path / name, shape)
        assert (pixels.dtype, pixels.shape) == (np.uint8, shape)
        return pixels

    return save_and_read


def test_colours_of_a_palette(read: Read) -> None:
    image = Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4)
    assert read(image)[:, 0, 0].tolist() == [10, 200, 30]


def test_grey_and_colour_as_the_shape_says(read: Read) -> None:
    assert read(Image.new("L", (8, 8), 90))[:, 0, 0].tolist() == [90] * 3
    assert read(Image.new("RGB", (8, 8), (90, 90, 90)), (1, 8, 8))[:, 0, 0].tolist() == [90]


def test_transparency_becomes_white(read: Read) -> None:
    assert read(Image.new("RGBA", (8, 8), (0, 0, 0, 0))).min() == 255
    assert read(Image.new("RGBA", (8, 8), (0, 0, 0, 128))).tolist() == np.full((3, 8, 8), 127).tolist()


def test_transparent_colour_of_a_palette_becomes_white(read: Read) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 90, 90, 90])
    assert read(image, transparency=1).min() == 255


def test_the_upper_eight_of_sixteen_bits_are_kept(read: Read) -> None:
    image = Image.fromarray(np.full((8, 8), 0x80FF, np.uint16))
    assert set(read(image, (1, 8, 8)).flat) == {0x80}


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match="floating-point pixels have no agreed range"):
        read_image(tmp_path / "x.tif", (1, 8, 8))


def test_black_and_white(read: Read) -> None:
    assert set(read(Image.new("1", (8, 8), 1), (1, 8, 8)).flat) == {255}


def test_cmyk(read: Read) -> None:
    pixels = read(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), name="x.jpg", quality=100)
    assert pixels[:, 4, 4].tolist() == pytest.approx([255, 0, 0], abs=4)


def test_orientation_is_applied(read: Read) -> None:
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    pixels = read(image, (1, 8, 8), exif=exif)
    assert pixels[0, :, 7].tolist() == [255] * 8  # white at the right
    assert pixels[0, :, 0].tolist() == [0] * 8


def test_the_first_frame_of_an_animation_counts(read: Read) -> None:
    frames = [Image.new("L", (8, 8), shade) for shade in (90, 255)]
    assert set(read(frames[0], (1, 8, 8), "x.gif", save_all=True, append_images=frames[1:]).flat) == {90}


@pytest.mark.parametrize("turned", [False, True])
def test_the_shorter_side_is_resized_and_the_centre_kept(read: Read, turned: bool) -> None:
    image = Image.new("L", (64, 16), 0)
    image.paste(255, (24, 0, 40, 16))
    pixels = read(image.transpose(Image.Transpose.ROTATE_90) if turned else image, (1, 8, 8))[0]
    assert int((pixels.T if turned else pixels)[:, 1:7].min()) == 255


@pytest.mark.parametrize("size", [(200, 200), (200, 50), (7, 3), (640, 480)])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 10, 40), (1, 40, 10)])
def test_any_size_becomes_any_shape(size: tuple[int, int], shape: tuple[int, int, int]) -> None:
    assert prepare_image(Image.new("RGB", size, "red"), shape).shape == shape


def test_a_shape_need_not_be_square() -> None:
    left_to_right = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1)))
    pixels = prepare_image(left_to_right, (1, 10, 40))
    assert (np.abs(pixels[0] - np.arange(2, 200, 5)[None]) <= 1).all(), "the whole width"


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(prepare_image(Image.fromarray(pixels), (3, 8, 8)), pixels.transpose(2, 0, 1))


def test_resizing_is_antialiased(read: Read) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    pixels = read(Image.fromarray(stripes), (1, 8, 8))
    assert int(pixels.min()) > 110
    assert int(pixels.max()) < 145


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "cannot identify image file 'it'"), (b"\x89PNG\r\n\x1a\n" + bytes(50), "broken|cannot identify")],
)
def test_bad_bytes_have_a_reason_of_one_line_without_the_path(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(path, (1, 8, 8))
    assert str(path) not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_by_their_cause(tmp_path: Path) -> None:
    for path, cause in ((tmp_path / "x.png", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(ImageError) as caught:
            read_image(path, (1, 8, 8))
        assert isinstance(caught.value.__cause__, cause)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    Image.new("L", (2000, 950)).save(tmp_path / "x.png")
    with pytest.raises(ImageError, match="it has more than 1 million pixels: scale it down"):
        read_image(tmp_path / "x.png", (1, 8, 8))


def test_pillow_knows_every_extension() -> None:
    optional = {".avif"}  # some builds of Pillow lack it
    assert set(EXTENSIONS) - optional <= set(Image.registered_extensions())


def test_pillow_is_imported_when_an_image_is_read() -> None:
    script = "import sys, convoy.images; print('PIL' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output == "False\n"
