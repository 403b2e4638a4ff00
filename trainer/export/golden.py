"""The golden batch: images and the trained model's logits for them, with which a server checks a version it loads."""

import io

import numpy as np
import torch

from trainer.data import Images
from trainer.export.formats import FloatArray

MIN_GOLDEN, MAX_GOLDEN = 16, 64


def golden_images(training: Images, indices: torch.Tensor) -> torch.Tensor:
    """Returns one training image of each class (of the first 64 classes), and others to make up 16.

    Args:
        indices: int64 `[N]`, the images that the model was trained on.

    Returns:
        Uint8 `[G, C, H, W]`; G is between 16 and 64, or N if there are fewer.
    """
    labels = training.labels[indices].numpy()
    _, first_of_class = np.unique(labels, return_index=True)
    others = np.setdiff1d(np.arange(len(labels))[: MIN_GOLDEN + len(first_of_class)], first_of_class)
    chosen = np.concatenate([first_of_class[:MAX_GOLDEN], others[: max(0, MIN_GOLDEN - len(first_of_class))]])
    return training.take(indices[torch.from_numpy(chosen)])


def golden_file(images: torch.Tensor, logits: FloatArray) -> bytes:
    """Returns the content of `golden.npz`: `images`, and `logits` float32 `[G, classes]` of the trained model."""
    file = io.BytesIO()
    np.savez(file, images=images.numpy(), logits=logits)
    return file.getvalue()
