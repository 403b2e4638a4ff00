"""Messages as JSON."""

import json

from protos import grpc_service_pb2 as pb
from protos.model_config_pb2 import ModelConfig
from serving.protocol.json_messages import to_json


def test_numbers_are_numbers_and_defaults_are_there() -> None:
    message = pb.ModelStatistics(name="m", last_inference=2**64 - 1)
    found = json.loads(json.dumps(to_json(message)))
    assert (found["name"], found["version"], found["last_inference"], found["batch_stats"]) == ("m", "", 2**64 - 1, [])
    assert "inference_stats" not in found


def test_what_json_has_no_number_for_is_null() -> None:
    config = ModelConfig()
    control = config.model_metrics.metric_control.add()
    control.histogram_options.buckets.extend([0.5, float("inf"), float("nan")])
    rendered = json.dumps(to_json(config), allow_nan=False)
    assert '"buckets": [0.5, null, null]' in rendered
