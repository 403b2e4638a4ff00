"""Configurations are completed from each version's files and from the model's tensors."""

import pytest
from google.protobuf import text_format

from protos.model_config_pb2 import ModelConfig
from serving.errors import LoadError
from serving.models.autocomplete import DEFAULT_MAX_BATCH_SIZE, complete_backend, complete_tensors
from serving.models.spec import to_spec
from serving.protocol.tensors import DATATYPES, TensorSpec

FP32, UINT8 = DATATYPES["FP32"], DATATYPES["UINT8"]


def parsed(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig())


@pytest.fixture
def version(tmp_path):
    folder = tmp_path / "7"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("text", "files", "expected"),
    [
        ("", ["model.onnx"], ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ("", ["model.pt"], ("pytorch", "pytorch_libtorch", "model.pt")),
        ("", ["model.pt", "model.onnx"], ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ("", ["model.pt2"], ("pytorch", "torch_aoti", "model.pt2")),
        ("", ["model.py", "model.pt2", "model.onnx"], ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ("", ["model.py"], ("python", "", "model.py")),
        ('backend: "pytorch"', ["model.pt2"], ("pytorch", "torch_aoti", "model.pt2")),
        ('backend: "pt2"', ["model.pt", "model.pt2"], ("pytorch", "torch_aoti", "model.pt2")),
        ('platform: "torch_aoti"', ["model.pt", "model.pt2"], ("pytorch", "torch_aoti", "model.pt2")),
        ('backend: "python"', ["model.py", "model.onnx"], ("python", "", "model.py")),
        ('backend: "pytorch"', ["model.pt", "model.onnx"], ("pytorch", "pytorch_libtorch", "model.pt")),
        ('platform: "pytorch_libtorch"', ["model.pt"], ("pytorch", "pytorch_libtorch", "model.pt")),
        ('default_model_filename: "net.onnx"', ["net.onnx"], ("onnxruntime", "onnxruntime_onnx", "net.onnx")),
        (
            'platform: "onnxruntime_onnx" default_model_filename: "net.bin"',
            ["net.bin"],
            ("onnxruntime", "onnxruntime_onnx", "net.bin"),
        ),
    ],
)
def test_backend_platform_and_file_name_are_derived_from_each_other(version, text, files, expected):
    for file in files:
        (version / file).touch()
    config = parsed(text)
    complete_backend(config, version)
    assert (config.backend, config.platform, config.default_model_filename) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "there is no model.onnx or model.pt or model.pt2 or model.py in version 7"),
        ('backend: "tensorrt"', "backend 'tensorrt' is not supported: this server has onnxruntime, pytorch, python$"),
        ('platform: "tensorflow_savedmodel"', "backend 'tensorflow_savedmodel' is not supported"),
        ('backend: "pytorch" platform: "onnxruntime_onnx"', "contradict each other"),
        ('backend: "pytorch"', "there is no file 'model.pt' in version 7"),
        ('backend: "pytorch" default_model_filename: "../1/model.pt"', "must stay in its folder"),
        ('backend: "pytorch" default_model_filename: "/etc/passwd"', "must stay in its folder"),
    ],
)
def test_an_unusable_backend_is_rejected(version, text, reason):
    with pytest.raises(LoadError, match=reason):
        complete_backend(parsed(text), version)


def test_an_empty_configuration_gets_the_model_s_tensors_and_a_batch_size():
    config = parsed("")
    complete_tensors(config, [TensorSpec("x", UINT8, (-1, 1, 28, 28))], [TensorSpec("y", FP32, (-1, 10))])
    assert config.max_batch_size == DEFAULT_MAX_BATCH_SIZE
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    spec = to_spec(config)
    assert (spec.inputs[0].shape, spec.outputs[0].shape) == ((-1, 1, 28, 28), (-1, 10))


def test_a_model_without_batch_dimension_gets_no_batch_size():
    config = parsed("")
    complete_tensors(config, [TensorSpec("x", FP32, (2, 3))], [TensorSpec("y", FP32, (-1, 3))])
    assert (config.max_batch_size, list(config.input[0].dims), list(config.output[0].dims)) == (0, [2, 3], [-1, 3])


def test_missing_outputs_alone_are_completed():
    config = parsed('max_batch_size: 8 input { name: "x" data_type: TYPE_UINT8 dims: [ 4 ] }')
    complete_tensors(config, [TensorSpec("ignored", FP32, (-1, 9))], [TensorSpec("y", FP32, (-1, 10))])
    assert [tensor.name for tensor in config.input] == ["x"]
    assert (config.max_batch_size, list(config.output[0].dims)) == (8, [10])


def test_a_batch_size_for_a_model_without_batch_dimension_is_rejected():
    with pytest.raises(LoadError, match=r"max_batch_size is 8, but the model's 'x' has shape \[2, 3\]"):
        complete_tensors(parsed("max_batch_size: 8"), [TensorSpec("x", FP32, (2, 3))], [])
