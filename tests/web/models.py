"""Small models for the page: digits by random convolutions and least squares, and one with labels of HTML."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper

from convoy.preprocessing import Preprocessing
from tests.serving.model_files import onnx_model, write_config, write_version

NUM_FILTERS = 16
NUM_FEATURES = NUM_FILTERS * 8 * 8
HOSTILE = '<img src="x" onerror="document.title=\'hacked\'">'
"""A label that would run code if a page took it for HTML."""
RIGHT_TO_LEFT = "כלב"

_CONFIG = """
platform: "onnxruntime_onnx" max_batch_size: 64
input {{ name: "images" data_type: TYPE_UINT8 dims: {dims} }}
output {{ name: "probabilities" data_type: TYPE_FP32 dims: {classes} label_filename: "labels.txt" }}
"""


def write_digits(
    repository: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], *, versions: int = 2
) -> None:
    """Writes the model `digits`, fitted to images [N, 28, 28] in a second; its last version is damaged."""
    filters = np.random.default_rng(0).normal(size=(NUM_FILTERS, 1, 5, 5)).astype(np.float32)
    filters -= filters.mean(axis=(1, 2, 3), keepdims=True)
    session = ort.InferenceSession(_network(filters), providers=["CPUExecutionProvider"])
    [features] = session.run(None, {"images": images[:, None]})
    readout = np.linalg.solve(
        features.T @ features + 30 * np.eye(NUM_FEATURES, dtype=np.float32),
        features.T @ (np.eye(10, dtype=np.float32)[labels] * 12),
    )
    folder = repository / "digits"
    write_config(folder, _CONFIG.format(dims=[1, 28, 28], classes=10))
    (folder / "labels.txt").write_text("\n".join("0123456789") + "\n")
    manifest = {
        "preprocessing": Preprocessing("mnist").to_json(),
        "metrics": {"val_accuracy": 0.95, "val_interval": [0.94, 0.96], "num_val": 500},
        "origin": {"time": "2026-01-02T03:04:05+00:00", "dataset": HOSTILE},
    }
    for version in range(1, versions + 1):
        write_version(folder, version, _network(filters, readout.astype(np.float32)), manifest=manifest)
    write_version(folder, versions + 1, _network(filters), manifest=manifest)
    (folder / str(versions + 1) / "model.onnx").write_bytes(b"damaged")


def write_strange(repository: Path) -> None:
    """Writes the model `strange`, of colour images, whose labels are HTML, a path, and Hebrew."""
    content = onnx_model(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["floats"], ["means"], axes=[-2, -1], keepdims=0),
            helper.make_node("Mul", ["means", "scale"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"]),
        ],
        [("images", TensorProto.UINT8, ["N", 3, 4, 4])],
        [("probabilities", TensorProto.FLOAT, ["N", 3])],
        {"scale": np.array(0.05, np.float32)},
    )
    folder = repository / "strange"
    write_config(folder, _CONFIG.format(dims=[3, 4, 4], classes=3))
    (folder / "labels.txt").write_text(f"{HOSTILE}\n../../etc\n{RIGHT_TO_LEFT}\n")
    write_version(folder, 1, content, manifest={"preprocessing": Preprocessing().to_json()})


def write_many(repository: Path, num_classes: int) -> None:
    """Writes the model `many`, whose answers about digits are random, but differ."""
    weights = np.random.default_rng(0).normal(size=(784, num_classes)).astype(np.float32) / 100
    content = onnx_model(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["floats"], ["features"]),
            helper.make_node("MatMul", ["features", "weights"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"]),
        ],
        [("images", TensorProto.UINT8, ["N", 1, 28, 28])],
        [("probabilities", TensorProto.FLOAT, ["N", num_classes])],
        {"weights": weights},
    )
    folder = repository / "many"
    write_config(folder, _CONFIG.format(dims=[1, 28, 28], classes=num_classes))
    names = (f"a long name of a class, such as breeds of dogs have, number {number}" for number in range(num_classes))
    (folder / "labels.txt").write_text("\n".join(names) + "\n")
    write_version(folder, 1, content, manifest={"preprocessing": Preprocessing("mnist").to_json()})


def _network(filters: npt.NDArray[np.float32], readout: npt.NDArray[np.float32] | None = None) -> bytes:
    """Returns the network; without a readout, what makes its features."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "filters"], ["edges"], kernel_shape=[5, 5]),
        helper.make_node("Relu", ["edges"], ["positive"]),
        helper.make_node("MaxPool", ["positive"], ["pooled"], kernel_shape=[3, 3], strides=[3, 3]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
    ]
    constants = {"scale": np.array(1 / 255, np.float32), "filters": filters}
    output = ("features", TensorProto.FLOAT, ["N", NUM_FEATURES])
    if readout is not None:
        nodes += [
            helper.make_node("MatMul", ["features", "readout"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"]),
        ]
        constants["readout"] = readout
        output = ("probabilities", TensorProto.FLOAT, ["N", 10])
    return onnx_model(nodes, [("images", TensorProto.UINT8, ["N", 1, 28, 28])], [output], constants)
