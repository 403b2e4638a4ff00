"""Makes small ONNX models, and writes them into model repositories."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper

Tensor = tuple[str, int, Sequence[int | str]]
Array = npt.NDArray[Any]


def onnx_model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    constants: Mapping[str, Array] | None = None,
) -> bytes:
    """Returns a serialised model that every supported version of ONNX Runtime reads."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*tensor) for tensor in inputs],
        [helper.make_tensor_value_info(*tensor) for tensor in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def scale(factor: float, columns: int = 3, batch: str | int = "N") -> bytes:
    """y = factor * x, FP32 `[batch, columns]`."""
    return onnx_model(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        [("x", TensorProto.FLOAT, [batch, columns])],
        [("y", TensorProto.FLOAT, [batch, columns])],
        {"factor": np.array(factor, np.float32)},
    )


def sum_and_difference() -> bytes:
    """sum = a + b and difference = a - b of INT64 `[N, 2]`, and a third output, a copy of a."""
    return onnx_model(
        [
            helper.make_node("Add", ["a", "b"], ["sum"]),
            helper.make_node("Sub", ["a", "b"], ["difference"]),
            helper.make_node("Identity", ["a"], ["copy"]),
        ],
        [("a", TensorProto.INT64, ["N", 2]), ("b", TensorProto.INT64, ["N", 2])],
        [(name, TensorProto.INT64, ["N", 2]) for name in ("sum", "difference", "copy")],
    )


def add_without_batch() -> bytes:
    """y = x + x, FP32 `[2, 3]`: no batch dimension."""
    return onnx_model(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [("x", TensorProto.FLOAT, [2, 3])],
        [("y", TensorProto.FLOAT, [2, 3])],
    )


def echo_strings() -> bytes:
    """t = s, strings `[N, 2]`."""
    return onnx_model(
        [helper.make_node("Identity", ["s"], ["t"])],
        [("s", TensorProto.STRING, ["N", 2])],
        [("t", TensorProto.STRING, ["N", 2])],
    )


def classifier(seed: int = 0) -> bytes:
    """images UINT8 `[N, 1, 2, 2]` to logits and probabilities FP32 `[N, 3]`, with the normalisation in the graph."""
    weight = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
    return onnx_model(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["floats", "scale"], ["normal"]),
            helper.make_node("Flatten", ["normal"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"]),
        ],
        [("images", TensorProto.UINT8, ["N", 1, 2, 2])],
        [("logits", TensorProto.FLOAT, ["N", 3]), ("probabilities", TensorProto.FLOAT, ["N", 3])],
        {"weight": weight, "scale": np.array(255, np.float32)},
    )


def write_version(
    model_folder: Path,
    version: int,
    content: bytes,
    *,
    filename: str = "model.onnx",
    golden: Mapping[str, Array] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """Publishes a version by one rename, and replaces one of the same number.

    Args:
        manifest: fields of the manifest besides the digests; None for no manifest.
    """
    staging = model_folder / ".staging-test"
    staging.mkdir(parents=True)
    (staging / filename).write_bytes(content)
    if golden is not None:
        np.savez(staging / "golden.npz", **golden)
    if manifest is not None:
        files = {file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in staging.iterdir()}
        (staging / "manifest.json").write_text(json.dumps({"files": files, **manifest}))
    folder = model_folder / str(version)
    if folder.exists():
        os.rename(folder, model_folder / ".old-test")
    os.rename(staging, folder)
    shutil.rmtree(model_folder / ".old-test", ignore_errors=True)
    return folder


def write_config(model_folder: Path, text: str) -> None:
    """Publishes a `config.pbtxt` by one rename."""
    model_folder.mkdir(parents=True, exist_ok=True)
    (model_folder / ".config").write_text(text)
    os.rename(model_folder / ".config", model_folder / "config.pbtxt")


SCALE_CONFIG = """
platform: "onnxruntime_onnx" max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: [ 3 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 3 ] }
"""
"""The configuration of `scale`."""
