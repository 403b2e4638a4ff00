"""The worst mistakes of a run's validations, kept in its folder so that a page can show them while the run goes on.

What a run keeps is bounded: `NUM_KEPT` images of at most `MAX_SIZE` pixels, after about `MAX_EPOCHS` of its epochs: 20
KB an epoch for MNIST, and 5 MB at most for a run of any length.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convoy.named_files import read_regular
from trainer.files import write_atomically

FOLDER = "mistakes"
NUM_KEPT = 16
"""Mistakes of an epoch."""
MAX_SIZE = 48
"""Pixels of the longer side; larger images are shrunk by leaving out pixels."""
MAX_EPOCHS = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mistake:
    """A validation image that the network classifies wrongly.

    Args:
        pixels: uint8 `[H, W]` or `[H, W, 3]`.
        confidence: the probability of the predicted class.
    """

    pixels: npt.NDArray[np.uint8]
    label: str
    predicted: str
    confidence: float

    @property
    def caption(self) -> str:
        return f"{self.label}, taken for {self.predicted} ({100 * self.confidence:.0f} %)"


def is_kept(epoch: int, num_epochs: int) -> bool:
    """Returns whether the mistakes after an epoch are kept: of each epoch in short runs, always of the last."""
    return epoch == num_epochs or epoch % -(-num_epochs // MAX_EPOCHS) == 0


def write_mistakes(folder: Path, epoch: int, mistakes: Sequence[Mistake]) -> None:
    """Writes the mistakes after an epoch.

    Raises:
        OSError: they cannot be written.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    content = {"epoch": epoch, "mistakes": [_to_json(mistake) for mistake in mistakes[:NUM_KEPT]]}
    write_atomically(folder / FOLDER / f"{epoch:06d}.json", (json.dumps(content) + "\n").encode())


def read_mistakes(folder: Path) -> list[dict[str, Any]]:
    """Returns the mistakes of a run, by epoch: what a page shows. Files that cannot be read are left out.

    `pixels` is in base64, uint8 `[channels, height, width]`.
    """
    found = []
    for path in sorted((folder / FOLDER).glob("[0-9]*.json")):
        try:
            value = json.loads(read_regular(path))
        except (OSError, ValueError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _to_json(mistake: Mistake) -> dict[str, Any]:
    pixels = mistake.pixels[..., None] if mistake.pixels.ndim == 2 else mistake.pixels
    step = -(-max(pixels.shape[:2]) // MAX_SIZE)
    small = np.ascontiguousarray(pixels[::step, ::step].transpose(2, 0, 1))
    return {
        "label": mistake.label,
        "predicted": mistake.predicted,
        "confidence": round(mistake.confidence, 4),
        "channels": small.shape[0],
        "height": small.shape[1],
        "width": small.shape[2],
        "pixels": base64.b64encode(small.tobytes()).decode(),
    }
