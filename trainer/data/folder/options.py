"""How a folder of images is opened."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convoy.cpus import available_memory
from trainer.recipes.augmentation import Square

if TYPE_CHECKING:
    from trainer.config import SourceChoice  # imports tyro

RESIDENT_SHARE = 4
"""`auto` keeps a set resident if `RESIDENT_SHARE` of them would fit in the device's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderOptions:
    """How a folder is opened.

    Args:
        image_size: width and height to which the images are resized; None if they all are squares of one size.
        source: whether the folder is resident, decoded once into one tensor, or streamed, decoded on demand; `auto`
            chooses by the size of its images and `memory`.
        memory: bytes of the device that trains; None for this machine's.
        skip_bad_images: number of files that may be left out because they cannot be decoded.
        square: how images become squares.
        num_threads: threads that decode streamed images outside of training; None for torch's number.
        known_path: the file of the data set that another process of this machine has just opened from the folder, with
            these options; the folder is then not listed again.
    """

    image_size: int | None = None
    source: "SourceChoice" = "auto"
    memory: int | None = None
    skip_bad_images: int = 0
    square: Square = "crop"
    num_threads: int | None = None
    known_path: Path | None = None

    def fits(self, num_bytes: int) -> bool:
        """Returns whether `auto` keeps images of this size resident."""
        memory = available_memory() if self.memory is None else self.memory
        return num_bytes <= memory // RESIDENT_SHARE
