"""Models of images with manifests, for tests of image files: colours, and digits of `mnist-mini`.

colours  images UINT8 [3, 4, 4]: probabilities of red, green and blue, by the brightest channel
digits   images UINT8 [1, 28, 28]: probabilities of the ten digits, by random features and least squares
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from convoy.preprocessing import Preprocessing
from tests.serving.model_files import onnx_model, write_config, write_version

COLOURS = ("red", "green", "blue")
NUM_FEATURES = 400

_TENSORS = """
platform: "onnxruntime_onnx" max_batch_size: {rows}
input {{ name: "images" data_type: TYPE_UINT8 dims: {dims} }}
output {{ name: "logits" data_type: TYPE_FP32 dims: {classes} label_filename: "labels.txt" }}
output {{ name: "probabilities" data_type: TYPE_FP32 dims: {classes} label_filename: "labels.txt" }}
dynamic_batching {{ {batching} }}
"""


def write_colours(repository: Path, name: str = "colours", *, rows: int = 8, preprocessing: Any = None) -> Path:
    """Writes the model `colours`. Batches wait half a second for the eighth row, so that requests share them.

    Args:
        preprocessing: section of the manifest; None for that of `fit`.
    """
    batch = ["N"] if rows else []
    content = onnx_model(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["floats"], ["means"], axes=[-2, -1], keepdims=0),
            helper.make_node("Mul", ["means", "scale"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"]),
        ],
        [("images", TensorProto.UINT8, [*batch, 3, 4, 4])],
        [("logits", TensorProto.FLOAT, [*batch, 3]), ("probabilities", TensorProto.FLOAT, [*batch, 3])],
        {"scale": np.array(0.05, np.float32)},
    )
    batching = "preferred_batch_size: 8 max_queue_delay_microseconds: 100000" if rows == 8 else ""
    _write(repository / name, content, (3, 4, 4), COLOURS, rows, batching, preprocessing or Preprocessing().to_json())
    return repository / name


def write_digits(repository: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
    """Writes the model `digits`, fitted to images [N, 28, 28] in a second."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(784, NUM_FEATURES)).astype(np.float32) / (10 * 255)
    bias = generator.normal(size=NUM_FEATURES).astype(np.float32)
    features = np.maximum(images.reshape(len(images), 784).astype(np.float32) @ weight + bias, 0)
    regular = features.T @ features + 3 * np.eye(NUM_FEATURES, dtype=np.float32)
    readout = np.linalg.solve(regular, features.T @ np.eye(10, dtype=np.float32)[labels])
    content = onnx_model(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["floats"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["projected"]),
            helper.make_node("Add", ["projected", "bias"], ["shifted"]),
            helper.make_node("Relu", ["shifted"], ["features"]),
            helper.make_node("MatMul", ["features", "readout"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"]),
        ],
        [("images", TensorProto.UINT8, ["N", 1, 28, 28])],
        [("logits", TensorProto.FLOAT, ["N", 10]), ("probabilities", TensorProto.FLOAT, ["N", 10])],
        {"weight": weight, "bias": bias, "readout": readout.astype(np.float32)},
    )
    section = Preprocessing("mnist").to_json()
    _write(repository / "digits", content, (1, 28, 28), tuple("0123456789"), 64, "", section)


def _write(  # noqa: PLR0913 (all parts of a model)
    folder: Path,
    content: bytes,
    shape: tuple[int, int, int],
    labels: tuple[str, ...],
    rows: int,
    batching: str,
    preprocessing: Any,
) -> None:
    write_config(folder, _TENSORS.format(rows=rows, dims=list(shape), classes=len(labels), batching=batching))
    (folder / "labels.txt").write_text("\n".join(labels) + "\n")
    write_version(folder, 1, content, manifest={"preprocessing": preprocessing})
