"""Helpers of the front ends' tests: calls by grpcio's own client over real sockets."""

import contextlib
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from protos import grpc_service_pb2 as pb
from protos import health_pb2
from serving.frontends import Frontend
from serving.frontends.grpcio.handlers import REFLECTION
from serving.protocol.methods import HEALTH_WATCH, INFER, STREAM_INFER
from tests.serving.frontends.fake_service import FakeServices, HeldRequest

LIVE = "/inference.GRPCInferenceService/ServerLive"
WAIT_S = 30.0
LIMIT = 1 << 20

Serve = Callable[..., Any]
"""Starts a front end with these options."""


def unary(channel: grpc.Channel, path: str = INFER) -> grpc.UnaryUnaryMultiCallable:
    return channel.unary_unary(path)


def ask(channel: grpc.Channel, path: str, payload: bytes = b"", **options: Any) -> bytes:
    response: bytes = unary(channel, path)(payload, timeout=WAIT_S, **options)
    return response


def refusal(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def held(services: FakeServices) -> HeldRequest:
    return services.inference.held.get(timeout=WAIT_S)


def watch(channel: grpc.Channel, service: str) -> Any:
    call = channel.unary_stream(
        HEALTH_WATCH,
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    return call(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)


def reflection(channel: grpc.Channel, **options: Any) -> Any:
    """Returns a reflection call that stays open after its first response, until it is cancelled."""
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    requests.put(reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString())
    call = channel.stream_stream(REFLECTION[0])(iter(requests.get, None), timeout=WAIT_S, **options)
    call.add_done_callback(lambda _: requests.put(None))
    return call


@contextlib.contextmanager
def silent_calls(channel: grpc.Channel, *paths: str) -> Iterator[list[Any]]:
    """Opens calls that send no message, and cancels them at the end of the context."""
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    calls = [channel.stream_stream(path)(iter(requests.get, b"end"), timeout=WAIT_S) for path in paths]
    ask(channel, LIVE)  # the server has seen them before this one
    yield calls
    for call in calls:
        call.cancel()
        requests.put(b"end")


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < until, "the condition did not become true"
        time.sleep(0.01)


def bearer(token: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {token}"),)}


def is_refused(server: Frontend) -> bool:
    """Whether the server refuses a new connection."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            ask(channel, LIVE)
        except grpc.RpcError as error:
            return bool(error.code() is grpc.StatusCode.UNAVAILABLE)
    return False


def response(name: str) -> bytes:
    payload: bytes = pb.ModelInferResponse(model_name=name).SerializeToString()
    return payload


class Stream:
    """A client's side of one ModelStreamInfer."""

    def __init__(self, channel: grpc.Channel, **options: Any) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        options = {"timeout": WAIT_S} | options
        self.call = channel.stream_stream(STREAM_INFER)(iter(self._requests.get, None), **options)

    def send(self, *payloads: bytes) -> None:
        for payload in payloads:
            self._requests.put(payload)

    def close(self) -> None:
        self._requests.put(None)

    def next(self) -> bytes | str:
        message = pb.ModelStreamInferResponse.FromString(next(self.call))
        assert message.infer_response.parameters.pop("triton_final_response").bool_param
        found: bytes | str = message.error_message or message.infer_response.SerializeToString()
        return found
