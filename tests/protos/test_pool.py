"""Our messages and those of other packages work in one process, in either import order."""

import subprocess
import sys

import pytest
from google.protobuf import json_format, text_format
from google.protobuf.internal import api_implementation

from protos.grpc_service_pb2 import ModelInferRequest
from protos.model_config_pb2 import ModelConfig

_OURS = "from protos import grpc_service_pb2, health_pb2; ours = grpc_service_pb2.ModelInferRequest(model_name='m')"
_TRITON = "import tritonclient.grpc; from tritonclient.grpc import service_pb2"
# Other definitions of the same names in protobuf's default pool, as MLServer and KServe register them.
_OTHER = """
from google.protobuf import descriptor_pb2, descriptor_pool
file = descriptor_pb2.FileDescriptorProto(name='dataplane.proto', package='inference', syntax='proto3')
for name in ('ServerLiveRequest', 'ModelInferRequest', 'ModelConfig'):
    file.message_type.add(name=name).field.add(name='other', number=1, type=5, label=1)
file.service.add(name='GRPCInferenceService')
descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
"""


def _run(*lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("theirs", [_TRITON, _OTHER], ids=["tritonclient", "another"])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_imports_beside_other_definitions_of_the_same_names(theirs, first):
    use = "assert grpc_service_pb2.ModelInferRequest.FromString(ours.SerializeToString()) == ours"
    done = _run(*([_OURS, theirs] if first == "ours" else [theirs, _OURS]), use)
    assert done.returncode == 0, done.stderr


def test_two_packages_in_the_default_pool_do_clash():
    """Shows that the clash which the own pool avoids is real."""
    done = _run(_OTHER, _TRITON)
    assert done.returncode != 0
    assert "duplicate symbol" in done.stderr


def test_the_default_pool_has_none_of_our_messages():
    look = (
        "from google.protobuf import descriptor_pool\ndescriptor_pool.Default().FindFileByName('protos/health.proto')"
    )
    done = _run(_OURS, look)
    assert "KeyError" in done.stderr


def test_messages_use_the_fast_implementation():
    assert api_implementation.Type() == "upb"
    assert "_upb" in ModelInferRequest.__mro__[1].__module__


def test_a_real_configuration_survives_text_and_json():
    text = """
      name: "densenet" platform: "onnxruntime_onnx" max_batch_size: 8
      input [ { name: "x" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, 224, 224 ] reshape { shape: [ 1, 3 ] } } ]
      output [ { name: "y" data_type: TYPE_FP32 dims: [ 1000 ] label_filename: "labels.txt" } ]
      instance_group [ { count: 2 kind: KIND_GPU gpus: [ 0, 1 ] rate_limiter { resources { name: "R" count: 4 } } } ]
      version_policy: { specific { versions: [ 1, 3 ] } }
      dynamic_batching {
        preferred_batch_size: [ 4, 8 ]
        max_queue_delay_microseconds: 100
        default_queue_policy { max_queue_size: 7 }
        priority_queue_policy { key: 2 value { timeout_action: DELAY } }
      }
      optimization { execution_accelerators { gpu_execution_accelerator : [ {
        name : "tensorrt" parameters { key: "precision_mode" value: "FP16" } } ] } }
      model_warmup [ { name: "w" batch_size: 1 inputs { key: "x" value: {
        data_type: TYPE_FP32 dims: [ 3, 224, 224 ] zero_data: true } } } ]
      parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
    """
    config = text_format.Parse(text, ModelConfig())
    assert config.input[0].dims == [3, 224, 224]
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    as_json = json_format.MessageToJson(config, preserving_proto_field_name=True)
    assert json_format.Parse(as_json, ModelConfig()) == config
    assert text_format.Parse(text_format.MessageToString(config), ModelConfig()) == config
