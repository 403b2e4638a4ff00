"""How a model's images are prepared: the part of a manifest that training writes, and server and client follow.

A method is known by the SHA-256 of its description. Whoever changes what a method does to pixels raises its revision;
`tests/convoy/test_preprocessing.py` compares the pixels themselves.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from convoy.digits import prepare_digit
from convoy.images import BIT_DEPTHS, SIGNIFICANT_BITS, Pixels, pad_image, prepare_image, upright_and_opaque

if TYPE_CHECKING:
    from PIL.Image import Image

Method = Literal["fit", "pad", "mnist"]

PREPROCESSING = "preprocessing"
"""Name of the manifest's section, and of the parameter of a served model's configuration that holds it as JSON."""

_FIT: dict[str, str | int] = {"resize": "shorter side, bilinear, antialiased", "crop": "center"}
_DESCRIPTIONS: dict[Method, dict[str, str | int]] = {
    "fit": _FIT | {"revision": 1},
    "pad": {"resize": "longer side, bilinear, antialiased", "crop": "none, white margins", "revision": 1},
    "mnist": {
        "resize": "box of the ink to 20 of 28 pixels, bilinear, antialiased; light on dark, whatever the file",
        "crop": "center of mass",
        "revision": 1,
    },
}


class PreprocessingError(ValueError):
    """Images were prepared for a model in a way that this version of Convoy does not know."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """A way to prepare images.

    Args:
        method: fit: resize the shorter side and crop the centre. pad: show all of it, on white. mnist: for handwritten
            digits, as MNIST was made.
        significant_bits: of 16-bit grey images; the largest value that they hold becomes white.
    """

    method: Method = "fit"
    significant_bits: int = 16

    def prepare(self, image: "Image", shape: tuple[int, int, int]) -> Pixels:
        """Prepares an opened image. Returns uint8 pixels of `shape`, [C, H, W].

        Raises:
            ValueError: the pixels are floating-point numbers, or integers outside of 0 to 65535.
        """
        match self.method:
            case "fit":
                return prepare_image(image, shape, significant_bits=self.significant_bits)
            case "pad":
                return pad_image(upright_and_opaque(image), shape, significant_bits=self.significant_bits)
            case "mnist":
                return prepare_digit(image, shape, significant_bits=self.significant_bits)

    @property
    def sha256(self) -> str:
        """SHA-256 of the description, in hexadecimal."""
        return hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, str | int]:
        """Returns the section of a manifest."""
        return self._description() | {"sha256": self.sha256}

    @classmethod
    def from_json(cls, section: Mapping[str, Any]) -> Self:
        """Reads the section of a manifest. One without a digest, as version 0.1 wrote it, is of the method `fit`.

        Raises:
            PreprocessingError: this version of Convoy prepares images in another way, or does not know the method.
        """
        bits = section.get(SIGNIFICANT_BITS, 16)
        if bits not in BIT_DEPTHS:
            raise PreprocessingError(f"{SIGNIFICANT_BITS} is {bits!r}: expected one of {BIT_DEPTHS}")
        if "sha256" not in section:
            if any(section.get(key, value) != value for key, value in _FIT.items()):
                raise PreprocessingError(f"images are prepared in a way that is not known: {dict(section)}")
            return cls(significant_bits=bits)
        method: Any = section.get("method")
        if method not in get_args(Method):
            raise PreprocessingError(f"the method {method!r} is not known: expected one of {get_args(Method)}")
        own = cls(method, bits)
        if own.sha256 != section["sha256"]:
            theirs = str(section["sha256"])[:12]
            raise PreprocessingError(
                f"the model's images were prepared as {theirs}… says (revision {section.get('revision')}), and this "
                f"version of Convoy prepares them as {own.sha256[:12]}… (revision {own.to_json()['revision']})"
            )
        return own

    def _description(self) -> dict[str, str | int]:
        return {"method": self.method, **_DESCRIPTIONS[self.method], SIGNIFICANT_BITS: self.significant_bits}
