"""Tests of which layers are quantized to int8, and how."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from trainer.evaluation.views import average_views
from trainer.export.folding import fold
from trainer.export.formats import convert_to_onnx, load_predictor
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


def test_with_several_views_the_first_and_the_last_layer_stay_float32_in_each(reference: ReferenceModel) -> None:
    content = convert_to_onnx(fold(reference.classifier, "mirrored"), reference.golden[0][:2])
    content = quantize(content, reference.calibration_images(64).split(64))
    model = onnx.load_from_string(content)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    readers = [
        (node.op_type, kinds.get(node.input[1])) for node in model.graph.node if node.op_type in ("Conv", "Gemm")
    ]
    assert readers.count(("Conv", onnx.TensorProto.FLOAT)) == 2
    assert readers.count(("Gemm", onnx.TensorProto.FLOAT)) == 2
    assert len(readers) == 8
    assert [node.op_type for node in model.graph.node].count("Relu") == 2
    with torch.inference_mode():
        expected = average_views(reference.classifier, reference.golden[0], "mirrored")
    logits, _ = load_predictor(ONNX, content)(reference.golden[0].numpy())
    np.testing.assert_allclose(logits, expected, atol=1.0)
