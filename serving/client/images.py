"""Converts image files, Pillow images and arrays to the pixels that a model takes.

`convoy.preprocessing` does it as the training did, so that the model sees a file as it saw it in training. This module
knows no network.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from convoy.digits import is_inverted
from convoy.images import (
    BIT_DEPTHS,
    SIGNIFICANT_BITS,
    ImageError,
    Pixels,
    explain_decode_errors,
    has_sixteen_bits,
    use_image,
)
from convoy.named_files import read_file
from convoy.preprocessing import PREPROCESSING, Preprocessing, PreprocessingError
from protos import model_config_pb2
from serving.client.errors import invalid_argument

INVERTED_WARNING = "looks inverted: dark on a light ground, and MNIST and its like are light on dark"
"""For grey models whose manifest does not say that they are of handwritten digits."""

DARK_WARNING = "is nearly black: a file of 16 bits that uses few of them must be scaled to 8 bits first"
"""For files of 16 bits whose model was trained on files of 8 bits, or on ones that use more bits."""

_MIN_BRIGHTNESS = 16
NO_FILES = "the server prepares no image files for this model: let the client do it"


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """An image as the model takes it.

    Args:
        name: the file's path, or the name that the caller gave.
        pixels: uint8 [C, H, W].
        warning: what may be wrong with it, or None.
    """

    name: str
    pixels: Pixels
    warning: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ImageFile:
    """An image file that is sent as it is, JPEG, PNG or WebP, and that the server prepares.

    Args:
        name: the file's path, or the name that the caller gave.
        content: of the file.
    """

    name: str
    content: bytes
    warning: None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file.

        Raises:
            ClientError: it cannot be read.
        """
        try:
            return cls(os.fspath(path), read_file(path))
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            reason = getattr(error, "strerror", None) or error
            raise invalid_argument(f"{os.fspath(path)}: {reason}") from error


ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | PreparedImage | ImageFile


@dataclass(frozen=True, slots=True)
class ImageInput:
    """The one input of an image classifier.

    Args:
        name: name of the tensor.
        shape: (C, H, W); C is 1 for grey or 3 for RGB.
        max_batch_size: largest number of images in a request; 0 for one image without a batch dimension.
        preprocessing: as in the training.
        takes_files: whether the server prepares files itself.
    """

    name: str
    shape: tuple[int, int, int]
    max_batch_size: int
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    takes_files: bool = False

    @classmethod
    def from_config(cls, config: "model_config_pb2.ModelConfig") -> "ImageInput":
        """Reads the input from a model's configuration.

        Raises:
            ClientError: the model takes something else than images, or they are prepared in a way that is not known.
        """
        inputs = ", ".join(f"{i.name} {_type_name(i.data_type)} {list(i.dims)}" for i in config.input)
        if len(config.input) != 1 or config.input[0].data_type != model_config_pb2.TYPE_UINT8:
            raise invalid_argument(f"model {config.name!r} takes {inputs}, not one UINT8 tensor of images")
        only = config.input[0]
        if len(only.dims) != 3 or only.dims[0] not in (1, 3) or min(only.dims) < 1:
            raise invalid_argument(
                f"model {config.name!r} takes {inputs}, not images of a fixed size, [1 or 3, height, width]"
            )
        channels, height, width = only.dims
        preprocessing, takes_files = _preprocessing(config)
        return cls(only.name, (channels, height, width), config.max_batch_size, preprocessing, takes_files)

    def prepare(self, source: ImageSource, *, name: str = "image", invert: bool = False) -> PreparedImage | ImageFile:
        """Prepares one image.

        Args:
            source: a path; a Pillow image; or uint8 pixels of the model's own shape [C, H, W], or [H, W], or [H, W, C]
                with 1, 3 or 4 (RGBA) channels.
            name: the name for an image without a path.
            invert: whether to take the negative.

        Raises:
            ClientError: the file does not exist, it or the Pillow image cannot be decoded, or the array has another
                type or shape.
        """
        if isinstance(source, PreparedImage):
            return source
        if isinstance(source, ImageFile):
            if not self.takes_files or invert:
                raise invalid_argument(
                    f"{source.name}: " + ("cannot be inverted, as it is sent as it is" if invert else NO_FILES)
                )
            return source
        if not isinstance(source, str | os.PathLike | Image.Image | np.ndarray):
            kind = type(source).__name__
            raise invalid_argument(f"{name}: expected a path, a Pillow image, an array or an ImageFile, not {kind}")
        if isinstance(source, str | os.PathLike):
            name = os.fspath(source)
        pixels, is_deep = self._pixels(source, name)
        if invert:
            pixels = 255 - pixels
        warning = None
        if len(pixels) == 1 and self.preprocessing.method == "fit" and is_inverted(pixels[0]):
            warning = INVERTED_WARNING
        elif is_deep and pixels.max() < _MIN_BRIGHTNESS:
            warning = DARK_WARNING
        return PreparedImage(name, pixels, warning)

    def _pixels(
        self, source: str | os.PathLike[str] | Image.Image | npt.NDArray[Any], name: str
    ) -> tuple[Pixels, bool]:
        """Returns the pixels, and whether they come from 16 bits."""
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8:
                raise invalid_argument(f"{name}: pixels are uint8, 0 to 255, and these are {source.dtype}")
            own = source.shape == self.shape
            return source if own else self.preprocessing.prepare(_from_array(source, name), self.shape), False
        try:
            if isinstance(source, Image.Image):
                with explain_decode_errors():
                    return self._prepare(source)
            return use_image(Path(source), self._prepare)
        except ImageError as error:
            match error.__cause__:
                case FileNotFoundError():
                    reason = "no such file"
                case IsADirectoryError():
                    reason = "a folder, not an image"
                case _:
                    reason = f"cannot be read as an image: {error}"
            raise invalid_argument(f"{name}: {reason}") from error

    def _prepare(self, image: Image.Image) -> tuple[Pixels, bool]:
        if 0 in image.size:
            raise ImageError("it has no pixels")
        is_deep = has_sixteen_bits(image)  # which loading forgets
        return self.preprocessing.prepare(image, self.shape), is_deep


def iter_sources(images: ImageSource | Sequence[ImageSource], shape: tuple[int, int, int]) -> Iterator[ImageSource]:
    """Yields one image after the other from a single image, a sequence of images or an array of many.

    An array of 4 dimensions holds many images. One of 3 dimensions holds many grey images, [N, H, W], unless its shape
    is the model's or its last dimension is that of channels (1, 3 or 4).

    Args:
        images: what the caller gave.
        shape: the model's (C, H, W).
    """
    if isinstance(images, np.ndarray):
        is_one = images.ndim < 3 or (images.ndim == 3 and (images.shape == shape or images.shape[2] in (1, 3, 4)))
        yield from [images] if is_one else images
    elif isinstance(images, Iterable) and not isinstance(images, str | bytes):
        yield from images
    else:
        yield images


def _preprocessing(config: "model_config_pb2.ModelConfig") -> tuple[Preprocessing, bool]:
    """Returns a model's preprocessing, and whether the server told it, which then takes files too."""
    try:
        if PREPROCESSING in config.parameters:
            return Preprocessing.from_json(json.loads(config.parameters[PREPROCESSING].string_value)), True
        bits = config.parameters[SIGNIFICANT_BITS].string_value if SIGNIFICANT_BITS in config.parameters else "16"
        if bits not in map(str, BIT_DEPTHS):
            raise PreprocessingError(f"it has the parameter {SIGNIFICANT_BITS} {bits!r}, no bit depth")
        return Preprocessing(significant_bits=int(bits)), False
    except (PreprocessingError, ValueError, TypeError, AttributeError) as error:
        raise invalid_argument(f"images cannot be prepared for model {config.name!r}: {error}") from error


def _from_array(array: Pixels, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise invalid_argument(
            f"{name}: expected [H, W], [H, W, 1, 3 or 4] or the model's own shape, got {list(array.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _type_name(data_type: int) -> str:
    return str(model_config_pb2.DataType.Name(data_type)).removeprefix("TYPE_")
