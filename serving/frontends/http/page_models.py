"""The models as the page shows them: the states of their versions, and what their manifests say of them."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from serving.errors import ServingError
from serving.models.manifest import MANIFEST_FILE
from serving.protocol.admin import AdminService
from serving.protocol.json_messages import to_json

MAX_MANIFEST_BYTES = 4 << 20


def describe_models(admin: AdminService) -> list[dict[str, Any]]:
    """Returns all models, each with its versions and the input of the one that serves. Reads files."""
    return [_described(admin, to_json(state)) for state in admin.control.models().models]


def _described(admin: AdminService, model: dict[str, Any]) -> dict[str, Any]:
    name = model["name"]
    folder = admin.repository.standing(name)[1].folder
    for version in model["versions"]:
        version.update({} if folder is None else _read(folder / str(version["version"])))
    try:
        serving = admin.repository.get(name)
    except ServingError:
        return model | {"input": None, "labels": []}
    images = serving.images
    labels = next(iter(serving.labels.values()), [])
    given = None
    if images is not None:
        given = {
            "name": images.name,
            "shape": images.shape,
            "max_batch_size": images.max_batch_size,
            "method": images.preprocessing.method,
        }
    return model | {"input": given, "labels": labels}


def _read(folder: Path) -> dict[str, Any]:
    """Returns what a version's manifest says of its quality and origin; nothing without a readable one."""
    file = folder / MANIFEST_FILE
    try:
        stats = file.stat()
        if stats.st_size > MAX_MANIFEST_BYTES:
            return {}
        return _parsed(file, stats.st_mtime_ns, stats.st_size)
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        return {}


@lru_cache(256)
def _parsed(file: Path, mtime_ns: int, size: int) -> dict[str, Any]:
    """Reads a manifest; once, until it changes."""
    document = json.loads(file.read_bytes())
    metrics, origin = document.get("metrics") or {}, document.get("origin") or {}
    recipe = (origin.get("config") or {}).get("recipe") or {}
    return {
        "accuracy": metrics.get("val_accuracy"),
        "num_images": metrics.get("num_val"),
        "interval": metrics.get("val_interval"),
        "exported": origin.get("time"),
        "run": origin.get("run"),
        "dataset": origin.get("dataset"),
        "recipe": recipe.get("name"),
        "num_bytes": sum(entry.get("bytes", 0) for entry in (document.get("files") or {}).values()),
    }
