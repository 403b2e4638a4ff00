"""What a version says of itself, to be held against it: `manifest.json` with digests, `golden.npz` with known answers.

Both are optional: a folder made for Triton has neither.
"""

import hashlib
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serving.errors import LoadError
from serving.protocol.tensors import DATATYPES, Array, TensorSpec

MANIFEST_FILE, GOLDEN_FILE = "manifest.json", "golden.npz"
DEFAULT_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Args:
    digests: SHA-256 in hexadecimal by file name.
    inputs, outputs: with the batch dimension as -1.
    golden_tolerance: how far a number may be from the golden answer.
    """

    digests: dict[str, str] = field(default_factory=dict)
    inputs: list[TensorSpec] = field(default_factory=list)
    outputs: list[TensorSpec] = field(default_factory=list)
    golden_tolerance: float = DEFAULT_TOLERANCE


def read_manifest(folder: Path) -> Manifest:
    """The version's manifest; an empty one where there is none.

    Raises:
        LoadError: it is not what a manifest looks like.
    """
    try:
        document = json.loads((folder / MANIFEST_FILE).read_bytes())
        return Manifest(
            digests={_plain(name): entry["sha256"] for name, entry in document.get("files", {}).items()},
            inputs=[_tensor(entry) for entry in document.get("inputs", [])],
            outputs=[_tensor(entry) for entry in document.get("outputs", [])],
            golden_tolerance=float(document.get("golden_tolerance", DEFAULT_TOLERANCE)),
        )
    except FileNotFoundError:
        return Manifest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{MANIFEST_FILE} cannot be read: {type(error).__name__}: {error}") from error


def verify_digests(folder: Path, manifest: Manifest) -> None:
    """Read every file that the manifest names.

    Raises:
        LoadError: one is missing or has another content, as when it was damaged or is still being copied.
    """
    for name, digest in manifest.digests.items():
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise LoadError(f"{name} is named in {MANIFEST_FILE} and cannot be read: {error.strerror}") from error
        if found != digest:
            raise LoadError(f"{name} is damaged: its SHA-256 is {found[:12]}…, {MANIFEST_FILE} says {digest[:12]}…")


def read_golden(folder: Path) -> dict[str, Array]:
    """Inputs and right answers by tensor name; empty where there are none.

    Raises:
        LoadError: the file cannot be read.
    """
    try:
        with (folder / GOLDEN_FILE).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise LoadError(f"{GOLDEN_FILE} cannot be read: {error}") from error


def _plain(name: str) -> str:
    """Digests are of files in the folder itself: a manifest does not make us read others."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"'{name}' is no name of a file in the version's folder")
    return name


def _tensor(entry: dict[str, Any]) -> TensorSpec:
    return TensorSpec(str(entry["name"]), DATATYPES[entry["datatype"]], tuple(int(size) for size in entry["shape"]))
