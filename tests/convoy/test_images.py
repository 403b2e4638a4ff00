"""Tests of the preprocessing: orientation, bit depth, transparency, channels, resizing and cropping."""

import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convoy.images import EXTENSIONS, ImageError, Pixels, pad_image, prepare_image, read_image

Read = Callable[..., Pixels]
NEEDS_AVIF = pytest.mark.skipif(".avif" not in Image.registered_extensions(), reason="this Pillow reads no AVIF")


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


def test_the_shape_decides_between_grey_and_colour(read: Read) -> None:
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


@pytest.mark.parametrize(
    ("significant_bits", "values", "expected"),
    [
        (8, [0, 128, 255, 300], [0, 128, 255, 255]),
        (10, [3, 4, 512, 1023], [0, 1, 128, 255]),
        (12, [15, 16, 4095, 65535], [0, 1, 255, 255]),
        (14, [63, 64, 8192, 16383], [0, 1, 128, 255]),
        (16, [255, 256, 32768, 65535], [0, 1, 128, 255]),
    ],
)
@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_the_largest_value_of_the_significant_bits_becomes_white(
    significant_bits: int, values: list[int], expected: list[int], kind: type
) -> None:
    image = Image.fromarray(np.array([values] * 4).astype(kind))
    assert prepare_image(image, (1, 4, 4), significant_bits=significant_bits)[0, 0].tolist() == expected


@pytest.mark.parametrize("outside", [-1, 65536])
def test_values_that_are_not_of_16_bits_are_refused(tmp_path: Path, outside: int) -> None:
    Image.fromarray(np.array([[0, outside]] * 2).astype(np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match="are not within 0 to 65535: convert it to 8 or 16 bits"):
        read_image(tmp_path / "x.tif", (1, 2, 2))


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


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_padding_shows_the_whole_image_on_white(mode: str) -> None:
    image = Image.new(mode, (40, 10))
    pixels = pad_image(image, (3, 20, 20))
    assert (pixels[:, 8:12] <= 1).all(), "the image, and 0.5 pixels of rounding"
    assert (pixels[:, [*range(7), *range(13, 20)]] == 255).all()
    part = pad_image(image, (1, 20, 20), box=(0.5, 0.5, 0.25, 0.5))  # from the centre of the square
    assert (part[0, :10] == 0).all()
    assert (part[0, 10:] == 255).all()
    assert (pad_image(image, (1, 4, 4), box=(0, 0, 0.25, 1)) == 255).all()


def test_padding_changes_no_square_and_keeps_one_pixel_of_a_strip() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(*(to(Image.fromarray(pixels), (3, 8, 8)) for to in (pad_image, prepare_image)))
    assert pad_image(Image.new("L", (1, 20_000)), (1, 8, 8)).min(axis=1).tolist() == [[255] * 4 + [0] + [255] * 3]


def test_resizing_is_antialiased(read: Read) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    pixels = read(Image.fromarray(stripes), (1, 8, 8))
    assert int(pixels.min()) > 110
    assert int(pixels.max()) < 145


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "^it is no image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "broken|no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "program in PostScript"),
    ],
)
def test_bad_bytes_have_a_reason_of_one_line_without_the_path(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(path, (1, 8, 8))
    assert str(path) not in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=r"^No such file or directory$"):
        read_image(tmp_path / "nowhere.png", (1, 8, 8))


# ---- Memory ----------------------------------------------------------------------------------------------------------


def resize_then_crop(image: Image.Image, side: int) -> Pixels:
    scale = side / min(image.size)
    width, height = max(side, round(image.width * scale)), max(side, round(image.height * scale))
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8))


@pytest.mark.parametrize("size", [(640, 480), (33, 67), (8, 150), (500, 499), (1000, 16), (1, 60), (3, 3)])
@pytest.mark.parametrize("side", [8, 32, 224])
def test_an_image_is_cropped_after_it_is_resized(size: tuple[int, int], side: int) -> None:
    image = noise(*size)
    np.testing.assert_array_equal(prepare_image(image, (1, side, side))[0], resize_then_crop(image, side))


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (9000, 3), (2, 7001)])
def test_of_a_long_strip_only_the_centre_is_resized(size: tuple[int, int]) -> None:
    """Without a crop, the strip would become up to 64 x 1,280,000 pixels. Pixels may differ by rounding."""
    image = noise(*size)
    pixels = prepare_image(image, (1, 64, 64))[0].astype(int)
    assert np.abs(pixels - resize_then_crop(image, 64)).max() <= 1


@pytest.mark.parametrize("size", [(1_000_000, 1), (1, 3_000_000)])
def test_a_strip_of_a_million_pixels_takes_no_gigabytes(size: tuple[int, int]) -> None:
    script = (
        "import resource, sys; from PIL import Image; from convoy.images import prepare_image; "
        f"image = Image.new('RGB', {size}); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "prepare_image(image, (3, 224, 224)); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert int(output) < 50_000  # kB


# ---- Damaged files ---------------------------------------------------------------------------------------------------


def encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse.repeat(4, axis=0).repeat(4, axis=1)).save(buffer, kind, **options)
    return buffer.getvalue()


KINDS = ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", pytest.param("AVIF", marks=NEEDS_AVIF)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_are_an_image_or_one_line(tmp_path: Path, kind: str) -> None:
    whole, generator, reasons = encoded(kind), random.Random(0), []
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(generator.choice([1, 1, 4])):
            data[generator.randrange(len(data))] = generator.choice([0, 255, generator.randrange(256)])
        (tmp_path / "x").write_bytes(data[: generator.choice([len(data), len(data), generator.randrange(len(data))])])
        try:
            read_image(tmp_path / "x", (3, 8, 8))
        except ImageError as error:
            reasons.append(str(error))
    assert reasons
    assert all(reason and "\n" not in reason for reason in reasons)


@pytest.mark.parametrize("error", [RuntimeError("codec"), MemoryError(), AssertionError(), OverflowError("too large")])
def test_any_exception_of_a_decoder_is_an_image_error(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Image.Image) -> None:
        raise error

    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / "x.png", (1, 8, 8))
    assert str(caught.value) in ("codec", "it does not fit in memory: scale it down", "AssertionError", "too large")


EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned by 90 degrees clockwise
EXIF[0x010E] = "a description"


def png_with(name: bytes, content: bytes, *, checksum_is_right: bool = True) -> bytes:
    """Returns a PNG with one more chunk after its header."""
    data = encoded("PNG")
    checksum = zlib.crc32(name + content) ^ (0 if checksum_is_right else 1)
    return data[:33] + struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum) + data[33:]


def overwritten(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    assert len(old) == len(new)
    return data.replace(old, new)


@pytest.mark.parametrize(
    ("name", "content", "checksum_is_right"),
    [
        (b"tEXt", b"Comment\0hello", False),
        (b"zTXt", b"Comment\0\1", True),  # an unknown compression
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(5_000_000)), True),  # more than Pillow accepts
        (b"iCCP", b"icc\0\5", True),
        (b"iCCP", b"icc\0\0" + b"nonsense", False),
        (b"pHYs", b"12", True),
        (b"eXIf", b"nonsense", False),
        (b"gAMA", b"", True),
    ],
)
def test_damaged_chunks_of_a_png_leave_its_pixels_readable(
    tmp_path: Path, name: bytes, content: bytes, checksum_is_right: bool
) -> None:
    (tmp_path / "x.png").write_bytes(png_with(name, content, checksum_is_right=checksum_is_right))
    with pytest.warns(UserWarning, match="its metadata are damaged and not used"):
        pixels = read_image(tmp_path / "x.png", (3, 24, 24))
    np.testing.assert_array_equal(pixels, prepare_image(Image.open(io.BytesIO(encoded("PNG"))), (3, 24, 24)))


def test_damaged_text_of_a_png_leaves_its_orientation(tmp_path: Path) -> None:
    good = encoded("PNG", exif=EXIF)
    chunk = b"Comment\0hello"
    bad = good[:33] + struct.pack(">I", len(chunk)) + b"tEXt" + chunk + bytes(4) + good[33:]
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "bad.png").write_bytes(bad)
    with pytest.warns(UserWarning, match="its metadata are damaged"):
        pixels = read_image(tmp_path / "bad.png", (3, 24, 24))
    np.testing.assert_array_equal(pixels, read_image(tmp_path / "good.png", (3, 24, 24)))


def test_damaged_pixels_of_a_png_stay_unreadable(tmp_path: Path) -> None:
    data = bytearray(png_with(b"tEXt", b"Comment\0hello", checksum_is_right=False))
    data[-20] ^= 255  # in the pixels' checksum or before
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ImageError):
        read_image(tmp_path / "x.png", (3, 24, 24))


@pytest.mark.filterwarnings("ignore:its EXIF data are damaged")  # Pillow skips those of a JPEG without a warning
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damaged", [b"XX\0*", b"MM\0\0"])
def test_damaged_exif_data_leave_the_pixels_readable(tmp_path: Path, kind: str, damaged: bytes) -> None:
    exif = overwritten(EXIF.tobytes(), b"MM\0*", damaged)
    (tmp_path / "x").write_bytes(encoded(kind, exif=exif))
    pixels = read_image(tmp_path / "x", (3, 24, 24))
    np.testing.assert_array_equal(pixels, prepare_image(Image.open(io.BytesIO(encoded(kind))), (3, 24, 24)))


@NEEDS_AVIF
def test_damaged_exif_data_of_an_avif_leave_the_pixels_readable(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    (tmp_path / "x").write_bytes(overwritten(encoded("AVIF", exif=exif), b"MM\0*", b"XX\0*"))
    with pytest.warns(UserWarning, match="its metadata are damaged"):
        pixels = read_image(tmp_path / "x", (3, 24, 24))
    np.testing.assert_array_equal(pixels, prepare_image(Image.open(io.BytesIO(encoded("AVIF"))), (3, 24, 24)))


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("place", [0xFF787718, 0x7FFFFFFF])
def test_a_damaged_description_of_a_tiff_leaves_the_pixels_readable(tmp_path: Path, place: int) -> None:
    good = encoded("TIFF", description="what it shows")
    entry = good.index(struct.pack("<HHI", 270, 2, 14))
    bad = good[: entry + 8] + struct.pack("<I", place) + good[entry + 12 :]
    (tmp_path / "x.tif").write_bytes(bad)
    with pytest.warns(UserWarning, match="its metadata are damaged"):
        pixels = read_image(tmp_path / "x.tif", (3, 24, 24))
    np.testing.assert_array_equal(pixels, prepare_image(Image.open(io.BytesIO(good)), (3, 24, 24)))


def test_the_errors_of_a_missing_file_and_of_a_folder_have_their_cause(tmp_path: Path) -> None:
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
