"""The client prepares images as the trainer does, and names the ones that it cannot use."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from convoy.digits import is_inverted, prepare_digit
from convoy.preprocessing import Preprocessing
from protos import model_config_pb2 as mc
from serving.client.errors import ClientError
from serving.client.images import ImageFile, ImageInput, PreparedImage, iter_sources
from tests.drawings import drawings
from trainer.data import Dataset
from trainer.data.folder.decode import decode_pixels
from trainer.data.folder.index import FolderIndex
from trainer.data.folder.listing import Files, Listing

Pixels = npt.NDArray[np.uint8]
GREY = ImageInput("images", (1, 28, 28), 4)
RGB = ImageInput("images", (3, 32, 32), 4)


def scene(*shape: int, seed: int = 0) -> Pixels:
    """Returns smooth pixels without symmetry, in which a shift by one pixel or a turn shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, *shape[2:]), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def save_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(scene(40, 64, 3)).save(path, exif=exif)


def save_transparent(path: Path) -> None:
    Image.fromarray(np.dstack([scene(40, 64, 3), scene(40, 64, seed=1)])).save(path)


def save_palette(path: Path) -> None:
    Image.fromarray(scene(40, 64, 3)).quantize(16).save(path)


def save_transparent_palette(path: Path) -> None:
    Image.fromarray(scene(40, 64, 3)).quantize(16).save(path, transparency=3)


def save_sixteen_bits(path: Path) -> None:
    Image.fromarray(scene(40, 64).astype(np.uint16) * 257).save(path)


def save_one_bit(path: Path) -> None:
    Image.fromarray(scene(40, 64)).convert("1").save(path)


def save_animation(path: Path) -> None:
    frames = [Image.fromarray(scene(40, 64, 3, seed=seed)) for seed in (0, 1)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def save_cmyk(path: Path) -> None:
    Image.fromarray(scene(40, 64, 4)).convert("RGB").convert("CMYK").save(path)


def save_plain(*shape: int) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(scene(*shape)).save(path)


FILES: dict[str, Callable[[Path], None]] = {
    "wide.png": save_plain(40, 64, 3),
    "tall.png": save_plain(67, 33, 3),
    "small.png": save_plain(9, 14, 3),
    "exact.png": save_plain(32, 32, 3),
    "long.png": save_plain(3, 200, 3),
    "grey.png": save_plain(50, 50),
    "turned.jpg": save_turned,
    "transparent.png": save_transparent,
    "palette.png": save_palette,
    "transparent-palette.png": save_transparent_palette,
    "sixteen.png": save_sixteen_bits,
    "one-bit.png": save_one_bit,
    "animation.webp": save_animation,
    "cmyk.jpg": save_cmyk,
}


def as_trained(path: Path, num_channels: int, size: int, significant_bits: int = 16) -> np.ndarray:
    """Returns the pixels of a file in a decoded data set."""
    files = Files()
    files.add(path.name.encode(), 0, path.stat())
    index = FolderIndex.of(Listing(path.parent, ("thing",), {"train": files}, (), "key"))
    shape = num_channels, size, size
    return decode_pixels(index, shape, significant_bits, path.parent, print)[0].numpy()


@pytest.mark.parametrize("given", [GREY, RGB], ids=["grey", "rgb"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_seen_as_in_training(tmp_path: Path, name: str, given: ImageInput) -> None:
    FILES[name](tmp_path / name)
    channels, size, _ = given.shape

    seen = given.prepare(tmp_path / name)

    trained = as_trained(tmp_path / name, channels, size)
    assert seen.pixels.dtype == np.uint8
    np.testing.assert_array_equal(seen.pixels, trained)
    assert seen.pixels.std() > 0
    assert seen.name == str(tmp_path / name)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_a_16_bit_file_is_scaled_as_in_training(tmp_path: Path, bits: int) -> None:
    pixels = scene(40, 64).astype(np.uint16) << (bits - 8)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    config = mc.ModelConfig(input=[mc.ModelInput(name="images", data_type=mc.TYPE_UINT8, dims=[1, 28, 28])])
    if bits != 16:
        config.parameters["significant_bits"].string_value = str(bits)
    given = ImageInput.from_config(config)

    seen = given.prepare(tmp_path / "deep.png").pixels

    trained = as_trained(tmp_path / "deep.png", 1, 28, bits)
    np.testing.assert_array_equal(seen, trained)
    with Image.open(tmp_path / "deep.png") as image:
        np.testing.assert_array_equal(given.prepare(image).pixels, seen)
    assert seen.max() > 200


@pytest.mark.parametrize("size", [(20_000, 1), (3, 9000), (400, 399)])
def test_a_strip_is_seen_as_in_training(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "strip.png")
    trained = as_trained(tmp_path / "strip.png", 3, 32)
    np.testing.assert_array_equal(RGB.prepare(tmp_path / "strip.png").pixels, trained)


def test_a_model_need_not_be_square() -> None:
    wide = ImageInput("images", (1, 10, 40), 4)
    left_to_right = np.tile(np.arange(200, dtype=np.uint8), (200, 1))
    pixels = wide.prepare(left_to_right).pixels
    assert pixels.shape == (1, 10, 40)
    assert (np.abs(pixels[0] - np.arange(2, 200, 5)[None]) <= 1).all(), "the whole width"


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (28, 28, 3), (28, 28, 4), (60, 80), (60, 80, 3)], ids=str)
@pytest.mark.parametrize("given", [GREY, RGB], ids=["grey", "rgb"])
def test_arrays(given: ImageInput, shape: tuple[int, ...]) -> None:
    pixels = scene(*shape[:2], *(size for size in shape[2:] if size > 1)).reshape(shape)
    assert given.prepare(pixels).pixels.shape == given.shape


def test_pixels_of_the_models_own_shape_are_left_as_they_are() -> None:
    pixels = scene(32, 32, 3).transpose(2, 0, 1)
    assert RGB.prepare(pixels).pixels is pixels
    assert RGB.prepare(RGB.prepare(pixels)).pixels is pixels


def test_a_pillow_image_is_prepared_as_its_file(tmp_path: Path) -> None:
    save_transparent(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(RGB.prepare(image).pixels, RGB.prepare(tmp_path / "a.png").pixels)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((28, 28), 1),
        ((50, 60, 3), 1),
        ((1, 28, 28), 1),
        ((3, 32, 32), 1),
        ((5, 28, 28), 5),
        ((5, 3, 32, 32), 5),
        ((5, 40, 50, 3), 5),
        ((0, 28, 28), 0),
    ],
    ids=str,
)
def test_how_many_images_an_array_holds(shape: tuple[int, ...], count: int) -> None:
    given = RGB if 32 in shape else GREY
    assert len(list(iter_sources(np.zeros(shape, np.uint8), given.shape))) == count


def test_one_image_or_a_sequence() -> None:
    assert list(iter_sources("a.png", (1, 28, 28))) == ["a.png"]
    assert list(iter_sources([Path("a.png"), "b.png"], (1, 28, 28))) == [Path("a.png"), "b.png"]


@pytest.mark.parametrize(("highest", "is_dark"), [(1023, True), (3000, True), (65535, False)])
def test_a_16_bit_file_that_uses_few_bits_has_a_warning(tmp_path: Path, highest: int, is_dark: bool) -> None:
    pixels = np.linspace(0, highest, 28 * 28).reshape(28, 28).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    assert ("nearly black" in (RGB.prepare(tmp_path / "deep.tif").warning or "")) is is_dark


# ---- Unusable images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "complaint"),
    [
        (np.zeros((28, 28)), "picture: pixels are uint8, 0 to 255, and these are float64"),
        (np.zeros(28, np.uint8), r"picture: expected \[H, W\], .* got \[28\]"),
        (np.zeros((0, 28), np.uint8), r"got \[0, 28\]"),
        (np.zeros((28, 28, 2), np.uint8), r"got \[28, 28, 2\]"),
    ],
)
def test_an_array_that_is_no_image(pixels: npt.NDArray[np.generic], complaint: str) -> None:
    with pytest.raises(ClientError, match=complaint):
        GREY.prepare(pixels, name="picture")


@pytest.mark.parametrize("source", [b"content", None, 5, [[1, 2]]])
def test_what_is_no_image_at_all(source: object) -> None:
    with pytest.raises(ClientError, match="picture: expected a path, a Pillow image, an array or an ImageFile, not"):
        GREY.prepare(source, name="picture")  # type: ignore[arg-type]
    assert list(iter_sources(source, GREY.shape)) in ([source], source)  # type: ignore[arg-type]


def png_bytes() -> bytes:
    written = io.BytesIO()
    Image.fromarray(scene(64, 64)).save(written, "png")
    return written.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is no image"),
        (b"not an image at all", "it is no image"),
        (png_bytes()[:300], "truncated"),
    ],
    ids=["empty", "text", "torn"],
)
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ClientError) as caught:
        GREY.prepare(path)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caught.value.message.startswith(f"{path}: cannot be read as an image: ")
    assert reason in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"a\.png: no such file$"):
        GREY.prepare(tmp_path / "a.png")
    with pytest.raises(ClientError, match="a folder, not an image"):
        GREY.prepare(tmp_path)


@pytest.mark.parametrize("bits", ["", "11", "many", "-8"])
def test_a_number_of_bits_that_is_none_is_named(bits: str) -> None:
    config = mc.ModelConfig(name="m", input=[mc.ModelInput(name="a", data_type=mc.TYPE_UINT8, dims=[1, 28, 28])])
    config.parameters["significant_bits"].string_value = bits
    with pytest.raises(ClientError, match=f"the parameter significant_bits '{bits}', no bit depth"):
        ImageInput.from_config(config)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(np.zeros((8, 8), np.float32)), "floating-point pixels have no agreed range"),
        (Image.fromarray(np.full((8, 8), -5, np.int32)), "its values, -5 to -5, are not within 0 to 65535"),
        (Image.new("RGB", (0, 8)), "."),
    ],
    ids=["float", "negative", "empty"],
)
def test_a_pillow_image_that_cannot_be_used_is_named(image: Image.Image, reason: str) -> None:
    with pytest.raises(ClientError, match=f"^.*picture: cannot be read as an image: {reason}"):
        RGB.prepare(image, name="picture")


def test_a_model_of_several_inputs_takes_no_images() -> None:
    two = mc.ModelInput(name="a", data_type=mc.TYPE_UINT8, dims=[1, 28, 28])
    with pytest.raises(ClientError, match=r"takes a UINT8 \[1, 28, 28\], a UINT8 \[1, 28, 28\], not one"):
        ImageInput.from_config(mc.ModelConfig(name="m", input=[two, two]))


# ---- Inverted images -------------------------------------------------------------------------------------------------


def test_digits_of_mnist_are_distinguished_from_their_negatives(mini: Dataset) -> None:
    digits = mini.train.images[:1000, 0].numpy()
    assert not any(is_inverted(digit) for digit in digits)
    assert all(is_inverted(255 - digit) for digit in digits)


def test_paper_in_the_shade_is_light_despite_a_speck() -> None:
    paper = np.full((28, 28), 110, np.uint8)
    paper[8:20, 12:15] = 30
    paper[14, 20] = 255
    assert is_inverted(paper)
    slate = np.full((28, 28), 140, np.uint8)
    slate[8:20, 12:15] = 220
    slate[14, 20] = 0
    assert not is_inverted(slate)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_image_has_no_background(level: int) -> None:
    assert not is_inverted(np.full((28, 28), level, np.uint8))


def test_a_scan_has_a_warning_and_its_negative_has_none(tmp_path: Path) -> None:
    scan = np.full((60, 60), 250, np.uint8)
    scan[15:45, 27:33] = 20
    Image.fromarray(scan).save(tmp_path / "scan.png")
    assert "looks inverted" in (GREY.prepare(tmp_path / "scan.png").warning or "")
    negative = GREY.prepare(tmp_path / "scan.png", invert=True)
    assert negative.warning is None
    assert negative.pixels[0, 14, 14] > 200
    assert RGB.prepare(tmp_path / "scan.png").warning is None, "colour has no such rule"


# ---- What the server says of the preprocessing, and files that it prepares itself ------------------------------------


def config_with(section: object) -> mc.ModelConfig:
    config = mc.ModelConfig(name="m", input=[mc.ModelInput(name="a", data_type=mc.TYPE_UINT8, dims=[1, 28, 28])])
    config.parameters["preprocessing"].string_value = json.dumps(section)
    return config


def test_a_model_of_digits_gets_them_as_mnist_has_them() -> None:
    given = ImageInput.from_config(config_with(Preprocessing("mnist").to_json()))
    [(drawing, _)] = drawings(1)
    seen = given.prepare(drawing)
    assert isinstance(seen, PreparedImage)
    np.testing.assert_array_equal(seen.pixels, prepare_digit(drawing, (1, 28, 28)))
    assert seen.warning is None


@pytest.mark.parametrize(
    "section", [Preprocessing().to_json() | {"sha256": "ab" * 32}, {"method": "x", "sha256": ""}, []]
)
def test_an_unknown_preprocessing_is_named(section: object) -> None:
    with pytest.raises(ClientError, match="images cannot be prepared for model 'm': "):
        ImageInput.from_config(config_with(section))


def test_files_are_sent_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"content")
    file = ImageFile.read(tmp_path / "a.png")
    assert (file.name, file.content, file.warning) == (str(tmp_path / "a.png"), b"content", None)
    taking = ImageInput.from_config(config_with(Preprocessing().to_json()))
    assert taking.prepare(file) is file
    with pytest.raises(ClientError, match="cannot be inverted"):
        taking.prepare(file, invert=True)
    with pytest.raises(ClientError, match="the server prepares no image files for this model"):
        GREY.prepare(file)
    with pytest.raises(ClientError, match=r"b\.png: No such file"):
        ImageFile.read(tmp_path / "b.png")
