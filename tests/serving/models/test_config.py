"""Configurations are read from files and from JSON; unsupported fields are rejected by name."""

import errno
import os

import pytest
from google.protobuf import text_format

from protos.model_config_pb2 import ModelConfig
from serving.errors import InvalidArgument, LoadError, TransientLoadError
from serving.models.config import check_supported, parse_json, read_config
from tests.serving.model_files import SCALE_CONFIG, write_config


def parsed(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig())


def test_without_a_file_the_configuration_is_empty_but_for_the_name(tmp_path):
    (tmp_path / "mnist").mkdir()
    assert read_config(tmp_path / "mnist") == ModelConfig(name="mnist")


def test_a_syntax_error_names_file_and_line(tmp_path):
    write_config(tmp_path / "mnist", 'name: "mnist"\nmax_batch: 4\n')
    with pytest.raises(LoadError, match=r"^mnist/config\.pbtxt:2:\d+ .*max_batch") as caught:
        read_config(tmp_path / "mnist")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", pytest.param("utf-16", id="as PowerShell's `>` writes it")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_files_of_other_systems_are_read(tmp_path, encoding, end):
    text = end.join(["# größe", "max_batch_size: 4 # rows", 'default_model_filename: "größe.onnx"', ""])
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist/config.pbtxt").write_bytes(text.encode(encoding))
    expected = ModelConfig(name="mnist", max_batch_size=4, default_model_filename="größe.onnx")
    assert read_config(tmp_path / "mnist") == expected


def test_a_file_that_cannot_be_read_is_not_absent(tmp_path, broken):
    write_config(tmp_path / "mnist", "max_batch_size: 4")
    broken[tmp_path / "mnist/config.pbtxt"] = errno.EACCES
    with pytest.raises(TransientLoadError, match=r"mnist/config\.pbtxt cannot be read: Permission denied"):
        read_config(tmp_path / "mnist")


def test_a_link_to_nothing_is_not_absent(tmp_path):
    (tmp_path / "mnist").mkdir()
    os.symlink("nowhere", tmp_path / "mnist/config.pbtxt")
    with pytest.raises(TransientLoadError, match=r"mnist/config\.pbtxt cannot be read: a link to nothing"):
        read_config(tmp_path / "mnist")


def test_json_is_bounded():
    with pytest.raises(InvalidArgument, match="parameter 'config' must have at most 65536 characters, got 65537"):
        parse_json("{}" + " " * (64 * 1024 - 1), "m")


def test_a_binary_file_is_rejected(tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist/config.pbtxt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoadError, match=r"mnist/config\.pbtxt cannot be read"):
        read_config(tmp_path / "mnist")


def test_the_name_must_match_the_folder(tmp_path):
    write_config(tmp_path / "mnist", 'name: "cifar10"')
    with pytest.raises(LoadError, match="name is 'cifar10', but the model's folder is 'mnist'"):
        read_config(tmp_path / "mnist")


def test_json_accepts_both_spellings_of_a_field():
    for text in ('{"max_batch_size": 3}', '{"maxBatchSize": 3}'):
        assert parse_json(text, "m") == ModelConfig(name="m", max_batch_size=3)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", pytest.param("[" * 60_000, id="deep"), '{"max_batch_size": "many"}', '{"colour": 1}'],
)
def test_invalid_json_is_an_invalid_argument(text):
    with pytest.raises(InvalidArgument, match="parameter 'config' is not the JSON of a model configuration"):
        parse_json(text, "m")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("sequence_batching { }", "sequence_batching"),
        ("ensemble_scheduling { step { } }", "ensemble_scheduling"),
        ("model_transaction_policy { decoupled: true }", "model_transaction_policy.decoupled"),
        ("dynamic_batching { preserve_ordering: true }", "dynamic_batching.preserve_ordering"),
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
def test_an_unsupported_field_is_rejected_by_name(text, field):
    with pytest.raises(LoadError, match=f"'{field}'.* is not supported: "):
        check_supported(parsed(text))


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("optimization { cuda { graphs: true } }", "optimization"),
        ('parameters { key: "intra_op_thread_count" value { string_value: "2" } }', "parameters"),
    ],
)
def test_a_field_without_effect_is_named_in_a_warning(text, field):
    (warning,) = check_supported(parsed(text))
    assert warning.startswith(f"'{field}' has no effect: ")


@pytest.mark.parametrize(
    "text",
    [
        SCALE_CONFIG,
        "dynamic_batching { preferred_batch_size: [ 2, 4 ] }",
        "model_transaction_policy { decoupled: false }",
        "response_cache { enable: true }",
        'model_warmup { name: "w" }',
        'instance_group { rate_limiter { resources { name: "memory" count: 1 } priority: 1 } }',
        "dynamic_batching { default_queue_policy { timeout_action: DELAY max_queue_size: 4 } }",
        "dynamic_batching { priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 1 value { } } }",
        "input { format: FORMAT_NCHW }",
        "instance_group { kind: KIND_GPU gpus: [ 0 ] count: 2 }",
        'parameters { key: "significant_bits" value { string_value: "12" } }',
        'parameters { key: "preprocessing" value { string_value: "{}" } }',
    ],
)
def test_supported_fields_give_no_warning(text):
    assert check_supported(parsed(text)) == []
