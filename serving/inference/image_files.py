"""Image files in place of pixels: finds them in a request, and bounds what decoding them may cost.

A file is a few bytes that may unfold to gigabytes. Only its header is read before it is refused; only three formats are
accepted, so that the decoders of all others cannot be reached from the network.
"""

import struct
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from convoy.images import ImageError, Pixels, UnknownFormatError, use_image
from serving.errors import InvalidArgument, quote
from serving.inference.request import InferInput, InferRequest
from serving.inference.response_cache import MAX_DIGESTED_BYTES, digest
from serving.models.images import ImageTensor
from serving.models.loader import Model
from serving.protocol.tensors import DATATYPES, Buffer, Elements, to_array

if TYPE_CHECKING:
    from PIL.Image import Image

Result = TypeVar("Result")

FORMATS = ("JPEG", "PNG", "WEBP")

MAX_IMAGE_PIXELS = 1 << 26
"""Of one file: 67 million, which take up to half a gigabyte while they are prepared."""
MAX_REQUEST_PIXELS = 1 << 28
"""Of all files of a request, which are decoded within a few seconds of processor time."""
MAX_SCANS = 100
"""Of a JPEG file: a progressive one has about ten. Each scan of a few bytes costs a pass over all pixels."""

_SCAN = 0xDAFF
"""The bytes FF DA, which begin a scan, as a little-endian number."""
_ANIMATED = ("PNG", "WEBP")
"""Formats of which an animation is refused. JPEG files of phones hold a second picture, which nobody looks at."""


class ImageFiles:
    """The files that an input holds in place of pixels, not split yet: that copies them.

    Args:
        given: the input; its shape has been checked.
        images: the model's input.

    Attributes:
        arrived_ns: when they arrived, on the clock of `time.monotonic_ns`.
        num_files: by the shape.
        num_bytes: of all files.
        digest: for a model with a response cache; None before `find_digest`, and without one.
    """

    def __init__(self, given: InferInput, images: ImageTensor) -> None:
        self.arrived_ns = time.monotonic_ns()
        self.images = images
        self.digest: bytes | None = None
        self._given = given
        self.num_files = given.shape[0]
        data = given.data
        self.num_bytes = sum(map(len, data.values)) if isinstance(data, Elements) else len(data)

    def split(self) -> list[bytes]:
        """Returns the content of each file.

        Raises:
            InvalidArgument: the tensor is malformed.
        """
        data, shape = self._given.data, self._given.shape
        if not isinstance(data, Elements):
            elements: list[bytes] = to_array(DATATYPES["BYTES"], shape, data).ravel().tolist()
            return elements
        if len(data.values) != shape[0]:
            raise InvalidArgument(f"expected {shape[0]} BYTES elements for shape {list(shape)}, got {len(data.values)}")
        return [bytes(element) for element in data.values]

    def find_digest(self) -> bytes | None:
        """Sets and returns a digest of the files, in whichever form they were sent; None for more than is digested.

        Raises:
            InvalidArgument: the tensor is malformed.
        """
        self.digest = None if self.num_bytes > MAX_DIGESTED_BYTES else digest(self.split())
        return self.digest

    def decoded(self, pixels: Buffer) -> InferInput:
        """Returns the input with pixels, [N, C, H, W], in place of the files."""
        batch = self._given.shape[:1] if self.images.max_batch_size else ()
        return InferInput(self.images.name, "UINT8", (*batch, *self.images.shape), pixels)


class NeedsDecoding(Exception):
    """A request holds image files for a model, which must be decoded before it can run."""

    def __init__(self, request: InferRequest, model: Model, files: ImageFiles) -> None:
        super().__init__()
        self.request = request
        self.model = model
        self.files = files


def find_files(request: InferRequest, images: ImageTensor) -> ImageFiles | None:
    """Returns the image files that a request holds in place of pixels; None if it holds none.

    Args:
        images: the model's input.

    Raises:
        InvalidArgument: the tensor of files has a wrong shape, or holds too many.
    """
    if len(request.inputs) != 1 or request.inputs[0].datatype != "BYTES" or request.inputs[0].name != images.name:
        return None
    shape = request.inputs[0].shape
    if len(shape) not in (1, 2) or shape[1:] not in ((), (1,)) or not 1 <= shape[0] <= images.max_images:
        raise InvalidArgument(
            f"input {quote(images.name)} of model {quote(request.model_name)}: expected BYTES of shape [n] or [n, 1] "
            f"with n image files, 1 to {images.max_images}, got {quote(list(shape))}"
        )
    return ImageFiles(request.inputs[0], images)


def check_headers(files: list[bytes]) -> None:
    """Reads the headers of files, so that none is decoded if one of them, or all together, are refused.

    Raises:
        InvalidArgument: a file is none of the formats, an animation or too large, or all together are.
    """
    num_pixels = 0
    for index, data in enumerate(files):
        num_pixels += _use(files, index, partial(_check_header, data))
        if num_pixels > MAX_REQUEST_PIXELS:
            raise InvalidArgument(
                f"the images have more than {MAX_REQUEST_PIXELS / 1e6:.0f} million pixels together: send fewer"
            )


def decode_file(
    files: list[bytes], index: int, images: ImageTensor, room: Callable[[int, bool], AbstractContextManager[None]]
) -> Pixels:
    """Decodes and prepares one of the files, as in the training. Returns pixels of the model's shape, [C, H, W].

    Args:
        room: is entered with the number of pixels while they are decoded, and whether this is the first time: a file
            may be decoded once more, without its metadata.

    Raises:
        InvalidArgument: it is refused for its header, or cannot be decoded.
    """

    attempts = count(1)

    def prepare(image: "Image") -> Pixels:
        with room(_check_header(files[index], image), next(attempts) == 1):
            return images.preprocessing.prepare(image, images.shape)

    return _use(files, index, prepare)


def _use(files: list[bytes], index: int, use: Callable[["Image"], Result]) -> Result:
    """Opens one of the files and calls `use`.

    Raises:
        InvalidArgument: the file cannot be opened, or `use` fails.
    """
    try:
        return use_image(files[index], use, formats=FORMATS)
    except ImageError as error:
        raise _cannot_use(index + 1, len(files), error) from error


def _check_header(data: bytes, image: "Image") -> int:
    """Returns the number of pixels of a file that is opened and not decoded yet.

    Raises:
        ImageError: it is an animation, or too expensive to decode.
    """
    if image.width * image.height > MAX_IMAGE_PIXELS:
        limit = MAX_IMAGE_PIXELS / 1e6
        raise ImageError(f"it has {image.width} x {image.height} pixels, and at most {limit:.0f} million are accepted")
    if image.format in _ANIMATED and getattr(image, "is_animated", False):
        raise ImageError("it is an animation: send one image of it")
    if data.startswith(b"\xff\xd8") and not _has_one_scan(image) and _num_scans(data) > MAX_SCANS:
        raise ImageError(f"it has more than {MAX_SCANS} scans: save it again")
    return image.width * image.height


def _has_one_scan(image: Any) -> bool:
    """Returns whether the first scan of a JPEG file has all components at once: libjpeg then decodes no other.

    Args:
        image: Pillow has read it up to the end of that scan's header.
    """
    if image.format != "JPEG" or "progressive" in image.info:
        return False
    length = 6 + 2 * image.layers
    start = image.fp.tell() - 2 - length
    header = struct.pack(">BBHB", 0xFF, 0xDA, length, image.layers)
    return bytes(image.fp.getbuffer()[start : start + len(header)]) == header


def _num_scans(data: bytes) -> int:
    """Counts the scans of a JPEG file. `bytes.count` takes nine times as long, 5 % of decoding the file."""
    pairs = (np.frombuffer(data, "<u2", (len(data) - start) // 2, start) for start in (0, 1))
    return sum(int(np.count_nonzero(pair == _SCAN)) for pair in pairs)


def _cannot_use(number: int, total: int, error: ImageError) -> InvalidArgument:
    which = "the image" if total == 1 else f"image {number} of {total}"
    reason = "expected a JPEG, PNG or WebP file" if isinstance(error, UnknownFormatError) else str(error)
    return InvalidArgument(f"{which} cannot be used: {reason}")
