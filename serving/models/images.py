"""The input of a model that takes images, and how they are prepared for it."""

from dataclasses import dataclass

from convoy.preprocessing import Preprocessing
from serving.models.spec import ModelSpec

_RANK = 3
_CHANNELS = (1, 3)


@dataclass(frozen=True, slots=True)
class ImageTensor:
    """The one input of an image classifier.

    Args:
        name: of the input.
        shape: (C, H, W); C is 1 for grey or 3 for RGB.
        max_batch_size: images in one request; 0 for one image without a batch dimension.
        preprocessing: as in the training.
    """

    name: str
    shape: tuple[int, int, int]
    max_batch_size: int
    preprocessing: Preprocessing

    @property
    def max_images(self) -> int:
        """Images in one request."""
        return self.max_batch_size or 1


def find_image_tensor(spec: ModelSpec, preprocessing: Preprocessing | None) -> ImageTensor | None:
    """Returns the image input of a model; None if its manifest does not say that its input holds images.

    Args:
        preprocessing: by the manifest.
    """
    if preprocessing is None or len(spec.inputs) != 1:
        return None
    [only] = spec.inputs
    dims = only.shape[1:] if spec.max_batch_size else only.shape
    if only.datatype.name != "UINT8" or len(dims) != _RANK or dims[0] not in _CHANNELS or min(dims) < 1:
        return None
    channels, height, width = dims
    return ImageTensor(only.name, (channels, height, width), spec.max_batch_size, preprocessing)
