"""Tests that every format takes any batch size, holds no path of this machine and is reproducible."""

import io
import os
import sys
import threading
import warnings
import zipfile

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import ROOT
from trainer.export.folding import fold
from trainer.export.formats import EXPORTED_PROGRAM, TORCHSCRIPT, convert, load_predictor, muted_thread
from trainer.export.reference import ReferenceModel
from trainer.export.repository import ONNX
from trainer.models import Classifier

FORMATS = (TORCHSCRIPT, ONNX, EXPORTED_PROGRAM)


class Standardized(nn.Conv2d):
    """A convolution whose weights are standardised, as those of BiT: a constant, which exporters name `mean`."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(images, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=1)


def test_operators_of_later_versions_and_names_of_the_network_are_no_obstacle() -> None:
    network = nn.Sequential(Standardized(3, 4, 3), nn.GELU("tanh"), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = Classifier(network, torch.tensor([120.0, 110.0, 100.0]), torch.tensor([60.0, 50.0, 40.0])).eval()
    images = torch.randint(256, (5, 3, 12, 12), dtype=torch.uint8)
    with torch.inference_mode():
        expected = classifier(images)
    for name, content in convert(fold(classifier), images[:2]).items():
        logits, _ = load_predictor(name, content)(images.numpy())
        np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_batch_size_gives_the_reference_outputs(
    name: str, batch_size: int, files: dict[str, bytes], reference: ReferenceModel
) -> None:
    images = reference.golden[0][:batch_size]
    logits, probabilities = load_predictor(name, files[name])(images.numpy())
    assert logits.dtype == probabilities.dtype == np.float32
    np.testing.assert_allclose(logits, reference.golden[1][:batch_size], atol=1e-4)
    np.testing.assert_allclose(probabilities, torch.from_numpy(logits).softmax(dim=1), atol=1e-6)


def test_the_onnx_file_has_twelve_nodes_and_the_documented_interface(files: dict[str, bytes]) -> None:
    model = onnx.load_from_string(files[ONNX])
    assert [node.op_type for node in model.graph.node] == [
        *("Cast", "Conv", "MaxPool", "Relu", "Conv", "MaxPool", "Reshape"),
        *("Relu", "Gemm", "Relu", "Gemm", "Softmax"),
    ]
    assert {entry.domain for entry in model.opset_import} == {""}
    (images,) = model.graph.input
    assert images.name == "images"
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim] == ["batch", 1, 28, 28]
    for output, name in zip(model.graph.output, ("logits", "probabilities"), strict=True):
        assert output.name == name
        assert output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert [dim.dim_param or dim.dim_value for dim in output.type.tensor_type.shape.dim] == ["batch", 10]
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)


@pytest.mark.parametrize("name", FORMATS)
def test_no_file_names_a_path_of_this_machine(name: str, files: dict[str, bytes]) -> None:
    contents = [files[name]]
    if name != ONNX:
        with zipfile.ZipFile(io.BytesIO(files[name])) as archive:
            contents = [archive.read(entry) for entry in archive.namelist()]
            assert not any(entry.endswith(".debug_pkl") for entry in archive.namelist())
    for content in contents:
        assert os.fsencode(ROOT) not in content
        assert b"site-packages" not in content


def test_the_same_weights_give_the_same_bytes(files: dict[str, bytes], reference: ReferenceModel) -> None:
    """TorchScript is left out: it numbers a process's classes, so its bytes repeat from process to process only."""
    again = convert(*reference.export_module())
    assert again[ONNX] == files[ONNX]
    assert again[EXPORTED_PROGRAM] == files[EXPORTED_PROGRAM]


@pytest.mark.parametrize("allow_tf32", [True, False])
def test_torchscript_computes_convolutions_in_float32_on_gpus(
    allow_tf32: bool, reference: ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traced convolution keeps `allow_tf32` of the moment, as its last input."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allow_tf32)
    file = convert(*reference.export_module())[TORCHSCRIPT]
    assert torch.backends.cudnn.allow_tf32 is allow_tf32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(io.BytesIO(file))
    graph = module.inlined_graph  # owns its nodes
    convolutions = graph.findAllNodes("aten::_convolution")
    assert [list(node.inputs())[-1].toIValue() for node in convolutions] == [False, False]


def test_while_a_conversion_prints_nothing_other_threads_do(capsys: pytest.CaptureFixture[str]) -> None:
    """The watchdog names a rank that fails while the main rank exports."""
    watchdog = threading.Thread(target=lambda: print("error: rank 2 hangs", file=sys.stderr, flush=True))
    with muted_thread():
        print("def forward(self, x): ...", file=sys.stderr, flush=True)
        watchdog.start()
        watchdog.join()
    print("after", file=sys.stderr)
    assert capsys.readouterr().err == "error: rank 2 hangs\nafter\n"
