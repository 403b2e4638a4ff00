"""Channels and sizes of decoded images, and images that cannot be decoded."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.data.folder.image_files import Load, put, put_class
from trainer.data.folder.probe import probe_images
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
        load(root, 900_000)


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
    (root / "dog" / "002.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        load(root)
    message = str(caught.value)
    assert message.startswith("3 of 20 images cannot be read: ")
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
    assert logged[0].startswith(f"folder:{root}: Pillow warns about 1 of 21 images: {damaged} (Corrupt EXIF data")


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


def test_a_palette_of_greys_is_grey(tmp_path: Path) -> None:
    coloured, grey = Image.new("P", (8, 8), 1), Image.new("P", (8, 8), 1)
    coloured.putpalette([0, 0, 0, 90, 91, 90])
    grey.putpalette([0, 0, 0, 90, 90, 90])
    coloured.save(tmp_path / "coloured.png")
    grey.save(tmp_path / "grey.png")
    grey, both = [tmp_path / "grey.png"], [tmp_path / "grey.png", tmp_path / "coloured.png"]
    assert [probe_images(paths, size_given=False).num_channels for paths in (grey, both)] == [1, 3]
