"""Tiny ONNX models with known outputs, and a repository of them.

rows      x FP32 [4]: echo (x), product (x times WEIGHTS); batches of up to 8
digits    images UINT8 [1, 4, 4]: logits, probabilities of 10 classes with labels
pair      a FP32 [2], b INT64 [1]: sum (a + b), twice (2 b)
counted   like pair; for the one test that counts its requests
types     one input of each type with numbers but FP16, [2], and the same as outputs
halves    the same for FP16
strings   text BYTES [-1]: echo
whole     x FP32 [-1], without a batch dimension: doubled, total
versions  x FP32 [1]: y (x + its version), versions 1 and 2
slow      loops INT64 [1]: echo, after that many multiplications of matrices; a queue of 2
failing   index INT64 [1]: value of a table of 4, or an error
spare     like rows; not loaded at the start
broken    an invalid file; not loaded at the start
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from serving.protocol.tensors import DATATYPES

LOADED = ("rows", "digits", "pair", "counted", "types", "halves", "strings", "whole", "versions", "slow", "failing")
LABELS = tuple(f"class: {number}" for number in range(10))
WEIGHTS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
PIXEL_WEIGHTS = np.random.default_rng(1).normal(size=(16, 10)).astype(np.float32) / 255
NUMBERS = tuple(name for name, kind in DATATYPES.items() if kind.size and kind.contents)

_TABLE = np.array([10, 20, 30, 40], np.float32)
_SIDE = 128
"""Size of the matrices that `slow` multiplies."""
_BATCH = "batch"

Value = tuple[str, int, Sequence[int | str]]


def write_repository(folder: Path) -> None:
    """Writes all models of the list above."""
    _write(folder, "rows", rows_model(), "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 3000 }")
    _write(folder, "spare", rows_model(), "max_batch_size: 8")
    labelled = 'output { name: "%s" data_type: TYPE_FP32 dims: 10 label_filename: "labels.txt" }'
    _write(
        folder,
        "digits",
        _digits(),
        'max_batch_size: 4 input { name: "images" data_type: TYPE_UINT8 dims: [1, 4, 4] }'
        + labelled % "logits"
        + labelled % "probabilities",
    )
    (folder / "digits" / "labels.txt").write_text("\n".join(LABELS) + "\n")
    _write(folder, "pair", _pair(), "max_batch_size: 8")
    _write(folder, "counted", _pair(), "max_batch_size: 8")
    _write(folder, "types", _types(NUMBERS), "max_batch_size: 8")
    _write(folder, "halves", _types(["FP16"]), "max_batch_size: 8")
    _write(folder, "strings", _strings(), "max_batch_size: 8")
    _write(folder, "whole", _whole(), "max_batch_size: 0")
    _write(folder, "versions", _plus(1), "max_batch_size: 8 version_policy { all { } }")
    (folder / "versions" / "2").mkdir()
    onnx.save(_plus(2), folder / "versions" / "2" / "model.onnx")
    # A preferred size: the one that the server measures may be 1 on a busy machine.
    queue = "dynamic_batching { preferred_batch_size: [ 4 ] default_queue_policy { max_queue_size: 2 } }"
    _write(folder, "slow", _slow(), f"max_batch_size: 4 {queue}")
    _write(folder, "failing", _failing(), "max_batch_size: 4")
    _write(folder, "broken", None, "max_batch_size: 4")


def rows_model() -> onnx.ModelProto:
    nodes = [helper.make_node("Identity", ["x"], ["echo"]), helper.make_node("MatMul", ["x", "weights"], ["product"])]
    inputs: list[Value] = [("x", TensorProto.FLOAT, [_BATCH, 4])]
    outputs: list[Value] = [("echo", TensorProto.FLOAT, [_BATCH, 4]), ("product", TensorProto.FLOAT, [_BATCH, 3])]
    return _model(nodes, inputs, outputs, weights=WEIGHTS)


def _digits() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["numbers"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    outputs: list[Value] = [(name, TensorProto.FLOAT, [_BATCH, 10]) for name in ("logits", "probabilities")]
    return _model(nodes, [("images", TensorProto.UINT8, [_BATCH, 1, 4, 4])], outputs, weights=PIXEL_WEIGHTS)


def _pair() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Cast", ["b"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["a", "number"], ["sum"]),
        helper.make_node("Add", ["b", "b"], ["twice"]),
    ]
    inputs: list[Value] = [("a", TensorProto.FLOAT, [_BATCH, 2]), ("b", TensorProto.INT64, [_BATCH, 1])]
    outputs: list[Value] = [("sum", TensorProto.FLOAT, [_BATCH, 2]), ("twice", TensorProto.INT64, [_BATCH, 1])]
    return _model(nodes, inputs, outputs)


def _types(names: Sequence[str]) -> onnx.ModelProto:
    kinds = {name: helper.np_dtype_to_tensor_dtype(DATATYPES[name].dtype) for name in names}
    nodes = [helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in names]
    inputs: list[Value] = [(f"in_{name}", kinds[name], [_BATCH, 2]) for name in names]
    outputs: list[Value] = [(f"out_{name}", kinds[name], [_BATCH, 2]) for name in names]
    return _model(nodes, inputs, outputs)


def _strings() -> onnx.ModelProto:
    nodes = [helper.make_node("Identity", ["text"], ["echo"])]
    return _model(
        nodes, [("text", TensorProto.STRING, [_BATCH, "words"])], [("echo", TensorProto.STRING, [_BATCH, "words"])]
    )


def _whole() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Add", ["x", "x"], ["doubled"]),
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=1),
    ]
    outputs: list[Value] = [("doubled", TensorProto.FLOAT, ["length"]), ("total", TensorProto.FLOAT, [1])]
    return _model(nodes, [("x", TensorProto.FLOAT, ["length"])], outputs)


def _plus(number: int) -> onnx.ModelProto:
    nodes = [helper.make_node("Add", ["x", "number"], ["y"])]
    x: Value = ("x", TensorProto.FLOAT, [_BATCH, 1])
    return _model(nodes, [x], [("y", *x[1:])], number=np.array([number], np.float32))


def _slow() -> onnx.ModelProto:
    """Multiplies the loop's result by 0 and adds it to the output, so that ONNX Runtime cannot skip the loop."""
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, [_SIDE, _SIDE])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("MatMul", ["state", "turn"], ["next_state"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("at", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            state,
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_state", TensorProto.FLOAT, [_SIDE, _SIDE]),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["loops"], ["most"], keepdims=0),
        helper.make_node("Loop", ["most", "", "start"], ["end"], body=body),
        helper.make_node("ReduceSum", ["end"], ["whole"], keepdims=0),
        helper.make_node("Mul", ["whole", "zero"], ["nothing"]),
        helper.make_node("Cast", ["nothing"], ["none"], to=TensorProto.INT64),
        helper.make_node("Add", ["loops", "none"], ["echo"]),
    ]
    loops: Value = ("loops", TensorProto.INT64, [_BATCH, 1])
    turned = np.roll(np.eye(_SIDE, dtype=np.float32), 1, axis=0)
    return _model(nodes, [loops], [("echo", *loops[1:])], start=turned, turn=turned, zero=np.array(0, np.float32))


def _failing() -> onnx.ModelProto:
    nodes = [helper.make_node("Gather", ["table", "index"], ["value"])]
    inputs: list[Value] = [("index", TensorProto.INT64, [_BATCH, 1])]
    return _model(nodes, inputs, [("value", TensorProto.FLOAT, [_BATCH, 1])], table=_TABLE)


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    **constants: npt.NDArray[Any],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def _write(folder: Path, name: str, model: onnx.ModelProto | None, config: str) -> None:
    (folder / name / "1").mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(f'name: "{name}" backend: "onnxruntime" {config}\n')
    if model is None:
        (folder / name / "1" / "model.onnx").write_bytes(b"no model")
    else:
        onnx.save(model, folder / name / "1" / "model.onnx")
