"""Crops of image files: the fast way for plain JPEG files shows what Pillow shows, and all others go Pillow's way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from convoy.images import Box, ImageError, read_image
from trainer.data.folder import decoder
from trainer.data.folder.decoder import decode_crop

BOX = (0.1, 0.3, 0.5, 0.6)
ORIENTATION = 0x0112
XMP = b'http://ns.adobe.com/xap/1.0/\0<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'


def picture(width: int = 120, height: int = 80) -> Image.Image:
    """Smooth colours, as JPEG keeps them; no two corners are alike."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 255, (4, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def as_viewed(path: Path, box: Box, size: int = 32, mode: str = "RGB") -> npt.NDArray[np.int64]:
    """The crop, decoded and resized by Pillow alone."""
    with Image.open(path) as image:
        upright = image.convert(mode)
        turn = image.getexif().get(ORIENTATION, 1)
    turns = [None, None, 0, 3, 1, 5, 4, 6, 2]  # of Pillow's Transpose
    if (method := turns[turn]) is not None:
        upright = upright.transpose(Image.Transpose(method))
    top, left = round(box[0] * upright.height), round(box[1] * upright.width)
    bottom, right = round((box[0] + box[2]) * upright.height), round((box[1] + box[3]) * upright.width)
    crop = upright.crop((left, top, right, bottom)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(crop, np.int64).reshape(size, size, -1).transpose(2, 0, 1)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that images were decoded."""
    taken: list[str] = []
    fast, slow = simplejpeg.decode_jpeg, decoder.use_image

    def decode_jpeg(*args: Any, **kwargs: Any) -> Any:
        frame = fast(*args, **kwargs)
        taken.append(f"fast {frame.shape[1]}x{frame.shape[0]}")
        return frame

    def use_image(path: Path, use: Callable[[Image.Image], Any]) -> Any:
        taken.append("Pillow")
        return slow(path, use)

    monkeypatch.setattr(decoder.simplejpeg, "decode_jpeg", decode_jpeg)
    monkeypatch.setattr(decoder, "use_image", use_image)
    return taken


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_looks_as_in_a_viewer(tmp_path: Path, orientation: int, ways: list[str]) -> None:
    path = save(tmp_path / "a.jpg", picture(), exif=oriented(orientation), quality=95)
    found = decode_crop(path, BOX, 32, 3)
    assert (found.shape, found.dtype) == ((3, 32, 32), np.uint8)
    assert np.abs(found - as_viewed(path, BOX)).max() <= 2
    assert ways == ["fast 120x80"]


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.99, 0.99, 0.01, 0.01), (0, 0.5, 1, 0.001)])
def test_boxes_at_the_edges(tmp_path: Path, box: Box, ways: list[str]) -> None:
    path = save(tmp_path / "a.jpg", picture(), quality=95)
    assert decode_crop(path, box, 64, 3).shape == (3, 64, 64)
    assert ways == ["fast 120x80"]


def test_large_images_are_decoded_at_the_smallest_scale_that_covers_the_crop(tmp_path: Path, ways: list[str]) -> None:
    path = save(tmp_path / "a.jpg", picture(1600, 1200), exif=oriented(6), quality=95)
    for box, decoded in (((0, 0, 1, 1), "200x150"), (BOX, "400x300"), ((0.1, 0.1, 0.1, 0.2), "1600x1200")):
        found = decode_crop(path, box, 100, 3)
        assert np.abs(found - as_viewed(path, box, 100)).mean() < 1
        assert ways.pop() == f"fast {decoded}"


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_and_colour_jpegs(tmp_path: Path, mode: str, num_channels: int, ways: list[str]) -> None:
    path = save(tmp_path / "a.jpg", picture().convert(mode), quality=95)
    found = decode_crop(path, BOX, 32, num_channels)
    assert np.abs(found - as_viewed(path, BOX, mode="L" if num_channels == 1 else "RGB")).max() <= 2
    assert ways == ["fast 120x80"]


def test_other_files_go_the_way_of_pillow(tmp_path: Path, ways: list[str]) -> None:
    transparent = picture().convert("RGBA")
    transparent.putalpha(0)
    deep = Image.fromarray(np.full((80, 120), 40_000, np.uint16))
    files = {
        "cmyk.jpg": (picture().convert("CMYK"), {"quality": 95}),
        "palette.png": (picture().convert("P"), {}),
        "transparent.png": (transparent, {}),
        "deep.png": (deep, {}),
        "turned.tif": (picture(), {"exif": oriented(6)}),
    }
    expected = {"transparent.png": 255, "deep.png": 40_000 >> 8}
    for name, (image, options) in files.items():
        path = save(tmp_path / name, image, **options)
        found = decode_crop(path, BOX, 32, 3)
        difference = np.abs(found - expected.get(name, as_viewed(path, BOX) if name not in expected else 0))
        assert difference.max() <= 1, name
        assert ways.pop() == "Pillow"


def test_a_jpeg_whose_turn_is_in_other_metadata_goes_the_way_of_pillow(tmp_path: Path, ways: list[str]) -> None:
    path = save(tmp_path / "a.jpg", picture(), quality=95, xmp=XMP.partition(b"\0")[2])
    assert np.abs(decode_crop(path, BOX, 32, 3) - as_viewed(path, BOX)).max() <= 1
    assert ways == ["Pillow"]


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 700, -200])
def test_a_truncated_jpeg_is_an_error_with_a_reason(tmp_path: Path, num_bytes: int) -> None:
    path = save(tmp_path / "a.jpg", picture(), exif=oriented(3), quality=95)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ImageError):
        decode_crop(path, BOX, 32, 3)


def test_a_file_that_is_gone_is_an_error_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        decode_crop(tmp_path / "gone.jpg", BOX, 32, 3)


def test_without_a_box_the_pixels_are_those_that_are_evaluated_and_served(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", picture(), exif=oriented(5), quality=80)
    assert np.array_equal(decode_crop(path, None, 32, 3), read_image(path, (3, 32, 32)))


def test_damaged_exif_data_are_not_trusted(tmp_path: Path, ways: list[str]) -> None:
    exif = b"Exif\0\0II*\0\xff\xff\xff\x00"
    path = save(tmp_path / "a.jpg", picture(), quality=95, exif=exif)
    with pytest.warns(UserWarning, match="EXIF|metadata|[Cc]orrupt"):
        decode_crop(path, BOX, 32, 3)
    assert ways == ["Pillow"]
