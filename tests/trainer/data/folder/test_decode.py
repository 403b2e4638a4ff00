"""Channels and sizes of decoded images, and images that cannot be decoded."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.data.folder.image_files import Load, put, put_class
from trainer.data.folder.decode import examine_files, select_images, tensor_on_disk
from trainer.data.folder.index import PROBED, FolderIndex
from trainer.data.folder.listing import list_folder
from trainer.data.folder.probe import read_headers
from trainer.data.test_set import load_test_set
from trainer.errors import ConfigError, DataError

NEEDS_AVIF = pytest.mark.skipif(".avif" not in Image.registered_extensions(), reason="this Pillow reads no AVIF")


@pytest.mark.parametrize(("modes", "channels"), [(("L", "L"), 1), (("L", "RGB"), 3), (("RGB", "RGB"), 3)])
def test_images_are_grey_if_all_are(tmp_path: Path, load: Load, modes: tuple[str, str], channels: int) -> None:
    for name, mode in zip("ab", modes, strict=True):
        put_class(tmp_path / "x" / name, 5, 77, mode)
    dataset = load(tmp_path / "x")
    assert dataset.train.images.shape[1] == channels
    assert dataset.train.images[..., 0, :].unique().tolist() == [77]


def test_images_of_several_sizes_need_an_image_size(root: Path, load: Load) -> None:
    put(root / "cat" / "wide.png", (1, 2, 3), (30, 20))
    with pytest.raises(ConfigError, match="of 2 sizes, not one square size: give --image-size"):
        load(root)
    assert load(root, 16).train.images.shape[1:] == (3, 16, 16)
    with pytest.raises(ConfigError, match="at least 1"):
        load(root, 0)


def test_images_that_do_not_fit_in_memory_are_refused_before_decoding(root: Path, load: Load) -> None:
    with pytest.raises(ConfigError, match=r"20 images of 900000x900000 take .* GB: give a smaller --image-size"):
        load(root, 900_000, source="resident")
    with pytest.raises(ConfigError, match=r"an image of 900000x900000 takes .* GB: give a smaller --image-size"):
        load(root, 900_000)


@pytest.mark.parametrize(("limit", "is_refused"), [(3000, True), (61_000, True), (62_000, False)])
def test_one_copy_of_a_resident_set_has_to_fit_in_memory(
    root: Path, load: Load, limit: int, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.folder.image_folder.available_memory", lambda: limit)
    if not is_refused:
        assert not load(root, 32, source="resident").is_streamed  # 61,440 bytes in all
        return
    with pytest.raises(ConfigError, match=r"20 images of 32x32 take .*: give a smaller --image-size or --source str"):
        load(root, 32, source="resident")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts the memory of a process there")
def test_decoding_keeps_no_copy_in_anonymous_memory(tmp_path: Path) -> None:
    """Pages of a mapped file can be written to disk when memory is short; the kernel kills a process for others."""
    images = tensor_on_disk((64, 512, 512), tmp_path)
    anonymous = _anonymous_kb()
    images.fill_(1)
    selected = select_images(images, torch.tensor([5, 3, 60]), tmp_path)
    assert _anonymous_kb() - anonymous < 8_000
    assert selected.shape == (3, 512, 512)
    assert int(selected.sum()) == 3 << 18
    assert list(tmp_path.iterdir()) == []


def _anonymous_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("kind", ["gif", "jfif", "JPG", pytest.param("avif", marks=NEEDS_AVIF)])
def test_a_class_may_have_images_of_any_format(root: Path, load: Load, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (shade, shade, shade)) for shade in (90, 255)]
    for index in range(3):
        frames[0].putpixel((0, 0), (40 * index, 0, 0))
        more = {"save_all": True, "append_images": frames[1:]} if kind in ("gif", "avif") else {}
        (root / "elk").mkdir(exist_ok=True)
        frames[0].save(root / "elk" / f"{index}.{kind}", **({"format": "JPEG"} if kind == "jfif" else more))
    dataset = load(root)
    assert len(dataset.train) + dataset.num_test == 23
    of_elk = dataset.train.images[dataset.train.labels == 2]
    assert bool(((of_elk[:, :, 4:, 4:].int() - 90).abs() <= 30).all())  # the first frame


def test_unreadable_images_are_counted_and_named(root: Path, load: Load) -> None:
    (root / "cat" / "000.png").write_bytes(b"not an image")
    whole = (root / "cat" / "001.png").read_bytes()
    (root / "cat" / "001.png").write_bytes(whole[:50])
    (root / "dog" / "002.png").rename(root / "cat" / "0001\n.png")
    (root / "cat" / "0001\n.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        load(root)
    message = str(caught.value)
    assert message.startswith("3 of 20 images cannot be read: ")
    assert message.endswith("; --skip-bad-images 3 leaves them out")
    assert str(root / "cat" / "000.png") in message
    assert "\n" not in message


def test_a_truncated_image_is_named(root: Path, load: Load) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    path = root / "dog" / "cut.jpg"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"1 of 21 images cannot be read: .*dog/cut\.jpg"):
        load(root)


def test_warnings_of_pillow_name_the_file(root: Path, load: Load, logged: list[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    damaged = root / "cat" / "damaged.png"
    Image.new("RGB", (8, 8)).save(damaged, exif=exif.tobytes()[:-6])
    load(root)
    assert len(logged) == 2
    assert logged[0].startswith(
        f"warning: folder:{root}: Pillow warns about 1 of 21 images: {damaged} (Corrupt EXIF data"
    )


def test_very_large_images_are_named(
    root: Path, load: Load, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)  # a photograph of 95 megapixels would take seconds
    put(root / "cat" / "large.png", size=(1000, 950), mode="L")
    load(root, 8)
    assert len(logged) == 1
    put(root / "cat" / "larger.png", size=(2000, 950), mode="L")
    with pytest.raises(
        DataError, match=r"1 of 22 .*: .*larger\.png \(it has more than 1 million pixels: scale it down\)"
    ):
        load(root, 8)


def test_a_palette_of_greys_is_grey(tmp_path: Path, load: Load) -> None:
    for number in range(6):
        path = tmp_path / "x" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.new("P", (8, 8), 1)
        grey.putpalette([0, 0, 0, 90 + number, 90 + number, 90 + number])
        grey.save(path)
    assert load(tmp_path / "x").train.shape == (1, 8, 8)
    coloured = Image.new("P", (8, 8), 1)
    coloured.putpalette([0, 0, 0, 90, 91, 90])
    coloured.save(tmp_path / "x" / "a" / "coloured.png")
    assert load(tmp_path / "x").train.shape == (3, 8, 8)


# ---- 16 bits ---------------------------------------------------------------------------------------------------------


def put_sixteen_bits(folder: Path, number: int, largest: int, name: str = "x") -> None:
    """Writes 16-bit images of 8 x 8 pixels with values from 0 to `largest`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        seed = zlib.crc32(f"{folder.parent.name}/{folder.name}/{name}{index}".encode())
        pixels = np.random.RandomState(seed).randint(0, largest + 1, (8, 8)).astype(np.uint16)
        pixels[0, 0], pixels[0, 1] = largest, 0
        Image.fromarray(pixels).save(folder / f"{name}{index}.{'png' if index % 2 else 'tif'}")


@pytest.mark.parametrize(("largest", "bits"), [(100, 8), (256, 10), (1023, 10), (3000, 12), (4095, 12), (16383, 14)])
def test_the_bits_that_16_bit_files_use_are_found_and_logged(
    tmp_path: Path, load: Load, logged: list[str], largest: int, bits: int
) -> None:
    for name in "ab":
        put_sixteen_bits(tmp_path / "x" / name, 6, largest)
    for _ in range(2):  # told at each use
        logged.clear()
        dataset = load(tmp_path / "x")
        assert dataset.significant_bits == bits
        assert dataset.train.images[:, 0, 0, 0].tolist() == [largest >> (bits - 8)] * len(dataset.train)
        told = (
            f"folder:{tmp_path / 'x'}: 12 training images have 16 bits and use {bits} of them: {2**bits - 1} is white"
        )
        assert logged[0] == told


def test_files_that_use_all_16_bits_keep_the_upper_8(tmp_path: Path, load: Load, logged: list[str]) -> None:
    for name in "ab":
        put_sixteen_bits(tmp_path / "x" / name, 6, 65535)
    dataset = load(tmp_path / "x")
    assert dataset.significant_bits == 16
    assert dataset.train.images[:, 0, 0, 0].unique().tolist() == [255]
    assert len(logged) == 1, logged


def test_the_training_images_decide_and_brighter_test_images_are_white(tmp_path: Path, load: Load) -> None:
    for name in "ab":
        put_sixteen_bits(tmp_path / "x" / "train" / name, 4, 1023)
        put_sixteen_bits(tmp_path / "x" / "test" / name, 2, 4000)
        put_class(tmp_path / "x" / "train" / name, 2, 200, mode="L")  # 8 bits, which stay as they are
    dataset = load(tmp_path / "x")
    assert dataset.significant_bits == 10
    assert dataset.train.images[:, 0, 0, 0].unique().tolist() == [200, 255]
    assert load_test_set(dataset).images[:, 0, 0, 0].unique().tolist() == [255]


def test_images_without_16_bits_have_no_significant_bits(root: Path, load: Load) -> None:
    assert load(root).significant_bits is None


def test_a_few_bright_images_that_leave_the_others_black_are_logged(
    tmp_path: Path, load: Load, logged: list[str]
) -> None:
    for name in "ab":
        put_sixteen_bits(tmp_path / "x" / name, 6, 1023)
    put_sixteen_bits(tmp_path / "x" / "a", 1, 65535, name="glare")
    load(tmp_path / "x")
    assert logged[0].startswith(f"warning: folder:{tmp_path / 'x'}: 12 of 13 16-bit images are nearly black")


@pytest.mark.parametrize(("largest", "is_refused"), [(4095, True), (1000, True), (65535, False)])
def test_colour_images_that_use_the_lower_bits_are_refused(
    tmp_path: Path, load: Load, largest: int, is_refused: bool
) -> None:
    """Pillow has the upper 8 bits only."""
    for number in range(12):
        path = tmp_path / "x" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(number).randint(0, largest + 1, (8, 8, 3))
        path.write_bytes(png_of_sixteen_bits(pixels))
    if is_refused:
        with pytest.raises(DataError, match=r"12 colour images, such as .*, have 16 bits .*: convert the images"):
            load(tmp_path / "x")
    else:
        assert load(tmp_path / "x").train.images.float().std() > 60


def png_of_sixteen_bits(pixels: np.ndarray) -> bytes:
    """Returns a PNG with 16 bits in each of 3 channels, which Pillow cannot write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    framed = (
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


# ---- Decoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("codec"), MemoryError(), ZeroDivisionError("division by zero")])
def test_any_exception_of_a_decoder_names_the_file(
    root: Path, load: Load, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Image.Image) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(
        DataError, match=rf"20 of 20 images cannot be read: {root}/cat/000.png \(.+\), .* and 17 more; --skip"
    ):
        load(root)


def test_a_long_strip_among_the_images_is_one_of_them(root: Path, load: Load) -> None:
    put(root / "cat" / "strip.png", size=(20_000, 1))
    assert len(load(root, 32).train) >= 18


def test_large_images_are_decoded_by_fewer_threads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def remember(max_workers: int) -> ThreadPoolExecutor:
        asked.append(max_workers)
        return ThreadPoolExecutor(max_workers)

    monkeypatch.setattr("trainer.data.folder.workers.ThreadPoolExecutor", remember)
    monkeypatch.setattr("trainer.data.folder.workers.num_available_cpus", lambda: 6)
    monkeypatch.setattr("trainer.data.folder.decode.available_memory", lambda: 4_000_000_000)
    index = FolderIndex.of(list_folder(root))
    read_headers(index)
    asked.clear()
    for height, width in ((8, 8), (10_000, 10_000), (20_000, 20_000)):
        index.extents[3] = torch.tensor([height, width])
        index.flags.bitwise_and_(PROBED)
        examine_files(index, log=print, save=lambda: None)
    assert asked == [6, 3, 1]
