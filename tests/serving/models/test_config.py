"""Configurations: read, completed, and refused by the name of the field where we cannot do what they say."""

import pytest
from google.protobuf import text_format

from protos.model_config_pb2 import ModelConfig
from serving.errors import InvalidArgument, LoadError
from serving.models.config import (
    COMPLETED_MAX_BATCH_SIZE,
    VersionPolicy,
    check_supported,
    complete_backend,
    complete_tensors,
    parse_json,
    read_config,
    to_spec,
    version_policy,
)
from serving.models.devices import InstanceGroup
from serving.protocol.tensors import DATATYPES, TensorSpec
from tests.serving.model_files import SCALE_CONFIG, write_config

FP32, UINT8 = DATATYPES["FP32"], DATATYPES["UINT8"]


def parsed(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig())


def spec_of(text: str):
    return to_spec(parsed(text))


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_no_file_is_an_empty_configuration_with_the_folder_s_name(tmp_path):
    (tmp_path / "mnist").mkdir()
    assert read_config(tmp_path / "mnist") == ModelConfig(name="mnist")


def test_a_syntax_error_names_file_and_line(tmp_path):
    write_config(tmp_path / "mnist", 'name: "mnist"\nmax_batch: 4\n')
    with pytest.raises(LoadError, match=r"^mnist/config\.pbtxt:2:\d+ .*max_batch") as caught:
        read_config(tmp_path / "mnist")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist/config.pbtxt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoadError, match=r"mnist/config\.pbtxt cannot be read"):
        read_config(tmp_path / "mnist")


def test_the_name_must_be_the_folder_s(tmp_path):
    write_config(tmp_path / "mnist", 'name: "cifar10"')
    with pytest.raises(LoadError, match="name is 'cifar10', but the model's folder is 'mnist'"):
        read_config(tmp_path / "mnist")


def test_json_is_read_by_either_spelling():
    for text in ('{"max_batch_size": 3}', '{"maxBatchSize": 3}'):
        assert parse_json(text, "m") == ModelConfig(name="m", max_batch_size=3)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", pytest.param("[" * 100_000, id="deep"), '{"max_batch_size": "many"}', '{"colour": 1}'],
)
def test_json_that_is_no_configuration_is_the_caller_s_mistake(text):
    with pytest.raises(InvalidArgument, match="parameter 'config' is no JSON of a model configuration"):
        parse_json(text, "m")


# ---- what we cannot do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("sequence_batching { }", "sequence_batching"),
        ("ensemble_scheduling { step { } }", "ensemble_scheduling"),
        ("model_transaction_policy { decoupled: true }", "model_transaction_policy.decoupled"),
        ("dynamic_batching { preserve_ordering: true }", "dynamic_batching.preserve_ordering"),
        ("dynamic_batching { priority_levels: 2 }", "dynamic_batching.priority_levels"),
        (
            "dynamic_batching { priority_queue_policy { key: 1 value { } } }",
            "dynamic_batching.priority_queue_policy",
        ),
        (
            "dynamic_batching { default_queue_policy { timeout_action: DELAY } }",
            "dynamic_batching.default_queue_policy.timeout_action",
        ),
        ("batch_input { }", "batch_input"),
        ("batch_output { }", "batch_output"),
        ('model_operations { op_library_filename: "x.so" }', "model_operations"),
        ('model_repository_agents { agents { name: "checksum" } }', "model_repository_agents"),
        ('cc_model_filenames { key: "7.0" value: "x" }', "cc_model_filenames"),
        ('input { name: "a" } input { name: "b" reshape { shape: [] } }', "input.reshape"),
        ("input { optional: true }", "input.optional"),
        ("input { allow_ragged_batch: true }", "input.allow_ragged_batch"),
        ("output { is_shape_tensor: true }", "output.is_shape_tensor"),
        ("instance_group { passive: true }", "instance_group.passive"),
        ("instance_group { kind: KIND_MODEL }", "instance_group"),
    ],
)
def test_what_we_cannot_do_is_refused_by_its_name(text, field):
    with pytest.raises(LoadError, match=f"'{field}'.* is not supported: "):
        check_supported(parsed(text))


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('model_warmup { name: "w" }', "model_warmup"),
        ("optimization { cuda { graphs: true } }", "optimization"),
        ('parameters { key: "intra_op_thread_count" value { string_value: "2" } }', "parameters"),
        ("response_cache { enable: true }", "response_cache.enable"),
        ("instance_group { rate_limiter { priority: 1 } }", "instance_group.rate_limiter"),
    ],
)
def test_what_changes_nothing_is_named_in_a_warning(text, field):
    (warning,) = check_supported(parsed(text))
    assert warning.startswith(f"'{field}' has no effect here: ")


@pytest.mark.parametrize(
    "text",
    [
        SCALE_CONFIG,
        "dynamic_batching { preferred_batch_size: [ 2, 4 ] }",
        "model_transaction_policy { decoupled: false }",
        "response_cache { enable: false }",
        "dynamic_batching { default_queue_policy { timeout_action: REJECT max_queue_size: 4 } }",
        "input { format: FORMAT_NCHW }",
        "instance_group { kind: KIND_GPU gpus: [ 0 ] count: 2 }",
    ],
)
def test_what_we_do_passes_in_silence(text):
    assert check_supported(parsed(text)) == []


# ---- completing ------------------------------------------------------------------------------------------------------


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
def test_backend_platform_and_file_name_follow_from_each_other(version, text, files, expected):
    for file in files:
        (version / file).touch()
    config = parsed(text)
    complete_backend(config, version)
    assert (config.backend, config.platform, config.default_model_filename) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "there is no model.onnx nor model.pt in version 7"),
        ('backend: "tensorrt"', "backend 'tensorrt' is not supported: this server has onnxruntime, pytorch"),
        ('platform: "tensorflow_savedmodel"', "backend 'tensorflow_savedmodel' is not supported"),
        ('backend: "pytorch" platform: "onnxruntime_onnx"', "contradict each other"),
        ('backend: "pytorch"', "there is no file 'model.pt' in version 7"),
        ('backend: "pytorch" default_model_filename: "../1/model.pt"', "must stay in its folder"),
        ('backend: "pytorch" default_model_filename: "/etc/passwd"', "must stay in its folder"),
    ],
)
def test_a_backend_that_cannot_be_is_refused(version, text, reason):
    with pytest.raises(LoadError, match=reason):
        complete_backend(parsed(text), version)


def test_an_empty_configuration_takes_the_model_s_tensors_and_batches():
    config = parsed("")
    complete_tensors(config, [TensorSpec("x", UINT8, (-1, 1, 28, 28))], [TensorSpec("y", FP32, (-1, 10))])
    assert config.max_batch_size == COMPLETED_MAX_BATCH_SIZE
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    spec = to_spec(config)
    assert (spec.inputs[0].shape, spec.outputs[0].shape) == ((-1, 1, 28, 28), (-1, 10))


def test_a_model_without_batch_dimension_is_not_made_to_batch():
    config = parsed("")
    complete_tensors(config, [TensorSpec("x", FP32, (2, 3))], [TensorSpec("y", FP32, (-1, 3))])
    assert (config.max_batch_size, list(config.input[0].dims), list(config.output[0].dims)) == (0, [2, 3], [-1, 3])


def test_one_side_alone_is_completed():
    config = parsed('max_batch_size: 8 input { name: "x" data_type: TYPE_UINT8 dims: [ 4 ] }')
    complete_tensors(config, [TensorSpec("ignored", FP32, (-1, 9))], [TensorSpec("y", FP32, (-1, 10))])
    assert [tensor.name for tensor in config.input] == ["x"]
    assert (config.max_batch_size, list(config.output[0].dims)) == (8, [10])


def test_a_batch_size_for_a_model_that_cannot_batch_is_refused():
    with pytest.raises(LoadError, match=r"max_batch_size is 8, but 'x' of the model has shape \[2, 3\]"):
        complete_tensors(parsed("max_batch_size: 8"), [TensorSpec("x", FP32, (2, 3))], [])


# ---- the result ------------------------------------------------------------------------------------------------------


def test_spec_of_a_whole_configuration():
    spec = spec_of(
        """
        name: "m" platform: "onnxruntime_onnx" backend: "onnxruntime" default_model_filename: "model.onnx"
        max_batch_size: 16
        input { name: "x" data_type: TYPE_UINT8 dims: [ 3, -1 ] }
        input { name: "s" data_type: TYPE_STRING dims: [ 1 ] }
        output { name: "y" data_type: TYPE_FP32 dims: [ 10 ] label_filename: "labels.txt" }
        dynamic_batching {
          preferred_batch_size: [ 12, 4 ]
          max_queue_delay_microseconds: 250
          default_queue_policy { max_queue_size: 9 default_timeout_microseconds: 5000 }
        }
        version_policy { latest { num_versions: 2 } }
        instance_group { kind: KIND_GPU count: 2 gpus: [ 1 ] }
        instance_group { kind: KIND_CPU }
        """
    )
    assert spec.inputs == (TensorSpec("x", UINT8, (-1, 3, -1)), TensorSpec("s", DATATYPES["BYTES"], (-1, 1)))
    assert spec.outputs == (TensorSpec("y", FP32, (-1, 10)),)
    assert (spec.max_batch_size, spec.max_queue_delay_us, spec.max_queue_size, spec.timeout_us) == (16, 250, 9, 5000)
    assert spec.preferred_rows == 12
    assert spec.instances == (InstanceGroup("gpu", 2, (1,)), InstanceGroup("cpu", 1))
    assert spec.label_files == {"y": "labels.txt"}
    assert spec.version_policy == VersionPolicy(2)


def test_without_batches_shapes_are_as_they_are():
    assert spec_of(SCALE_CONFIG.replace("max_batch_size: 4", "")).inputs[0].shape == (3,)


TENSOR = 'output { name: "y" data_type: TYPE_FP32 dims: [ 3 ] }'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f'max_batch_size: -1 input {{ name: "x" data_type: TYPE_FP32 dims: 1 }} {TENSOR}', "must not be negative"),
        (f'input {{ name: "x" dims: 1 }} {TENSOR}', "input 'x' needs a data_type out of TYPE_BOOL, "),
        (f'input {{ name: "x" data_type: TYPE_BF16 dims: 1 }} {TENSOR}', "input 'x' needs a data_type"),
        (f'input {{ name: "x" data_type: TYPE_FP32 dims: 0 }} {TENSOR}', r"dims must be positive.* got \[0\]"),
        (f'input {{ name: "x" data_type: TYPE_FP32 dims: -2 }} {TENSOR}', "dims must be positive"),
        (f"input {{ data_type: TYPE_FP32 dims: 1 }} {TENSOR}", "each input needs a name of its own"),
        (f'input {{ name: "x" data_type: TYPE_FP32 dims: 1 }} {TENSOR} {TENSOR}', "each output needs a name"),
        (f'input {{ name: "x" data_type: TYPE_FP32 dims: 1 }} {TENSOR[:-1]} label_filename: "../x" }}', "must stay in"),
        (SCALE_CONFIG + "dynamic_batching { preferred_batch_size: 5 }", "between 1 and 4, got 5"),
        (SCALE_CONFIG + "dynamic_batching { preferred_batch_size: 0 }", "between 1 and 4, got 0"),
        (SCALE_CONFIG + "instance_group { count: -1 }", "count and gpus must not be negative"),
    ],
)
def test_values_that_make_no_sense_are_refused(text, reason):
    with pytest.raises(LoadError, match=reason):
        spec_of(text)


@pytest.mark.parametrize(
    ("text", "present", "candidates", "num_versions"),
    [
        ("", [1, 12, 3], [12, 3, 1], 1),
        ("version_policy { latest { } }", [1, 2], [2, 1], 1),
        ("version_policy { latest { num_versions: 2 } }", [1, 2, 3], [3, 2, 1], 2),
        ("version_policy { all { } }", [1, 2], [2, 1], None),
        ("version_policy { specific { versions: [ 1, 5 ] } }", [1, 2], [5, 1], None),
    ],
)
def test_version_policies(text, present, candidates, num_versions):
    policy = version_policy(parsed(text))
    assert (policy.candidates(present), policy.num_versions) == (candidates, num_versions)
