"""A client's configuration cannot ask for any amount of memory and threads; the operator's is warned of."""

import json

import pytest
from google.protobuf import text_format

from protos.model_config_pb2 import ModelConfig
from serving.errors import InvalidArgument
from serving.models import bounds as bounds_module
from serving.models.bounds import Bounds

BOUNDS = Bounds(max_queue_size=100)


def parsed(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig())


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch):
    monkeypatch.setattr(bounds_module, "num_available_cpus", lambda: 2)
    monkeypatch.setattr(bounds_module, "count_gpus", lambda: 0)


TOO_MUCH = [
    ("max_batch_size: 2000000000", "2000000000 as max_batch_size: at most 1024"),
    ("instance_group { count: 10000 }", "10000 as instances on one device: at most 8"),
    ("instance_group { count: 2147483647 kind: KIND_GPU }", "2147483647 as instances on one device: at most 8"),
    ("instance_group { count: 5 } instance_group { count: 5 }", "10 as instances on one device: at most 8"),
    ("dynamic_batching { max_queue_delay_microseconds: 60000000 }", "60000000 as max_queue_delay_microseconds"),
    ("dynamic_batching { default_queue_policy { max_queue_size: 4000000000 } }", "as max_queue_size: at most 100"),
    (
        'max_batch_size: 1000 input { name: "x" data_type: TYPE_FP32 dims: [ 3, 1000, 1000 ] }',
        "12000000000 as bytes of the largest batch: at most 1073741824",
    ),
    ('output { name: "y" data_type: TYPE_FP64 dims: [ 1000000, 1000000 ] }', "as bytes of the largest batch"),
    ("model_warmup { count: 60 } model_warmup { count: 60 }", "120 as runs of model_warmup: at most 100"),
    (
        'model_warmup { batch_size: 500 inputs { key: "x" value { data_type: TYPE_FP64 dims: [ 1000, 1000 ] } } }',
        "4000000000 as bytes of model_warmup: at most 1073741824",
    ),
    (f"version_policy {{ specific {{ versions: {list(range(1, 100))} }} }}", "99 as number of versions: at most 64"),
]


@pytest.mark.parametrize(("text", "message"), TOO_MUCH)
def test_a_client_cannot_ask_for_too_much(text, message):
    with pytest.raises(InvalidArgument, match=f"parameter 'config' asks for .*{message}"):
        BOUNDS.check(parsed(text), ModelConfig())


@pytest.mark.parametrize(("text", "message"), TOO_MUCH)
def test_the_operator_s_own_file_is_followed_with_a_warning(text, message):
    BOUNDS.check(parsed(text), parsed(text))
    warnings = BOUNDS.warnings(parsed(text))
    assert all(warning.startswith("config.pbtxt asks for ") for warning in warnings)
    assert bool(warnings) is ("max_queue_size" not in text)


def test_usual_configurations_are_within_the_bounds():
    text = """max_batch_size: 256 instance_group { count: 2 } version_policy { latest { num_versions: 2 } }
    input { name: "x" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] } output { name: "y" data_type: TYPE_FP32 dims: 1000 }
    dynamic_batching { max_queue_delay_microseconds: 3000 default_queue_policy { max_queue_size: 100 } }"""
    BOUNDS.check(parsed(text), ModelConfig())
    assert BOUNDS.warnings(parsed(text)) == []


def test_instances_are_counted_for_each_gpu(monkeypatch):
    monkeypatch.setattr(bounds_module, "count_gpus", lambda: 4)
    BOUNDS.check(parsed("instance_group { count: 8 kind: KIND_GPU }"), ModelConfig())
    repeated = json.dumps([0] * 20)
    with pytest.raises(InvalidArgument, match="20 as instances on one device"):
        BOUNDS.check(parsed(f"instance_group {{ gpus: {repeated} kind: KIND_GPU }}"), ModelConfig())
