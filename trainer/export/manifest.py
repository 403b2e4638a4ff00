"""What a version says of itself: `manifest.json`, and the golden batch by which a server sees that it is right."""

import datetime
import hashlib
import io
import json
from importlib.metadata import version as installed_version
from typing import Any

import numpy as np
import torch

from trainer.data import ImageSet
from trainer.export.formats import Floats
from trainer.export.repository import INPUT, LOGITS, PROBABILITIES, Model
from trainer.loop.fit import Run
from trainer.models import Classifier
from trainer.records.checkpoint import weights_sha256
from trainer.records.run_folder import git_commit

FORMAT_VERSION = 1
NUM_GOLDEN, MAX_GOLDEN = 16, 64
_LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime-gpu", "numpy")


def golden_images(training: ImageSet, indices: torch.Tensor) -> torch.Tensor:
    """uint8 `[N, C, H, W]`: a training image of every class (of the first 64), and others to make up 16."""
    labels = training.labels[indices].numpy()
    _, first_of_class = np.unique(labels, return_index=True)
    others = np.setdiff1d(np.arange(len(labels))[: NUM_GOLDEN + len(first_of_class)], first_of_class)
    chosen = np.concatenate([first_of_class[:MAX_GOLDEN], others[: max(0, NUM_GOLDEN - len(first_of_class))]])
    return training.images[indices[torch.from_numpy(chosen)]]


def golden_file(images: torch.Tensor, logits: Floats) -> bytes:
    """`golden.npz`: `images`, and `logits` float32 `[N, classes]` as the trained model gives them."""
    file = io.BytesIO()
    np.savez(file, images=images.numpy(), logits=logits)
    return file.getvalue()


def manifest(
    version: int, *, model: Model, classifier: Classifier, files: dict[str, bytes], run: Run, findings: dict[str, Any]
) -> bytes:
    """`manifest.json`.

    Args:
        classifier: the trained model.
        findings: `golden_tolerance`, `metrics` and `parity`: how good the files are, and how that was seen.
    """
    document = {
        "format_version": FORMAT_VERSION,
        "name": model.name,
        "version": version,
        "files": {name: _digest(content) for name, content in files.items()},
        "inputs": [_tensor(INPUT, "UINT8", *model.image_shape)],
        "outputs": [_tensor(name, "FP32", len(model.labels)) for name in (LOGITS, PROBABILITIES)],
        "normalization": {
            "inside_the_model": True,
            "mean": classifier.mean.flatten().tolist(),
            "deviation": classifier.deviation.flatten().tolist(),
        },
        "labels": model.labels,
        **findings,
        "origin": _origin(run),
    }
    return (json.dumps(document, indent=2) + "\n").encode()


def _digest(content: bytes) -> dict[str, str | int]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _tensor(name: str, datatype: str, *dims: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [-1, *dims]}


def _origin(run: Run) -> dict[str, Any]:
    return {
        "run": run.folder.path.absolute().name,
        "step": run.position.step,
        "weights_sha256": weights_sha256(run.learner.model),
        "dataset": run.dataset.name,
        "dataset_sha256": run.dataset.sha256,
        "config": run.folder.fingerprint,
        "git_commit": git_commit(),
        "libraries": {name: installed_version(name) for name in _LIBRARIES},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
