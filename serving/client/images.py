"""Makes the pixels that a model takes out of whatever the caller has: image files, Pillow images, arrays.

The same steps as the trainer takes for a folder of images (`trainer.data.folder.decode`), so that a file is seen as it
was in training: EXIF orientation, 16 bits by their upper 8, transparency on white, the shorter side resized with
antialiasing, then the centre. Knows no network.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from protos import model_config_pb2
from serving.client.errors import invalid

Pixels: TypeAlias = npt.NDArray[np.uint8]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What counts as an image in a folder; a file named by itself may be called anything."""
INVERTED = "looks inverted: dark on a light ground, and MNIST and its like are light on dark"
"""Said of images for grey models; what a model was trained on, the server does not tell."""

_BAD_BYTES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise on bad bytes."""
_MIN_CONTRAST = 32


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """An image as the model takes it.

    Args:
        name: what the caller knows it by.
        pixels: uint8 [C, H, W].
        warning: what may be wrong with it, or None.
    """

    name: str
    pixels: Pixels
    warning: str | None = None


Source: TypeAlias = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | Prepared


@dataclass(frozen=True, slots=True)
class ImageInput:
    """The one input of an image classifier.

    Args:
        name: the tensor's.
        shape: (C, H, W); C is 1 (grey) or 3 (RGB).
        batch: how many images a request may hold; 0: one, and the tensor has no batch dimension.
    """

    name: str
    shape: tuple[int, int, int]
    batch: int

    @classmethod
    def of(cls, config: "model_config_pb2.ModelConfig") -> "ImageInput":
        """The input that a model's configuration tells of.

        Raises:
            ClientError: the model takes something else than images.
        """
        told = ", ".join(f"{i.name} {_type_name(i.data_type)} {list(i.dims)}" for i in config.input)
        if len(config.input) != 1 or config.input[0].data_type != model_config_pb2.TYPE_UINT8:
            raise invalid(f"model {config.name!r} takes {told}, not one UINT8 tensor of images")
        only = config.input[0]
        if len(only.dims) != 3 or only.dims[0] not in (1, 3) or min(only.dims) < 1:
            raise invalid(f"model {config.name!r} takes {told}, not images of a fixed size, [1 or 3, height, width]")
        channels, height, width = only.dims
        return cls(only.name, (channels, height, width), config.max_batch_size)

    def prepare(self, source: Source, *, name: str = "image", invert: bool = False) -> Prepared:
        """One image, as the model takes it.

        Args:
            source: a path; a Pillow image; uint8 pixels of the model's own shape [C, H, W], or [H, W], or [H, W, C]
                with 1, 3 or 4 (RGBA) channels.
            name: of what has no path.
            invert: take the negative.

        Raises:
            ClientError: no such file, not an image, or an array of another type or shape.
        """
        if isinstance(source, Prepared):
            return source
        if isinstance(source, str | os.PathLike):
            name = os.fspath(source)
        pixels = self._pixels(source, name)
        if invert:
            pixels = 255 - pixels
        return Prepared(name, pixels, INVERTED if len(pixels) == 1 and is_inverted(pixels[0]) else None)

    def _pixels(self, source: Source, name: str) -> Pixels:
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8:
                raise invalid(f"{name}: pixels are uint8, 0 to 255, and these are {source.dtype}")
            if source.shape == self.shape:
                return source
            return self._fit(_from_array(source, name))
        if isinstance(source, Image.Image):
            return self._fit(source)
        assert not isinstance(source, Prepared)
        return self._read(Path(source), name)

    def _read(self, path: Path, name: str) -> Pixels:
        try:
            with Image.open(path) as opened:
                return self._fit(opened)
        except FileNotFoundError:
            raise invalid(f"{name}: no such file") from None
        except IsADirectoryError:
            raise invalid(f"{name}: a folder, not an image") from None
        except _BAD_BYTES as error:
            reason = " ".join(str(error).replace(str(path), "it").split()) or type(error).__name__
            raise invalid(f"{name}: cannot be read as an image: {reason}") from error

    def _fit(self, image: Image.Image) -> Pixels:
        """uint8 [C, H, W]."""
        channels, height, width = self.shape
        image = _on_white(_to_eight_bits(ImageOps.exif_transpose(image))).convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            scale = max(width / image.width, height / image.height)
            size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
            left, top = (size[0] - width) // 2, (size[1] - height) // 2
            image = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
        pixels = np.asarray(image)
        return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def each_source(images: Source | Sequence[Source], shape: tuple[int, int, int]) -> Iterator[Source]:
    """One image after the other, whether the caller gave one, a sequence of them, or an array of many.

    An array of 4 dimensions is many images; one of 3 is many grey ones, [N, H, W], unless its shape is the model's or
    its last dimension is that of channels (1, 3 or 4).
    """
    if isinstance(images, np.ndarray):
        is_one = images.ndim < 3 or (images.ndim == 3 and (images.shape == shape or images.shape[2] in (1, 3, 4)))
        yield from [images] if is_one else images
    elif isinstance(images, str | os.PathLike | Image.Image | Prepared):
        yield images
    else:
        yield from images


def is_inverted(pixels: Pixels) -> bool:
    """Whether a grey image [H, W] shows something dark on a light ground.

    The ground is what most of the outermost pixels show: their median. It is light if it is nearer to the image's
    lightest pixels than to its darkest (the 99th and 1st percentile, so that a speck decides nothing, and a photograph
    of paper in the shade still counts as light). An image with next to no contrast has no ground.
    """
    darkest, lightest = np.percentile(pixels, (1, 99))
    if lightest - darkest < _MIN_CONTRAST:
        return False
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return bool(np.median(border) > (int(darkest) + int(lightest)) / 2)


def _from_array(array: Pixels, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise invalid(f"{name}: expected [H, W], [H, W, 1, 3 or 4] or the model's own shape, got {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (which Pillow would clip at 255) by its upper byte."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white


def _type_name(data_type: int) -> str:
    return str(model_config_pb2.DataType.Name(data_type)).removeprefix("TYPE_")
