"""Tests of which layers are quantized to int8, and how."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from trainer.export.quantize import quantize
from trainer.export.reference import ReferenceModel
from trainer.export.repository import ONNX


@pytest.fixture(scope="module")
def model(files: dict[str, bytes], reference: ReferenceModel) -> onnx.ModelProto:
    return onnx.load_from_string(quantize(files[ONNX], reference.calibration_images(512).split(256)))


def test_all_layers_but_the_first_and_the_last_are_int8(model: onnx.ModelProto) -> None:
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    layers = {name: kind for name, kind in kinds.items() if name.endswith((".weight", ".weight_quantized"))}
    assert layers == {
        "network.conv1.weight": onnx.TensorProto.FLOAT,
        "network.conv2.weight_quantized": onnx.TensorProto.INT8,
        "network.fc1.weight_quantized": onnx.TensorProto.INT8,
        "network.fc2.weight": onnx.TensorProto.FLOAT,
    }


def test_weights_have_seven_bits_and_each_channel_its_scale(model: onnx.ModelProto) -> None:
    """With eight bits, sums saturate on CPUs without VNNI instructions."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, channels in (("network.conv2", 64), ("network.fc1", 200)):
        assert 60 < np.abs(tensors[f"{name}.weight_quantized"].astype(int)).max() <= 64
        assert tensors[f"{name}.weight_scale"].shape == (channels,)


def test_int8_layers_absorb_the_relu_after_them(model: onnx.ModelProto) -> None:
    """Their range starts at 0 instead. Only the float32 layer keeps its ReLU."""
    operations = [node.op_type for node in model.graph.node]
    assert operations.count("Relu") == 1
    first = operations.index("Conv")
    assert operations[first : first + 4] == ["Conv", "MaxPool", "Relu", "QuantizeLinear"]
