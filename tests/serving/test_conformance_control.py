"""All RPCs except inference, on both gRPC front ends: metadata, statistics, the repository, health, reflection."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.utils import InferenceServerException

from protos import grpc_service_pb2 as pb
from protos import health_pb2
from tests.serving.conftest import SERVICE, Served, tensor
from tests.serving.onnx_models import LOADED

X = np.arange(12, dtype=np.float32).reshape(3, 4)


# ---- The server and its models ---------------------------------------------------------------------------------------


def test_the_server(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    metadata = client.get_server_metadata()
    assert metadata.name == "convoy"
    assert metadata.version
    assert {"classification", "model_repository", "schedule_policy", "statistics"} <= set(metadata.extensions)


def test_whether_a_model_is_ready(client: triton.InferenceServerClient) -> None:
    assert client.is_model_ready("rows")
    assert client.is_model_ready("versions", "1")
    for name, version in (("spare", ""), ("nothing", ""), ("versions", "3"), ("spare", "1")):
        assert not client.is_model_ready(name, version)
    with pytest.raises(InferenceServerException, match="is not a number") as caught:
        client.is_model_ready("versions", "latest")
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize("version", ["2", "02", "0002"])
def test_a_version_is_a_number(client: triton.InferenceServerClient, version: str) -> None:
    assert client.is_model_ready("versions", version)
    assert list(client.get_model_metadata("versions", version).versions) == ["1", "2"]
    assert client.get_model_config("versions", version).config.name == "versions"
    only = client.get_inference_statistics("versions", version).model_stats
    assert [(each.name, each.version) for each in only] == [("versions", "2")]
    answer = client.infer("versions", [tensor("x", np.ones((1, 1), np.float32))], model_version=version)
    assert (answer.get_response().model_version, answer.as_numpy("y").item()) == ("2", 3)


def test_metadata(client: triton.InferenceServerClient) -> None:
    metadata = client.get_model_metadata("pair")
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("pair", ["1"], "onnxruntime_onnx")
    assert [(i.name, i.datatype, list(i.shape)) for i in metadata.inputs] == [
        ("a", "FP32", [-1, 2]),
        ("b", "INT64", [-1, 1]),
    ]
    assert [(o.name, o.datatype, list(o.shape)) for o in metadata.outputs] == [
        ("sum", "FP32", [-1, 2]),
        ("twice", "INT64", [-1, 1]),
    ]
    assert list(client.get_model_metadata("versions").versions) == ["1", "2"]
    assert list(client.get_model_metadata("whole").inputs[0].shape) == [-1]


def test_configuration(client: triton.InferenceServerClient) -> None:
    config = client.get_model_config("digits").config
    assert (config.name, config.max_batch_size, config.backend) == ("digits", 4, "onnxruntime")
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("images", 2, [1, 4, 4])]
    assert [o.label_filename for o in config.output] == ["labels.txt", "labels.txt"]
    completed = client.get_model_config("rows").config
    assert [list(o.dims) for o in completed.output] == [[4], [3]], "the model completes what the file leaves out"
    assert completed.dynamic_batching.max_queue_delay_microseconds == 3000


def test_statistics_count_what_was_sent(client: triton.InferenceServerClient) -> None:
    def current() -> Any:
        return client.get_inference_statistics("counted").model_stats[0]

    def ask(rows: int) -> None:
        client.infer(
            "counted", [tensor("a", np.ones((rows, 2), np.float32)), tensor("b", np.ones((rows, 1), np.int64))]
        )

    before = current()
    began_ms = time.time() * 1000
    for rows in (3, 3, 5):
        ask(rows)
    with pytest.raises(InferenceServerException):
        ask(9)  # too large: refused before it is counted

    after = current()
    while after.execution_count < before.execution_count + 3:  # counted just after the response is sent
        assert time.time() * 1000 < began_ms + 60_000
        after = current()

    assert (after.name, after.version) == ("counted", "1")
    assert after.inference_count - before.inference_count == 11
    assert after.execution_count - before.execution_count == 3
    for part in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        then, now = getattr(before.inference_stats, part), getattr(after.inference_stats, part)
        assert now.count - then.count == 3, part
        assert now.ns > then.ns, part
    assert after.inference_stats.fail.count == before.inference_stats.fail.count
    assert batch_counts(after) - batch_counts(before) == Counter({3: 2, 5: 1})
    assert began_ms - 1 <= after.last_inference <= time.time() * 1000 + 1


def batch_counts(statistics: Any) -> Counter[int]:
    return Counter({batch.batch_size: batch.compute_infer.count for batch in statistics.batch_stats})


def test_statistics_of_all(client: triton.InferenceServerClient) -> None:
    versions = {(each.name, each.version) for each in client.get_inference_statistics().model_stats}
    assert {(name, "1") for name in LOADED} | {("versions", "2")} <= versions
    only = client.get_inference_statistics("versions", "1").model_stats
    assert [(each.name, each.version) for each in only] == [("versions", "1")]


def test_the_index(client: triton.InferenceServerClient) -> None:
    entries = [(model.name, model.version, model.state) for model in client.get_model_repository_index().models]
    assert entries == sorted(entries)
    assert ("versions", "2", "READY") in entries
    assert {state for name, _, state in entries if name == "spare"} == {"UNAVAILABLE"}


def test_load_and_unload(client: triton.InferenceServerClient) -> None:
    client.load_model("spare")
    assert client.is_model_ready("spare")
    np.testing.assert_array_equal(client.infer("spare", [tensor("x", X)]).as_numpy("echo"), X)
    client.load_model("spare", config='{"max_batch_size": 2}')
    with pytest.raises(InferenceServerException, match="batch-size must be between 1 and 2") as caught:
        client.infer("spare", [tensor("x", X)])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    client.unload_model("spare")
    assert not client.is_model_ready("spare")
    with pytest.raises(InferenceServerException, match="'spare' has no available versions: unloaded") as caught:
        client.infer("spare", [tensor("x", X)])
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException, match="unloaded") as caught:
        client.infer("spare", [tensor("x", X)], model_version="1")
    assert caught.value.status() == "StatusCode.UNAVAILABLE"


def test_a_broken_model_has_a_reason(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="failed to load 'broken', version 1: ") as caught:
        client.load_model("broken")
    assert caught.value.status() == "StatusCode.INTERNAL"
    reasons = {model.name: model.reason for model in client.get_model_repository_index().models}
    assert "ONNX Runtime cannot load model.onnx" in reasons["broken"]


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("nothing", "NOT_FOUND"),
        ("../models/rows", "INVALID_ARGUMENT"),
        ("", "INVALID_ARGUMENT"),
        ("/etc", "INVALID_ARGUMENT"),
        ("m" * 20_000, "INVALID_ARGUMENT"),
    ],
)
def test_models_that_cannot_be_loaded(client: triton.InferenceServerClient, name: str, status: str) -> None:
    for change in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException) as caught:
            change(name)
        assert caught.value.status() == f"StatusCode.{status}"


def test_a_load_of_countless_parameters(served: Served) -> None:
    request = pb.RepositoryModelLoadRequest(model_name="spare")
    for number in range(60_000):
        request.parameters[f"{number:05}"].int64_param = 1
    call = served.channel.unary_unary(f"{SERVICE}RepositoryModelLoad")
    with pytest.raises(grpc.RpcError, match="bytes is too long: at most 524288 are accepted") as caught:
        call(request.SerializeToString(), timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


UNSUPPORTED: dict[str, Callable[[Any], Any]] = {
    "SystemSharedMemoryStatus": lambda client: client.get_system_shared_memory_status(),
    "SystemSharedMemoryRegister": lambda client: client.register_system_shared_memory("a", "/b", 64),
    "SystemSharedMemoryUnregister": lambda client: client.unregister_system_shared_memory("a"),
    "CudaSharedMemoryStatus": lambda client: client.get_cuda_shared_memory_status(),
    "CudaSharedMemoryRegister": lambda client: client.register_cuda_shared_memory("a", b"aGFuZGxl", 0, 64),
    "CudaSharedMemoryUnregister": lambda client: client.unregister_cuda_shared_memory("a"),
    "TraceSetting": lambda client: client.get_trace_settings(),
    "LogSettings": lambda client: client.get_log_settings(),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_rpcs_are_named(client: triton.InferenceServerClient, name: str) -> None:
    with pytest.raises(InferenceServerException, match=f"{name}: this server does not support") as caught:
        UNSUPPORTED[name](client)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_unsupported_rpcs_are_named_to_the_asynchronous_client_too(served: Served) -> None:
    async def ask() -> list[object]:
        async with triton_aio.InferenceServerClient(served.target) as client:
            return await asyncio.gather(*(call(client) for call in UNSUPPORTED.values()), return_exceptions=True)

    for name, error in zip(UNSUPPORTED, asyncio.run(ask()), strict=True):
        assert isinstance(error, InferenceServerException)
        assert f"{name}: this server does not support" in str(error)
        assert error.status() == "StatusCode.UNIMPLEMENTED"


def test_an_unknown_rpc(served: Served) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        served.channel.unary_unary(SERVICE + "Sing")(b"", timeout=60)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


# ---- Health and reflection -------------------------------------------------------------------------------------------


def health(served: Served, service: str) -> Any:
    call = served.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    return call(health_pb2.HealthCheckRequest(service=service), timeout=60).status


@pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService", "rows", "liveness", "readiness"])
def test_health_of_ready_services(served: Served, service: str) -> None:
    assert health(served, service) == health_pb2.HealthCheckResponse.SERVING


def test_health_of_other_services(served: Served) -> None:
    assert health(served, "spare") == health_pb2.HealthCheckResponse.NOT_SERVING
    for unknown, quoted in (("nothing", "'nothing'"), ("ü" * 20_000, f"'{'ü' * 64}…'")):
        with pytest.raises(grpc.RpcError) as caught:
            health(served, unknown)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert quoted in caught.value.details()


def test_watch_follows_a_model(served: Served, client: triton.InferenceServerClient) -> None:
    call = served.channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    watch = call(health_pb2.HealthCheckRequest(service="spare"), timeout=60)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    client.load_model("spare")
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    client.unload_model("spare")
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    unknown = call(health_pb2.HealthCheckRequest(service="nothing"), timeout=60)
    assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    unknown.cancel()


def test_reflection_is_enough_to_infer(served: Served) -> None:
    """Uses only what the server describes by reflection."""
    database = ProtoReflectionDescriptorDatabase(served.channel)
    assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(database.get_services())
    service = DescriptorPool(database).FindServiceByName("inference.GRPCInferenceService")
    assert len(service.methods) == 20
    method = service.methods_by_name["ModelInfer"]
    request = message_factory.GetMessageClass(method.input_type)(model_name="rows")
    given = request.inputs.add(name="x", datatype="FP32", shape=[3, 4])
    given.contents.fp32_contents.extend(X.ravel().tolist())
    response = served.channel.unary_unary(
        SERVICE + "ModelInfer",
        lambda message: message.SerializeToString(),
        message_factory.GetMessageClass(method.output_type).FromString,
    )(request, timeout=60)
    np.testing.assert_array_equal(np.frombuffer(response.raw_output_contents[0], np.float32), X.ravel())
