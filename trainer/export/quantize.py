"""Quantises an ONNX model to int8: static quantisation, with ranges measured on training images.

The first convolution and the last fully connected layer stay in float32. The first has too few input channels for
ONNX Runtime's int8 kernels, which take twice as long there as the float32 ones, and the last decides between classes.
Weights have 7 bits and a scale for each output channel: with 8 bits, sums saturate on CPUs without VNNI instructions,
and the same file gives other outputs on other machines.
"""

import collections
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from trainer.export.formats import serialize_onnx
from trainer.export.repository import INPUT

NUM_CALIBRATION_IMAGES = 512
CALIBRATION_BATCH_SIZE = 256


def quantize(content: bytes, batches: Iterable[torch.Tensor]) -> bytes:
    """Quantises a model to int8.

    Args:
        content: the float32 ONNX file.
        batches: training images, uint8 `[B, C, H, W]`, that the range of each activation is measured on.

    Returns:
        The int8 ONNX file.
    """
    model = onnx.load_from_string(content)
    _swap_max_pool_and_relu(model.graph)
    add_pre_process_metadata(model)  # tells onnxruntime that the graph needs no preprocessing; it warns otherwise
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        quantize_static(
            model,
            path,
            _CalibrationReader(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MaxPool", "Relu", "Reshape"],
            nodes_to_exclude=[node.name for node in (*_first_layer(model.graph), *_last_layer(model.graph))],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return serialize_onnx(onnx.load(path))


def _first_layer(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Returns the first convolution, once for each test-time view that the graph computes."""
    return _same_weights([node for node in graph.node if node.op_type == "Conv"], 0)


def _last_layer(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Returns the last fully connected layer, once for each test-time view that the graph computes."""
    return _same_weights([node for node in graph.node if node.op_type == "Gemm"], -1)


def _same_weights(nodes: list[onnx.NodeProto], index: int) -> list[onnx.NodeProto]:
    return [node for node in nodes if node.input[1] == nodes[index].input[1]]


class _CalibrationReader(CalibrationDataReader):  # type: ignore[misc]
    """Hands calibration images to onnxruntime."""

    def __init__(self, batches: Iterable[torch.Tensor]) -> None:
        self._batches: Iterator[torch.Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def _swap_max_pool_and_relu(graph: onnx.GraphProto) -> None:
    """Moves each ReLU before the max-pooling that precedes it; the result is the same, as both keep the order.

    A quantised convolution that a ReLU follows directly need not represent negative numbers. The first convolution is
    left out: its ReLU keeps onnxruntime from pooling the float32 output in int8, which is slow.
    """
    producers = {name: node for node in graph.node for name in node.output}
    num_readers = collections.Counter(name for node in graph.node for name in node.input)
    first = {name for node in _first_layer(graph) for name in node.output}
    for relu in graph.node:
        pool = producers.get(relu.input[0]) if relu.op_type == "Relu" else None
        if pool is None or pool.op_type != "MaxPool" or num_readers[relu.input[0]] > 1:
            continue
        if pool.input[0] not in first:
            relu.op_type, pool.op_type = pool.op_type, relu.op_type
            relu.attribute.extend(pool.attribute)
            pool.ClearField("attribute")
