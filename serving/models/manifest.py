"""A version's `manifest.json`: the digests of its files, its tensors, how its images are prepared.

It is optional: a model repository made for Triton has none.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convoy.json_errors import describe_json_error
from convoy.preprocessing import PREPROCESSING, Preprocessing, PreprocessingError
from serving.errors import LoadError, TransientLoadError
from serving.models.files import describe, read_text
from serving.protocol.tensors import DATATYPES, TensorSpec

MANIFEST_FILE = "manifest.json"
DEFAULT_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The fields of a manifest that the server uses.

    Args:
        digests: SHA-256 in hexadecimal by file name.
        inputs: the model's inputs; -1 for the batch dimension.
        outputs: the model's outputs; -1 for the batch dimension.
        golden_tolerance: largest absolute difference allowed in the golden check.
        preprocessing: how images are prepared for the model; None for a model whose manifest does not mention images.
    """

    digests: dict[str, str] = field(default_factory=dict)
    inputs: list[TensorSpec] = field(default_factory=list)
    outputs: list[TensorSpec] = field(default_factory=list)
    golden_tolerance: float = DEFAULT_TOLERANCE
    preprocessing: Preprocessing | None = None


def read_manifest(folder: Path) -> Manifest:
    """Returns the version's manifest, or an empty one if there is none.

    Raises:
        TransientLoadError: the file cannot be read.
        LoadError: it is not a valid manifest, or says that images are prepared in another way than here.
    """
    try:
        text = read_text(folder / MANIFEST_FILE)
        if text is None:
            return Manifest()
        document = json.loads(text)
        return Manifest(
            digests={_checked_name(name): entry["sha256"] for name, entry in document.get("files", {}).items()},
            inputs=[_tensor(entry) for entry in document.get("inputs", [])],
            outputs=[_tensor(entry) for entry in document.get("outputs", [])],
            golden_tolerance=float(document.get("golden_tolerance", DEFAULT_TOLERANCE)),
            preprocessing=Preprocessing.from_json(document[PREPROCESSING]) if PREPROCESSING in document else None,
        )
    except PreprocessingError as error:
        raise LoadError(f"{MANIFEST_FILE}: {error}; export the model again, or serve it as it was before") from error
    except OSError as error:
        raise TransientLoadError(f"{MANIFEST_FILE} cannot be read: {describe(error)}") from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{MANIFEST_FILE} cannot be read: {describe_json_error(error)}") from error


def verify_digests(folder: Path, manifest: Manifest) -> None:
    """Reads every file that the manifest names and compares its digest.

    Raises:
        TransientLoadError: a file cannot be read.
        LoadError: a file is missing, or its content differs: it is damaged, or still being copied.
    """
    for name, digest in manifest.digests.items():
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            kind = LoadError if isinstance(error, FileNotFoundError) else TransientLoadError
            raise kind(f"{MANIFEST_FILE} names {name}, which cannot be read: {describe(error)}") from error
        if found != digest:
            raise LoadError(f"{name} is damaged: its SHA-256 is {found[:12]}…, {MANIFEST_FILE} says {digest[:12]}…")


def _checked_name(name: str) -> str:
    """Rejects paths: a manifest must not make the server read files outside the version's folder."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"'{name}' is not the name of a file in the version's folder")
    os.fsencode(name)  # raises a ValueError if no file can have the name
    return name


def _tensor(entry: dict[str, Any]) -> TensorSpec:
    return TensorSpec(str(entry["name"]), DATATYPES[entry["datatype"]], tuple(int(size) for size in entry["shape"]))
