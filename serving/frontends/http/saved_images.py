"""Images that users of the page label, as a folder from which `convoy train FOLDER` trains: one folder a class."""

import hashlib
import os
import tempfile
import threading
from pathlib import Path
from urllib.parse import quote as percent_encode

from serving.errors import Internal, InvalidArgument, ResourceExhausted
from serving.models.files import describe

MAX_IMAGES = 10_000
MAX_IMAGE_BYTES = 8 << 20
_MAX_NAME = 200

_SUFFIXES = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"RIFF", ".webp"))
"""By the first bytes of files that the decoder has accepted."""


class SavedImages:
    """Writes images into a folder, a limited number of them. Thread-safe.

    The files' names are digests of their contents, and their folders are named by the labels, with all characters that
    a path could misread as percent codes: nothing that a user sends is a path.

    Args:
        folder: is made when the first image is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()

    def save(self, label: str, content: bytes) -> Path:
        """Writes one image, which a decoder has accepted. Returns its file. An image that is there stays as it is.

        Raises:
            InvalidArgument: it is too large, or the label too long.
            ResourceExhausted: the folder is full.
            Internal: the folder cannot be written.
        """
        if len(content) > MAX_IMAGE_BYTES:
            raise InvalidArgument(f"the image has {len(content)} bytes: at most {MAX_IMAGE_BYTES} are saved")
        suffix = next((suffix for start, suffix in _SUFFIXES if content.startswith(start)), ".img")
        file = self.folder / _folder_name(label) / f"{hashlib.sha256(content).hexdigest()[:24]}{suffix}"
        with self._lock:
            try:
                if not file.exists():
                    self._write(file, content)
            except OSError as error:
                raise Internal(f"the image cannot be saved: {describe(error)}") from error
        return file

    def count(self) -> int:
        """Returns the number of images in the folder."""
        return sum(1 for file in self.folder.glob("*/*") if not file.name.startswith("."))

    def _write(self, file: Path, content: bytes) -> None:
        if self.count() >= MAX_IMAGES:
            raise ResourceExhausted(f"the folder of saved images holds {MAX_IMAGES}: move some of them away")
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".saving-", dir=file.parent)
        try:
            with os.fdopen(descriptor, "wb") as writing:
                writing.write(content)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise


def _folder_name(label: str) -> str:
    """Returns the name of a label's folder."""
    name = percent_encode(label, safe=" ")
    name = "%2E" + name[1:] if name.startswith(".") else name
    if not name.strip() or len(name) > _MAX_NAME:
        raise InvalidArgument("the label is empty or too long for the name of a folder")
    return name
