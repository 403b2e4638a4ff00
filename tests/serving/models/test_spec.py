"""Completed configurations are checked and converted."""

import pytest
from google.protobuf import text_format

from protos.model_config_pb2 import ModelConfig
from serving.errors import LoadError
from serving.inference.queue_policy import QueuePolicy
from serving.models.devices import InstanceGroup
from serving.models.spec import VersionPolicy, to_spec, version_policy
from serving.protocol.tensors import DATATYPES, TensorSpec
from tests.serving.model_files import SCALE_CONFIG

FP32, UINT8 = DATATYPES["FP32"], DATATYPES["UINT8"]


def parsed(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig())


def spec_of(text: str):
    return to_spec(parsed(text))


def test_all_fields_of_a_configuration():
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
    assert spec.preferred_batch_size == 12
    assert spec.instances == (InstanceGroup("gpu", 2, (1,)), InstanceGroup("cpu", 1))
    assert spec.label_files == {"y": "labels.txt"}
    assert spec.version_policy == VersionPolicy(2)


def test_without_batching_shapes_have_no_batch_dimension():
    assert spec_of(SCALE_CONFIG.replace("max_batch_size: 4", "")).inputs[0].shape == (3,)


TENSOR = 'output { name: "y" data_type: TYPE_FP32 dims: [ 3 ] }'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f'max_batch_size: -1 input {{ name: "x" data_type: TYPE_FP32 dims: 1 }} {TENSOR}', "must not be negative"),
        (f'input {{ name: "x" dims: 1 }} {TENSOR}', "input 'x': data_type must be one of TYPE_BOOL, "),
        (f'input {{ name: "x" data_type: TYPE_BF16 dims: 1 }} {TENSOR}', "input 'x': data_type must be one of"),
        (f'input {{ name: "x" data_type: TYPE_FP32 dims: 0 }} {TENSOR}', r"dims must be positive.* got \[0\]"),
        (f'input {{ name: "x" data_type: TYPE_FP32 dims: -2 }} {TENSOR}', "dims must be positive"),
        (f"input {{ data_type: TYPE_FP32 dims: 1 }} {TENSOR}", "at least one input, and each needs a unique name"),
        (f'input {{ name: "x" data_type: TYPE_FP32 dims: 1 }} {TENSOR} {TENSOR}', "at least one output, and each"),
        (f'input {{ name: "x" data_type: TYPE_FP32 dims: 1 }} {TENSOR[:-1]} label_filename: "../x" }}', "must stay in"),
        (SCALE_CONFIG + "dynamic_batching { preferred_batch_size: 5 }", "between 1 and 4, got 5"),
        (SCALE_CONFIG + "dynamic_batching { preferred_batch_size: 0 }", "between 1 and 4, got 0"),
        (SCALE_CONFIG + "instance_group { count: -1 }", "count and gpus must not be negative"),
    ],
)
def test_invalid_values_are_rejected(text, reason):
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


# ---- Queue policies --------------------------------------------------------------------------------------------------


def batching(text: str) -> str:
    return SCALE_CONFIG + f"dynamic_batching {{ {text} }}"


def test_levels_have_their_own_policy_or_the_default():
    spec = spec_of(
        batching(
            """priority_levels: 3 default_priority_level: 2
            default_queue_policy { default_timeout_microseconds: 500 }
            priority_queue_policy {
              key: 1 value { timeout_action: DELAY max_queue_size: 7 allow_timeout_override: true }
            }
            """
        )
    )
    first, *others = spec.policies.levels
    assert first == QueuePolicy(max_queue_size=7, delays=True, allows_override=True)
    assert others == [QueuePolicy(timeout_us=500)] * 2
    assert [spec.policies.level(priority) for priority in (0, 1, 2, 3, 4, "1", None)] == [1, 0, 1, 2, 1, 1, 1]
    assert not others[0].interprets_timeout
    assert first.interprets_timeout


@pytest.mark.parametrize("text", ["timeout_action: DELAY", "allow_timeout_override: true"])
def test_a_policy_that_has_a_say_needs_no_levels(text):
    (policy,) = spec_of(batching(f"default_queue_policy {{ {text} }}")).policies.levels
    assert policy.interprets_timeout


@pytest.mark.parametrize("text", ["", "default_queue_policy { max_queue_size: 4 default_timeout_microseconds: 5 }"])
def test_a_plain_queue_has_no_policies(text):
    assert spec_of(batching(text)).policies is None


@pytest.mark.parametrize(
    ("default", "allows", "asked", "waits"),
    [(0, False, 0, 0), (50, False, 20, 50), (50, True, 20, 20), (50, True, 90, 50), (0, True, 20, 20), (0, True, 0, 0)],
)
def test_a_request_may_only_shorten_its_time_and_only_if_the_policy_allows_it(default, allows, asked, waits):
    assert QueuePolicy(timeout_us=default, allows_override=allows).wait_us(asked) == waits


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("priority_levels: 101 default_priority_level: 1", "priority_levels must be at most 100, got 101"),
        ("priority_levels: 2", "default_priority_level must be between 1 and priority_levels, 2, got 0"),
        ("priority_levels: 2 default_priority_level: 3", "between 1 and priority_levels, 2, got 3"),
        ("default_priority_level: 1", "between 1 and priority_levels, 0, got 1"),
        ("priority_queue_policy { key: 1 value { } }", "must be of priorities from 1 to 0, got 1"),
    ],
)
def test_priorities_that_do_not_exist_are_rejected(text, reason):
    with pytest.raises(LoadError, match=reason):
        spec_of(batching(text))
