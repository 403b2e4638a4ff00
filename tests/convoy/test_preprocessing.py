"""Tests of how a manifest describes the preparation of images, and of the pixels that each method makes."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from convoy.preprocessing import Method, Preprocessing, PreprocessingError

OLD = {"resize": "shorter side, bilinear, antialiased", "crop": "center", "significant_bits": 12}
"""The section that version 0.1 wrote."""


def pictures() -> list[Image.Image]:
    """Returns images of several modes and sizes, without a file: decoders differ from version to version."""
    rows, columns = np.mgrid[0:90, 0:130]
    grey = (200 - 150 * (np.hypot(rows - 40, columns - 70) < 18)).astype(np.uint8)
    ramp = ((3 * rows + 2 * columns) % 256).astype(np.uint8)
    deep = (257 * ramp.astype(np.uint16)).astype(np.uint16)
    colour = np.stack([ramp, grey, 255 - ramp], axis=2)
    veiled = np.concatenate([colour, ramp[:, :, None]], axis=2)
    return [Image.fromarray(array) for array in (grey, ramp, deep, colour, veiled)]


@pytest.mark.parametrize(
    ("method", "digest"),
    [("fit", "d33063f366def74e"), ("pad", "de6146ea023902a8"), ("mnist", "5a5e6649dc256f5a")],
)
def test_pixels_change_only_with_the_revision(method: Method, digest: str) -> None:
    """A change here refuses every model that was exported before: raise the method's revision, and say why."""
    found = hashlib.sha256()
    for image in pictures():
        for shape in ((1, 28, 28), (3, 28, 28)):
            found.update(np.ascontiguousarray(Preprocessing(method).prepare(image, shape)).tobytes())
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize("method", ["fit", "pad", "mnist"])
def test_a_section_is_read_as_it_was_written(method: Method) -> None:
    for bits in (8, 12, 16):
        written = Preprocessing(method, bits)
        assert Preprocessing.from_json(written.to_json()) == written
    assert len({Preprocessing(method, bits).sha256 for bits in (8, 12, 16)}) == 3


def test_a_section_of_version_0_1_is_read() -> None:
    assert Preprocessing.from_json(OLD) == Preprocessing("fit", 12)
    assert Preprocessing.from_json({}) == Preprocessing()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"revision": 2, "sha256": "ab" * 32}, r"were prepared as abababababab… says \(revision 2\), and this version"),
        ({"method": "imagenet"}, "the method 'imagenet' is not known: expected one of"),
        ({"method": None}, "the method None is not known"),
        ({"significant_bits": 11}, "significant_bits is 11: expected one of"),
    ],
)
def test_another_way_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(PreprocessingError, match=reason):
        Preprocessing.from_json(Preprocessing().to_json() | changes)


def test_an_old_section_with_another_crop_is_refused() -> None:
    with pytest.raises(PreprocessingError, match="in a way that is not known"):
        Preprocessing.from_json(OLD | {"crop": "corner"})
