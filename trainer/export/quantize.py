"""An ONNX model in int8, by static quantisation: its ranges are measured on training images.

The first convolution and the last fully connected layer stay in float32. The first has too few input channels for
ONNX Runtime's int8 kernels, which take twice as long there as the float32 ones, and the last decides between classes.
Weights have 7 bits, each output channel its own scale: with 8 bits, sums saturate on CPUs without VNNI instructions,
and the same file would answer differently from one machine to another.
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

from trainer.export.graph import clean
from trainer.export.repository import INPUT

NUM_IMAGES = 512
BATCH_SIZE = 256


def quantize(content: bytes, batches: Iterable[torch.Tensor]) -> bytes:
    """The model in int8.

    Args:
        content: of the float32 ONNX file.
        batches: training images uint8 `[B, C, H, W]` by which the range of each activation is measured.
    """
    model = onnx.load_from_string(content)
    _put_relus_first(model.graph)
    add_pre_process_metadata(model)  # its graph is small already, and onnxruntime need not ask for it
    named = {kind: [node.name for node in model.graph.node if node.op_type == kind] for kind in ("Conv", "Gemm")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        quantize_static(
            model,
            path,
            _Batches(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MaxPool", "Relu", "Reshape"],
            nodes_to_exclude=[*named["Conv"][:1], *named["Gemm"][-1:]],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return clean(onnx.load(path))


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """What onnxruntime reads calibration images from."""

    def __init__(self, batches: Iterable[torch.Tensor]) -> None:
        self._batches: Iterator[torch.Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def _put_relus_first(graph: onnx.GraphProto) -> None:
    """Swap each max-pooling and the ReLU after it, which changes nothing: both keep the order of numbers.

    A quantised convolution with a ReLU right after it need not represent negative numbers. Not behind the first
    convolution: there the ReLU keeps onnxruntime from pooling in int8 what was computed in float32, which is slow.
    """
    producers = {name: node for node in graph.node for name in node.output}
    readers = collections.Counter(name for node in graph.node for name in node.input)
    first = next((node for node in graph.node if node.op_type == "Conv"), None)
    for relu in graph.node:
        pool = producers.get(relu.input[0]) if relu.op_type == "Relu" else None
        if pool is None or pool.op_type != "MaxPool" or readers[relu.input[0]] > 1:
            continue
        if producers.get(pool.input[0]) is not first:
            relu.op_type, pool.op_type = pool.op_type, relu.op_type
            relu.attribute.extend(pool.attribute)
            pool.ClearField("attribute")
