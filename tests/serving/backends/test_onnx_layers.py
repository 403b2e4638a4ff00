"""Maps of a model's first layers, and which pixels each value depends on."""

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from serving.backends import onnx_layers
from serving.backends.onnx_layers import OnnxLayers
from serving.errors import InvalidArgument
from tests.serving.model_files import onnx_model

SIDE = 24
IMAGES = ("images", TensorProto.UINT8, ["N", 3, SIDE, SIDE])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small residual network with padding, strides, dilation and pooling."""
    stream = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["floats", "stem"], ["a"], kernel_shape=[3, 5], strides=[2, 1], pads=[1, 2, 1, 2]),
        helper.make_node("MaxPool", ["a"], ["b"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["b", "same"], ["c"], kernel_shape=[3, 3], dilations=[2, 2], pads=[2, 2, 2, 2]),
        helper.make_node("Add", ["b", "c"], ["d"]),
        helper.make_node("Sigmoid", ["d"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    constants = {
        "stem": stream.normal(size=(8, 3, 3, 5)).astype(np.float32),
        "same": stream.normal(size=(8, 8, 3, 3)).astype(np.float32),
    }
    path = tmp_path_factory.mktemp("layers") / "model.onnx"
    path.write_bytes(onnx_model(nodes, [IMAGES], [("logits", TensorProto.FLOAT, ["N", 8])], constants))
    return path


def test_maps_are_those_of_the_network(file: Path) -> None:
    image = np.random.default_rng(1).integers(0, 256, (1, 3, SIDE, SIDE), np.uint8)
    layers = OnnxLayers(file).run(image)
    assert [(layer.operation, layer.maps.shape) for layer in layers] == [
        ("Conv", (8, 12, 24)),
        ("MaxPool", (8, 6, 12)),
        ("Conv", (8, 6, 12)),
        ("Sigmoid", (8, 6, 12)),
    ]
    rows = image[0, :, 3:6, 3:8].astype(np.float64)  # of the value at row 2, column 5
    assert layers[0].filters is not None
    assert layers[0].maps[1, 2, 5] == pytest.approx((rows * layers[0].filters[1]).sum(), rel=1e-4)
    assert layers[2].filters is None  # of 8 channels, not of an image's
    np.testing.assert_allclose(layers[1].maps, layers[0].maps.reshape(8, 6, 2, 12, 2).max(axis=(2, 4)))


def test_a_pixel_changes_those_values_alone_whose_fields_have_it(file: Path) -> None:
    opened = OnnxLayers(file)
    image = np.random.default_rng(2).integers(0, 200, (1, 3, SIDE, SIDE), np.uint8)
    before = opened.run(image)
    for row, column in ((0, 0), (11, 7), (12, 16), (23, 23)):
        changed = image.copy()
        changed[0, :, row, column] += 55
        for one, other in zip(before, opened.run(changed), strict=True):
            differs = np.argwhere((one.maps != other.maps).any(axis=0))
            inside = {
                (y, x)
                for y in range(one.maps.shape[1])
                for x in range(one.maps.shape[2])
                if 0 <= row - one.field.start[0] - y * one.field.stride[0] < one.field.size[0]
                and 0 <= column - one.field.start[1] - x * one.field.stride[1] < one.field.size[1]
            }
            assert {(int(y), int(x)) for y, x in differs} <= inside
            if one.operation == "Conv" and one.filters is not None:
                assert len(differs) == len(inside)


def test_models_without_maps_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["logits"]),
    ]
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_model(nodes, [IMAGES], [("logits", TensorProto.FLOAT, ["N", 3 * SIDE * SIDE])]))
    with pytest.raises(InvalidArgument, match="no convolution or pooling"):
        OnnxLayers(path)
    path.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InvalidArgument, match="cannot be shown"):
        OnnxLayers(path)
    monkeypatch.setattr(onnx_layers, "MAX_FILE_BYTES", 100)
    with pytest.raises(InvalidArgument, match="are not shown"):
        OnnxLayers(file)
