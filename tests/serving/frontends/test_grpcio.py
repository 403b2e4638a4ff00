"""The grpcio front end, called by grpcio's own client over real sockets."""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from convoy.tls import TlsFiles
from serving.errors import ResourceExhausted, Unavailable
from serving.frontends.common import limits
from serving.frontends.common.limits import OpenCalls
from serving.frontends.grpcio import GrpcioFrontend, frontend
from serving.frontends.grpcio.handlers import REFLECTION
from serving.frontends.grpcio.infer_stream import MAX_IN_FLIGHT
from serving.frontends.grpcio.streams import OpenStreams
from serving.observability.health import NOT_SERVING, SERVING
from serving.observability.refusals import Refusals
from serving.protocol.methods import INFER, STREAM_INFER
from tests.serving.certificates import Authority, write
from tests.serving.frontends.callers import (
    LIMIT,
    LIVE,
    WAIT_S,
    Serve,
    Stream,
    ask,
    held,
    refusal,
    response,
    unary,
    watch,
)
from tests.serving.frontends.fake_service import FakeServices

ONCE = pytest.mark.parametrize("kind", ["grpcio"])


@pytest.fixture(params=["grpcio", "grpcio-threads"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


class TestDeadlinesAndCancellation:
    def test_the_deadline_reaches_the_service(self, channel: grpc.Channel, services: FakeServices) -> None:
        call = unary(channel).future(b"hold", timeout=WAIT_S)
        one = held(services)
        assert one.deadline is not None
        assert 0 < one.deadline - time.monotonic() <= WAIT_S + 1  # gRPC rounds it up
        one.sink.succeed(b"")
        assert call.result() == b""

    def test_no_deadline_is_none(self, channel: grpc.Channel, services: FakeServices) -> None:
        call = unary(channel).future(b"hold")
        one = held(services)
        assert one.deadline is None
        one.sink.succeed(b"")
        assert call.result() == b""


@ONCE
def test_the_number_of_connections_is_limited(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "max_connections", lambda: 2)
    port = serve().port
    with contextlib.ExitStack() as stack:
        one, two, refused = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)) for _ in range(3)
        ]
        while refused.recv(1000):
            pass
        assert one.recv(9)[3] == two.recv(9)[3] == 4  # HTTP/2's SETTINGS


@ONCE
def test_silent_connections_are_closed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend, "HANDSHAKE_TIMEOUT_S", 1)
    with socket.create_connection(("127.0.0.1", serve().port), timeout=WAIT_S) as connection:
        while connection.recv(1000):
            pass


@ONCE
def test_calls_wait_for_a_busy_thread(
    channel: grpc.Channel, services: FakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default gRPC's core cancels calls at random when more than 1,000 wait, and all beyond 3,000."""
    goes_on, infer = threading.Event(), services.inference.infer

    def wait_then_infer(*arguments: Any) -> Any:
        goes_on.wait(WAIT_S)
        return infer(*arguments)

    monkeypatch.setattr(services.inference, "infer", wait_then_infer)
    calls = [unary(channel).future(b"abc", timeout=2 * WAIT_S) for _ in range(3500)]
    time.sleep(0.2)  # most have reached the server by then
    goes_on.set()
    assert {call.code() for call in calls} == {grpc.StatusCode.OK}


@pytest.fixture
def stream(channel: grpc.Channel) -> Iterator[Stream]:
    stream = Stream(channel)
    yield stream
    stream.close()


class TestModelStreamInfer:
    def test_responses_keep_the_order_of_the_requests(self, stream: Stream, services: FakeServices) -> None:
        stream.send(b"hold-0", b"hold-1", b"hold-2")
        for one in reversed([held(services) for _ in range(3)]):
            one.sink.succeed(response(one.payload.decode()))
        assert [stream.next() for _ in range(3)] == [response(f"hold-{number}") for number in range(3)]

    def test_the_client_ends_the_stream(self, stream: Stream, services: FakeServices) -> None:
        stream.send(b"hold")
        stream.close()
        held(services).sink.succeed(response("last"))
        assert stream.next() == response("last")
        assert list(stream.call) == []
        assert stream.call.code() is grpc.StatusCode.OK

    def test_an_error_is_a_message_and_does_not_end_the_stream(self, stream: Stream, services: FakeServices) -> None:
        stream.send(b"NotFound", b"hold")
        held(services).sink.succeed(response("next"))
        assert stream.next() == "unknown model 'größe'"
        assert stream.next() == response("next")

    def test_an_error_ends_the_stream_if_the_client_asks_for_it(
        self, channel: grpc.Channel, services: FakeServices
    ) -> None:
        stream = Stream(channel, metadata=(("triton_grpc_error", "true"),))
        stream.send(b"hold-1", b"ResourceExhausted", b"hold-2")
        one, two = held(services), held(services)
        one.sink.succeed(response("one"))
        assert stream.next() == response("one")
        error = refusal(stream.next)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert [tuple(pair) for pair in error.trailing_metadata()] == [("grpc-retry-pushback-ms", "25")]
        assert two.is_cancelled.wait(WAIT_S)
        stream.close()

    def test_a_cancelled_stream_cancels_its_requests(self, stream: Stream, services: FakeServices) -> None:
        stream.send(b"hold", b"hold")
        one, two = held(services), held(services)
        stream.call.cancel()
        assert one.is_cancelled.wait(WAIT_S)
        assert two.is_cancelled.wait(WAIT_S)

    def test_the_deadline_reaches_the_service(self, stream: Stream, services: FakeServices) -> None:
        stream.send(b"hold")
        deadline = held(services).deadline
        assert deadline is not None
        assert 0 < deadline - time.monotonic() <= WAIT_S + 1  # gRPC rounds it up

    def test_the_number_of_requests_in_flight_is_limited(self, stream: Stream, services: FakeServices) -> None:
        stream.send(*[b"hold-%d" % number for number in range(MAX_IN_FLIGHT + 1)])
        waiting = [held(services) for _ in range(MAX_IN_FLIGHT)]
        with pytest.raises(queue.Empty):
            services.inference.held.get(timeout=0.05)
        waiting[0].sink.succeed(response("first"))
        assert stream.next() == response("first")
        assert held(services).payload == b"hold-%d" % MAX_IN_FLIGHT

    @ONCE
    def test_without_a_thread_it_is_refused(self, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(thread: threading.Thread) -> None:
            if thread.name == "infer-stream":
                raise RuntimeError("can't start new thread")
            start(thread)

        start = threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", refuse)
        stream = Stream(channel)
        stream.close()
        error = refusal(stream.next)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert error.details() == "the stream was not started: can't start new thread"

    def test_an_oversized_message_ends_the_stream(self, stream: Stream) -> None:
        stream.send(b"x" * (LIMIT + 1))
        assert refusal(stream.next).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


class TestOpenStreams:
    def test_their_number_is_limited(self) -> None:
        streams, calls = OpenStreams(None), OpenCalls("Stream", Refusals(), 1)
        with (
            streams.register(calls, "unix:", lambda: None),
            pytest.raises(ResourceExhausted, match="at most 1 Stream calls"),
            streams.register(calls, "unix:", lambda: None),
        ):
            pass
        with streams.register(calls, "unix:", lambda: None):
            pass

    def test_end_asks_them_to_end_and_refuses_new_ones(self) -> None:
        streams, calls, asked = OpenStreams(None), OpenCalls("Stream", Refusals(), 2), []
        with streams.register(calls, "unix:", lambda: asked.append(1)):
            streams.end()
        assert asked == [1]
        with pytest.raises(Unavailable), streams.register(calls, "unix:", lambda: None):
            pass


class TestReflection:
    def test_describes_the_protocol(self, channel: grpc.Channel) -> None:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = ["convoy.models.ModelControl", "grpc.health.v1.Health", "inference.GRPCInferenceService"]
        assert list(database.get_services()) == services
        pool = DescriptorPool(database)
        methods = pool.FindServiceByName("inference.GRPCInferenceService").methods_by_name
        assert methods["ModelInfer"].input_type.fields_by_name["raw_input_contents"].number == 7
        assert pool.FindMessageTypeByName("inference.ModelConfig").fields_by_name["max_batch_size"].number == 4

    @pytest.mark.parametrize("path", REFLECTION)
    def test_answers_in_both_versions(self, channel: grpc.Channel, path: str) -> None:
        call = channel.stream_stream(
            path,
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        [response] = call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=WAIT_S)
        assert len(response.list_services_response.service) == 3


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def other() -> Authority:
    return Authority("another authority")


@ONCE
class TestTls:
    def infer(self, server: GrpcioFrontend, trusted: Authority, *pair: bytes) -> bytes:
        """One inference over a new connection."""
        credentials = grpc.ssl_channel_credentials(trusted.certificate, *reversed(pair))
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(f"localhost:{server.port}", credentials, options) as channel:
            return ask(channel, INFER, b"abc")

    def is_refused(self, *arguments: Any) -> bool:
        return refusal(lambda: self.infer(*arguments)).code() is grpc.StatusCode.UNAVAILABLE

    def test_clients_that_trust_the_certificate_are_served(
        self, serve: Serve, tmp_path: Path, authority: Authority, other: Authority
    ) -> None:
        server = serve(tls=TlsFiles(*write(tmp_path, authority.issue())))
        assert self.infer(server, authority) == b"ABC"
        assert self.is_refused(server, other)

    def test_plain_text_is_refused(self, serve: Serve, tmp_path: Path, authority: Authority) -> None:
        server = serve(tls=TlsFiles(*write(tmp_path, authority.issue())))
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            assert refusal(lambda: ask(channel, INFER)).code() is grpc.StatusCode.UNAVAILABLE

    def test_new_connections_use_a_new_certificate_and_old_ones_stay_open(
        self, serve: Serve, tmp_path: Path, authority: Authority, other: Authority
    ) -> None:
        server = serve(tls=TlsFiles(*write(tmp_path, authority.issue())))
        credentials = grpc.ssl_channel_credentials(authority.certificate)
        with grpc.secure_channel(f"localhost:{server.port}", credentials) as before:
            assert ask(before, INFER, b"abc") == b"ABC"
            write(tmp_path, other.issue())
            assert self.infer(server, other) == b"ABC"
            assert self.is_refused(server, authority)
            assert ask(before, INFER, b"abc") == b"ABC"

    def test_a_certificate_without_its_key_is_not_used(
        self, serve: Serve, tmp_path: Path, authority: Authority, other: Authority
    ) -> None:
        certificate, key = write(tmp_path, authority.issue())
        server = serve(tls=TlsFiles(certificate, key))
        certificate.write_bytes(other.issue().certificate)
        assert self.infer(server, authority) == b"ABC"

    def test_clients_need_a_certificate_under_mutual_tls(
        self, serve: Serve, tmp_path: Path, authority: Authority, other: Authority
    ) -> None:
        accepted = tmp_path / "ca.crt"
        accepted.write_bytes(authority.certificate)
        server = serve(tls=TlsFiles(*write(tmp_path, authority.issue()), accepted))
        ours, theirs = authority.issue("caller"), other.issue("caller")
        assert self.infer(server, authority, ours.certificate, ours.key) == b"ABC"
        assert self.is_refused(server, authority)
        assert self.is_refused(server, authority, theirs.certificate, theirs.key)
        accepted.write_bytes(other.certificate)
        assert self.infer(server, authority, theirs.certificate, theirs.key) == b"ABC"
        assert self.is_refused(server, authority, ours.certificate, ours.key)


class TestAccessLog:
    @pytest.fixture
    def server(self, serve: Serve) -> GrpcioFrontend:
        return serve(access_log=True)

    def test_contains_streams_and_unknown_rpcs(
        self, channel: grpc.Channel, log_entries: Callable[[int], list[tuple[str, str]]]
    ) -> None:
        stream = Stream(channel)
        stream.close()
        assert list(stream.call) == []
        assert log_entries(1) == [(STREAM_INFER, "OK")]
        refusal(lambda: ask(channel, "/no.Such/Rpc"))
        assert log_entries(2)[1:] == [("/no.Such/Rpc", "UNIMPLEMENTED")]


@ONCE
@pytest.mark.slow
def test_clients_that_ping_often_keep_their_connection(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC's own default, two strikes, closes it: the pings are often enough to show that."""
    options = [("grpc.keepalive_time_ms", 1300), ("grpc.keepalive_permit_without_calls", 1)]
    options += [("grpc.http2.max_pings_without_data", 0)]
    with contextlib.ExitStack() as stack:
        states: dict[int, list[grpc.ChannelConnectivity]] = {frontend.MAX_PING_STRIKES: [], 2: []}
        for max_ping_strikes, seen in states.items():
            monkeypatch.setattr(frontend, "MAX_PING_STRIKES", max_ping_strikes)
            channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{serve().port}", options))
            ask(channel, LIVE)
            channel.subscribe(seen.append)
        time.sleep(8)  # the third ping that comes too soon closes the connection
        ours, default = states.values()
    assert set(ours) == {grpc.ChannelConnectivity.READY}
    assert set(default) > {grpc.ChannelConnectivity.READY}


@ONCE
@pytest.mark.slow
def test_connections_are_renewed_without_failing_calls_or_streams(
    serve: Serve, services: FakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend, "MAX_CONNECTION_AGE_S", 1)
    states: list[grpc.ChannelConnectivity] = []
    with grpc.insecure_channel(f"127.0.0.1:{serve().port}") as channel:
        channel.subscribe(states.append)
        watching = watch(channel, "")
        assert next(watching).status == NOT_SERVING
        until = time.monotonic() + WAIT_S
        while states.count(grpc.ChannelConnectivity.READY) < 3:
            assert time.monotonic() < until, states
            assert ask(channel, INFER, b"abc") == b"ABC"
        services.admin.health.update(True, {})
        assert next(watching).status == SERVING
        watching.cancel()
