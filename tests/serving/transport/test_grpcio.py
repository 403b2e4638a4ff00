"""The grpcio transport, asked by grpcio's own client over real sockets."""

import contextlib
import functools
import logging
import queue
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from protos import grpc_service_pb2 as pb
from protos import health_pb2
from serving.errors import ResourceExhausted, StartupError, Unavailable
from serving.health import NOT_SERVING, SERVICE_UNKNOWN, SERVING
from serving.logs import AccessLog
from serving.security import TlsFiles, Token
from serving.service import HEALTH_CHECK, HEALTH_WATCH, INFER, STREAM_INFER
from serving.transport.grpcio import GrpcioTransport, lane, transport
from serving.transport.grpcio.handlers import MAX_BLOCKING, REFLECTION
from serving.transport.grpcio.infer_stream import MAX_IN_FLIGHT
from serving.transport.grpcio.rpc import unanswered_code
from serving.transport.grpcio.streams import OpenStreams
from tests.serving.certificates import Authority, write
from tests.serving.transport.fake_service import ERRORS, FakeService, Held

LIVE = "/inference.GRPCInferenceService/ServerLive"
LOAD = "/inference.GRPCInferenceService/RepositoryModelLoad"
WAIT_S = 30.0
LIMIT = 1 << 20

Serve = Callable[..., GrpcioTransport]


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def serve(service: FakeService) -> Iterator[Serve]:
    """Starts servers of the service; all of them end with the test, and with their threads."""
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> GrpcioTransport:
            options = {"address": "127.0.0.1:0", "max_message_bytes": LIMIT} | options
            transport = GrpcioTransport(service, **options)  # type: ignore[arg-type]
            transport.start()
            stack.callback(transport.stop, 0)
            return transport

        yield start
    left = set(threading.enumerate()) - before
    assert [thread.name for thread in left if thread.name == "grpcio-infer"] == []


@pytest.fixture(params=["lane", "threads"])
def server(request: pytest.FixtureRequest, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> GrpcioTransport:
    """A server, both with the lane and as it is where grpcio's inside is not what the lane knows."""
    if request.param == "threads":
        monkeypatch.setattr(lane, "cygrpc", types.SimpleNamespace())
    transport = serve()
    assert (transport._lane is None) == (request.param == "threads")
    return transport


@pytest.fixture
def channel(server: GrpcioTransport) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


def unary(channel: grpc.Channel, path: str = INFER) -> grpc.UnaryUnaryMultiCallable:
    return channel.unary_unary(path)


def ask(channel: grpc.Channel, path: str, payload: bytes = b"", **options: Any) -> bytes:
    answer: bytes = unary(channel, path)(payload, timeout=WAIT_S, **options)
    return answer


def refusal(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def held(service: FakeService) -> Held:
    return service.held.get(timeout=WAIT_S)


class TestUnary:
    @pytest.mark.parametrize(("path", "answer"), [(INFER, b"ABC"), (LIVE, b"abc")])
    def test_answers(self, channel: grpc.Channel, path: str, answer: bytes) -> None:
        assert ask(channel, path, b"abc") == answer
        assert ask(channel, path, b"") == b""

    @pytest.mark.parametrize("path", [INFER, LIVE])
    @pytest.mark.parametrize("name", sorted(ERRORS.keys() - {b"long", b"Unsupported"}))
    def test_errors_have_their_code_text_and_trailers(self, channel: grpc.Channel, path: str, name: bytes) -> None:
        error = refusal(lambda: ask(channel, path, name))
        codes = {"InvalidArgument": "INVALID_ARGUMENT", "DeadlineExceeded": "DEADLINE_EXCEEDED"}
        codes |= {"NotFound": "NOT_FOUND", "ResourceExhausted": "RESOURCE_EXHAUSTED"}
        assert error.code().name == codes.get(name.decode(), name.decode().upper())
        assert error.details() == str(ERRORS[name])
        trailers = [tuple(pair) for pair in error.trailing_metadata()]
        assert trailers == ([("grpc-retry-pushback-ms", "25")] if name == b"ResourceExhausted" else [])

    @pytest.mark.parametrize("path", [INFER, LIVE])
    def test_a_long_text_is_cut_to_what_a_header_holds(self, channel: grpc.Channel, path: str) -> None:
        error = refusal(lambda: ask(channel, path, b"long"))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert set(error.details()) == {"ü"}

    def test_a_defect_is_internal_and_in_the_log(self, channel: grpc.Channel, caplog: pytest.LogCaptureFixture) -> None:
        error = refusal(lambda: ask(channel, LIVE, b"crash"))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "nobody" not in error.details()
        assert f"{LIVE} could not be answered" in caplog.text
        assert "nobody expects this" in caplog.text

    def test_an_unknown_rpc_is_named(self, channel: grpc.Channel) -> None:
        error = refusal(lambda: ask(channel, "/some.Service/Method"))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "unknown RPC '/some.Service/Method'" in error.details()

    @pytest.mark.parametrize("path", [INFER, LIVE])
    def test_a_message_over_the_limit_is_refused_and_one_at_it_is_not(self, channel: grpc.Channel, path: str) -> None:
        error = refusal(lambda: ask(channel, path, b"x" * (LIMIT + 1)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        options = {"compression": grpc.Compression.Gzip}
        assert refusal(lambda: ask(channel, path, b"x" * 4 * LIMIT, **options)).code() is error.code()
        assert len(ask(channel, path, b"x" * (LIMIT - 100))) == LIMIT - 100

    @pytest.mark.parametrize("path", [INFER, LIVE])
    def test_a_call_without_a_message_is_refused(self, channel: grpc.Channel, path: str) -> None:
        error = refusal(lambda: list(channel.stream_stream(path)(iter(()), timeout=WAIT_S)))
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
        assert ask(channel, path, b"1") == b"1"

    def test_answers_are_not_mixed_up(self, channel: grpc.Channel, service: FakeService) -> None:
        calls = [unary(channel).future(b"hold-%d" % number, timeout=WAIT_S) for number in range(100)]
        waiting = sorted((held(service) for _ in calls), key=lambda one: one.payload[::-1])
        for one in waiting:
            one.call.succeed(b"for " + one.payload)
        assert [call.result() for call in calls] == [b"for hold-%d" % number for number in range(100)]

    def test_slow_rpcs_are_limited_and_hold_nobody_up(self, channel: grpc.Channel, service: FakeService) -> None:
        loads = [unary(channel, LOAD).future(b"%d" % number, timeout=WAIT_S) for number in range(MAX_BLOCKING + 1)]
        refused = {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert {next_done(loads).code()} == refused
        assert ask(channel, LIVE, b"still here") == b"still here"
        service.gate.set()
        assert len([load for load in loads if load.code() is grpc.StatusCode.OK]) == MAX_BLOCKING


def next_done(calls: list[Any]) -> Any:
    done: queue.Queue[Any] = queue.Queue()
    for call in calls:
        call.add_done_callback(done.put)
    return done.get(timeout=WAIT_S)


class TestDeadlinesAndCancellation:
    def test_the_deadline_reaches_the_service(self, channel: grpc.Channel, service: FakeService) -> None:
        call = unary(channel).future(b"hold", timeout=WAIT_S)
        one = held(service)
        assert one.deadline is not None
        assert 0 < one.deadline - time.monotonic() <= WAIT_S + 1  # gRPC rounds it up
        one.call.succeed(b"")
        assert call.result() == b""

    def test_no_deadline_is_none(self, channel: grpc.Channel, service: FakeService) -> None:
        call = unary(channel).future(b"hold")
        one = held(service)
        assert one.deadline is None
        one.call.succeed(b"")
        assert call.result() == b""

    def test_a_passed_deadline_cancels(self, channel: grpc.Channel, service: FakeService) -> None:
        error = refusal(lambda: unary(channel)(b"hold", timeout=0.2))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # On a busy machine the time may be up before the message is in.
        with contextlib.suppress(queue.Empty):
            assert service.held.get(timeout=1).is_cancelled.wait(WAIT_S)

    def test_a_caller_who_goes_cancels_and_a_late_answer_harms_nobody(
        self, channel: grpc.Channel, service: FakeService
    ) -> None:
        goes = unary(channel).future(b"hold-1")
        stays = unary(channel).future(b"hold-2", timeout=WAIT_S)
        one, two = sorted([held(service), held(service)], key=lambda held: held.payload)
        goes.cancel()
        assert one.is_cancelled.wait(WAIT_S)
        one.call.succeed(b"late")
        assert not two.is_cancelled.is_set()
        two.call.succeed(b"in time")
        assert stays.result() == b"in time"

    def test_a_closed_channel_cancels(self, server: GrpcioTransport, service: FakeService) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = unary(channel).future(b"hold")
            one = held(service)
        assert call.code() is grpc.StatusCode.CANCELLED
        assert one.is_cancelled.wait(WAIT_S)

    def test_an_answered_call_is_not_cancelled(self, channel: grpc.Channel, service: FakeService) -> None:
        call = unary(channel).future(b"hold", timeout=WAIT_S)
        one = held(service)
        one.call.succeed(b"done")
        assert call.result() == b"done"
        ask(channel, LIVE)
        assert not one.is_cancelled.is_set()

    def test_many_callers_some_of_whom_go(self, channel: grpc.Channel, service: FakeService) -> None:
        failures: list[str] = []

        def call() -> None:
            for number in range(60):
                if number % 3 == 0:
                    unary(channel).future(b"hold").cancel()
                elif ask(channel, INFER, b"n%d" % number) != b"N%d" % number:
                    failures.append(str(number))

        callers = [threading.Thread(target=call) for _ in range(6)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert failures == []
        while not service.held.empty():
            assert service.held.get().is_cancelled.wait(WAIT_S)


class Stream:
    """One ModelStreamInfer as a client has it."""

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
        found: bytes | str = message.error_message or message.infer_response.SerializeToString()
        return found


def answer(name: str) -> bytes:
    payload: bytes = pb.ModelInferResponse(model_name=name).SerializeToString()
    return payload


@pytest.fixture
def stream(channel: grpc.Channel) -> Iterator[Stream]:
    stream = Stream(channel)
    yield stream
    stream.close()


class TestModelStreamInfer:
    def test_answers_come_in_the_order_of_the_requests(self, stream: Stream, service: FakeService) -> None:
        stream.send(b"hold-0", b"hold-1", b"hold-2")
        for one in reversed([held(service) for _ in range(3)]):
            one.call.succeed(answer(one.payload.decode()))
        assert [stream.next() for _ in range(3)] == [answer(f"hold-{number}") for number in range(3)]

    def test_the_callers_end_is_the_end(self, stream: Stream, service: FakeService) -> None:
        stream.send(b"hold")
        stream.close()
        held(service).call.succeed(answer("last"))
        assert stream.next() == answer("last")
        assert list(stream.call) == []
        assert stream.call.code() is grpc.StatusCode.OK

    def test_an_error_is_a_message_and_the_stream_goes_on(self, stream: Stream, service: FakeService) -> None:
        stream.send(b"NotFound", b"hold")
        held(service).call.succeed(answer("next"))
        assert stream.next() == "unknown model 'größe'"
        assert stream.next() == answer("next")

    def test_an_error_is_the_end_where_the_caller_wants_it(self, channel: grpc.Channel, service: FakeService) -> None:
        stream = Stream(channel, metadata=(("triton_grpc_error", "true"),))
        stream.send(b"hold-1", b"ResourceExhausted", b"hold-2")
        one, two = held(service), held(service)
        one.call.succeed(answer("one"))
        assert stream.next() == answer("one")
        error = refusal(stream.next)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert [tuple(pair) for pair in error.trailing_metadata()] == [("grpc-retry-pushback-ms", "25")]
        assert two.is_cancelled.wait(WAIT_S)
        stream.close()

    def test_a_caller_who_goes_cancels_all_that_waits(self, stream: Stream, service: FakeService) -> None:
        stream.send(b"hold", b"hold")
        one, two = held(service), held(service)
        stream.call.cancel()
        assert one.is_cancelled.wait(WAIT_S)
        assert two.is_cancelled.wait(WAIT_S)

    def test_the_deadline_reaches_the_service(self, stream: Stream, service: FakeService) -> None:
        stream.send(b"hold")
        deadline = held(service).deadline
        assert deadline is not None
        assert 0 < deadline - time.monotonic() <= WAIT_S + 1  # gRPC rounds it up

    def test_so_many_and_no_more_are_under_way(self, stream: Stream, service: FakeService) -> None:
        stream.send(*[b"hold-%d" % number for number in range(MAX_IN_FLIGHT + 1)])
        waiting = [held(service) for _ in range(MAX_IN_FLIGHT)]
        with pytest.raises(queue.Empty):
            service.held.get(timeout=0.05)
        waiting[0].call.succeed(answer("first"))
        assert stream.next() == answer("first")
        assert held(service).payload == b"hold-%d" % MAX_IN_FLIGHT

    def test_an_oversized_message_ends_the_stream(self, stream: Stream) -> None:
        stream.send(b"x" * (LIMIT + 1))
        assert refusal(stream.next).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


class TestOpenStreams:
    def test_there_is_a_limit(self) -> None:
        streams = OpenStreams(1)
        with (
            streams.hold(lambda: None),
            pytest.raises(ResourceExhausted, match="at most 1 streams"),
            streams.hold(lambda: None),
        ):
            pass
        with streams.hold(lambda: None):
            pass

    def test_they_are_asked_to_end_and_none_may_come(self) -> None:
        streams, asked = OpenStreams(2), []
        with streams.hold(lambda: asked.append(1)):
            streams.end()
        assert asked == [1]
        with pytest.raises(Unavailable), streams.hold(lambda: None):
            pass


def watch(channel: grpc.Channel, service: str) -> Any:
    call = channel.unary_stream(
        HEALTH_WATCH,
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    return call(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)


class TestHealth:
    def test_check(self, channel: grpc.Channel, service: FakeService) -> None:
        service.health.update(True, {"mnist": False})
        for name, state in (("", SERVING), ("mnist", NOT_SERVING), ("liveness", SERVING)):
            request = health_pb2.HealthCheckRequest(service=name).SerializeToString()
            answer = health_pb2.HealthCheckResponse.FromString(ask(channel, HEALTH_CHECK, request))
            assert answer.status == state

    def test_watch_tells_the_state_and_its_changes(self, channel: grpc.Channel, service: FakeService) -> None:
        states = watch(channel, "mnist")
        assert next(states).status == SERVICE_UNKNOWN
        service.health.update(True, {"mnist": True})
        assert next(states).status == SERVING
        service.health.drain()
        assert next(states).status == NOT_SERVING
        states.cancel()

    def test_a_watcher_who_goes_is_forgotten(self, channel: grpc.Channel, service: FakeService) -> None:
        states = watch(channel, "mnist")
        next(states)
        assert list(service.health._listeners) == ["mnist"]
        states.cancel()
        wait_until(lambda: service.health._listeners == {})

    def test_what_is_no_message_is_refused(self, channel: grpc.Channel) -> None:
        call = channel.unary_stream(HEALTH_WATCH)(b"\xff\xff", timeout=WAIT_S)
        assert refusal(lambda: next(call)).code() is grpc.StatusCode.INVALID_ARGUMENT


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


class TestReflection:
    def test_tools_can_read_the_protocol(self, channel: grpc.Channel) -> None:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert list(database.get_services()) == ["grpc.health.v1.Health", "inference.GRPCInferenceService"]
        pool = DescriptorPool(database)
        methods = pool.FindServiceByName("inference.GRPCInferenceService").methods_by_name
        assert methods["ModelInfer"].input_type.fields_by_name["raw_input_contents"].number == 7
        assert pool.FindMessageTypeByName("inference.ModelConfig").fields_by_name["max_batch_size"].number == 4

    @pytest.mark.parametrize("path", REFLECTION)
    def test_in_both_versions(self, channel: grpc.Channel, path: str) -> None:
        call = channel.stream_stream(
            path,
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        [answer] = call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=WAIT_S)
        assert len(answer.list_services_response.service) == 2


def bearer(token: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {token}"),)}


class TestToken:
    @pytest.fixture
    def token_file(self, tmp_path: Path) -> Path:
        path = tmp_path / "token"
        path.write_text("secret-1")
        path.chmod(0o600)
        return path

    @pytest.fixture
    def channel(self, serve: Serve, token_file: Path) -> Iterator[grpc.Channel]:
        with grpc.insecure_channel(f"127.0.0.1:{serve(token=Token(token_file)).port}") as channel:
            yield channel

    @pytest.mark.parametrize("path", [INFER, LIVE])
    def test_is_asked_for(self, channel: grpc.Channel, path: str) -> None:
        assert ask(channel, path, b"1", **bearer("secret-1")) == b"1"
        for options in ({}, bearer("secret-2"), {"metadata": (("authorization-bin", b"Bearer secret-1"),)}):
            error = refusal(functools.partial(ask, channel, path, b"1", **options))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "authorization: Bearer TOKEN" in error.details()

    def test_changes_while_the_server_runs(self, channel: grpc.Channel, token_file: Path) -> None:
        assert ask(channel, INFER, b"1", **bearer("secret-1")) == b"1"
        token_file.with_name("new").write_text("secret-2")
        token_file.with_name("new").replace(token_file)
        assert ask(channel, INFER, b"1", **bearer("secret-2")) == b"1"
        error = refusal(lambda: ask(channel, INFER, b"1", **bearer("secret-1")))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED

    def test_is_asked_for_on_streams_reflection_and_unknown_rpcs(self, channel: grpc.Channel) -> None:
        for path in (STREAM_INFER, REFLECTION[0], "/no.Such/Rpc"):
            call = channel.stream_stream(path)(iter([b""]), timeout=WAIT_S)
            error = refusal(functools.partial(next, call))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED

    def test_is_not_asked_for_by_health(self, channel: grpc.Channel) -> None:
        assert health_pb2.HealthCheckResponse.FromString(ask(channel, HEALTH_CHECK)).status == NOT_SERVING
        states = watch(channel, "")
        assert next(states).status == NOT_SERVING
        states.cancel()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def other() -> Authority:
    return Authority("another authority")


class TestTls:
    def infer(self, server: GrpcioTransport, trusted: Authority, *pair: bytes) -> bytes:
        """One inference over a new connection."""
        credentials = grpc.ssl_channel_credentials(trusted.certificate, *reversed(pair))
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(f"localhost:{server.port}", credentials, options) as channel:
            return ask(channel, INFER, b"abc")

    def is_refused(self, *arguments: Any) -> bool:
        return refusal(lambda: self.infer(*arguments)).code() is grpc.StatusCode.UNAVAILABLE

    def test_serves_those_who_trust_it(
        self, serve: Serve, tmp_path: Path, authority: Authority, other: Authority
    ) -> None:
        server = serve(tls=TlsFiles(*write(tmp_path, authority.issue())))
        assert self.infer(server, authority) == b"ABC"
        assert self.is_refused(server, other)

    def test_plain_text_is_refused(self, serve: Serve, tmp_path: Path, authority: Authority) -> None:
        server = serve(tls=TlsFiles(*write(tmp_path, authority.issue())))
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            assert refusal(lambda: ask(channel, INFER)).code() is grpc.StatusCode.UNAVAILABLE

    def test_new_connections_take_a_new_certificate_and_old_ones_go_on(
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

    def test_half_a_new_certificate_changes_nothing(
        self, serve: Serve, tmp_path: Path, authority: Authority, other: Authority
    ) -> None:
        certificate, key = write(tmp_path, authority.issue())
        server = serve(tls=TlsFiles(certificate, key))
        certificate.write_bytes(other.issue().certificate)
        assert self.infer(server, authority) == b"ABC"

    def test_callers_need_a_certificate_where_it_is_asked_for(
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


class TestAddress:
    def start(self, service: FakeService, address: str) -> str:
        """What the operator is told when a server cannot listen there."""
        transport = GrpcioTransport(service, address=address, max_message_bytes=LIMIT)  # type: ignore[arg-type]
        with pytest.raises(StartupError) as caught:
            transport.start()
        transport.stop(0)
        return str(caught.value)

    def test_a_taken_port_is_one_line(
        self, service: FakeService, serve: Serve, capfd: pytest.CaptureFixture[str]
    ) -> None:
        address = f"127.0.0.1:{serve().port}"
        assert self.start(service, address) == f"cannot listen on {address}: address already in use"
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize(
        ("address", "complaint"),
        [
            ("192.0.2.1:0", "cannot assign requested address"),
            ("no.such.host.invalid:0", ""),
            ("127.0.0.1", "HOST:PORT"),
            ("127.0.0.1:99999", "up to 65535"),
            ("unix:/no/such/folder/socket", "no such file or directory"),
            ("unix:/" + 200 * "x", "path too long"),
        ],
    )
    def test_what_is_no_address_of_ours_is_one_line(
        self, service: FakeService, address: str, complaint: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        line = self.start(service, address)
        assert line.startswith(f"cannot listen on {address}: ")
        assert complaint in line
        assert capfd.readouterr().err == ""

    def test_a_port_whose_connections_have_just_ended_is_free(self, serve: Serve) -> None:
        first = serve()
        with grpc.insecure_channel(f"127.0.0.1:{first.port}") as channel:
            ask(channel, LIVE)
            first.stop(0)
        assert serve(address=f"127.0.0.1:{first.port}").port == first.port

    def test_a_unix_socket(self, serve: Serve, service: FakeService, tmp_path: Path) -> None:
        address = f"unix:{tmp_path / 'socket'}"
        assert serve(address=address).port == 0
        with grpc.insecure_channel(address) as channel:
            assert ask(channel, INFER, b"abc") == b"ABC"
        assert "address already in use" in self.start(service, address)

    def test_a_unix_socket_left_behind_is_replaced(self, serve: Serve, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        serve(address=f"unix:{path}")
        with grpc.insecure_channel(f"unix:{path}") as channel:
            assert ask(channel, INFER, b"abc") == b"ABC"

    def test_a_file_is_not_replaced(self, service: FakeService, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        assert "is no socket" in self.start(service, f"unix:{tmp_path / 'file'}")
        assert (tmp_path / "file").read_text() == "mine"


class TestStop:
    def test_calls_under_way_are_answered_and_new_ones_refused(
        self, server: GrpcioTransport, channel: grpc.Channel, service: FakeService
    ) -> None:
        call = unary(channel).future(b"hold", timeout=WAIT_S)
        stream = Stream(channel)
        stream.send(b"hold")
        one, two = held(service), held(service)
        stopping = threading.Thread(target=server.stop, args=(WAIT_S,))
        stopping.start()
        wait_until(lambda: is_refused(server))
        one.call.succeed(answer("unhurt"))
        two.call.succeed(answer("unhurt"))
        assert call.result() == answer("unhurt")
        assert stream.next() == answer("unhurt")
        error = refusal(stream.next)
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        stopping.join(WAIT_S)
        assert not stopping.is_alive()
        stream.close()

    def test_what_is_not_done_by_then_is_cancelled(
        self, server: GrpcioTransport, channel: grpc.Channel, service: FakeService
    ) -> None:
        call = unary(channel).future(b"hold", timeout=WAIT_S)
        one = held(service)
        server.stop(0.05)
        assert one.is_cancelled.wait(WAIT_S)
        assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        one.call.succeed(b"too late for anyone")

    def test_open_streams_do_not_hold_it_up(self, server: GrpcioTransport, channel: grpc.Channel) -> None:
        states = watch(channel, "")
        next(states)
        idle = Stream(channel)
        idle.send(b"NotFound")
        idle.next()
        requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        requests.put(reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString())
        tool = channel.stream_stream(REFLECTION[0])(iter(requests.get, None), timeout=WAIT_S)
        next(tool)
        began = time.monotonic()
        server.stop(2 * WAIT_S)
        assert time.monotonic() - began < WAIT_S
        assert refusal(lambda: next(states)).code() is grpc.StatusCode.UNAVAILABLE
        assert refusal(idle.next).code() is grpc.StatusCode.UNAVAILABLE
        assert refusal(lambda: next(tool)).code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        idle.close()
        requests.put(None)

    def test_a_server_that_never_started_stops(self, service: FakeService) -> None:
        GrpcioTransport(service, address="127.0.0.1:0", max_message_bytes=LIMIT).stop(WAIT_S)  # type: ignore[arg-type]


def is_refused(server: GrpcioTransport) -> bool:
    """Whether a new connection gets no answer."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            ask(channel, LIVE)
        except grpc.RpcError as error:
            return bool(error.code() is grpc.StatusCode.UNAVAILABLE)
    return False


class TestAccessLog:
    @pytest.fixture
    def lines(self, caplog: pytest.LogCaptureFixture) -> Callable[[int], list[tuple[str, str]]]:
        caplog.set_level(logging.INFO, "serving.access")

        def wait(number: int) -> list[tuple[str, str]]:
            wait_until(lambda: len(caplog.records) >= number)
            found = [record.__dict__["fields"] for record in caplog.records]
            assert all(line["peer"].startswith("ipv4:127.0.0.1:") and line["seconds"] >= 0 for line in found)
            return [(line["method"], line["status"]) for line in found]

        return wait

    @pytest.fixture
    def server(self, serve: Serve) -> GrpcioTransport:
        return serve(access_log=AccessLog())

    @pytest.mark.parametrize("path", [INFER, LIVE])
    def test_has_a_line_for_each_rpc(
        self, channel: grpc.Channel, lines: Callable[[int], list[tuple[str, str]]], path: str
    ) -> None:
        ask(channel, path, b"1")
        assert lines(1) == [(path, "OK")]
        refusal(lambda: ask(channel, path, b"NotFound"))
        assert lines(2)[1:] == [(path, "NOT_FOUND")]

    def test_tells_who_went(
        self, channel: grpc.Channel, service: FakeService, lines: Callable[[int], list[tuple[str, str]]]
    ) -> None:
        call = unary(channel).future(b"hold")
        held(service)
        call.cancel()
        assert lines(1) == [(INFER, "CANCELLED")]
        states = watch(channel, "")
        next(states)
        states.cancel()
        assert lines(2)[1:] == [(HEALTH_WATCH, "CANCELLED")]

    def test_tells_a_passed_deadline(
        self, channel: grpc.Channel, lines: Callable[[int], list[tuple[str, str]]]
    ) -> None:
        refusal(lambda: unary(channel)(b"hold", timeout=0.2))
        # At its deadline the client cancels too: what comes first is a matter of how long the request was on its way.
        assert lines(1) in ([(INFER, "DEADLINE_EXCEEDED")], [(INFER, "CANCELLED")])
        assert unanswered_code(time.monotonic()) == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert unanswered_code(time.monotonic() + WAIT_S) == grpc.StatusCode.CANCELLED.value[0]
        assert unanswered_code(None) == grpc.StatusCode.CANCELLED.value[0]

    def test_has_streams_and_unknown_rpcs(
        self, channel: grpc.Channel, lines: Callable[[int], list[tuple[str, str]]]
    ) -> None:
        stream = Stream(channel)
        stream.close()
        assert list(stream.call) == []
        assert lines(1) == [(STREAM_INFER, "OK")]
        refusal(lambda: ask(channel, "/no.Such/Rpc"))
        assert lines(2)[1:] == [("/no.Such/Rpc", "UNIMPLEMENTED")]


@pytest.mark.slow
@pytest.mark.parametrize(("min_ping_interval_s", "is_kept"), [(1, True), (300, False)])  # 300 s is gRPC's default
def test_clients_that_ping_more_seldom_than_the_limit_keep_their_connection(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, min_ping_interval_s: int, is_kept: bool
) -> None:
    monkeypatch.setattr(transport, "MIN_PING_INTERVAL_S", min_ping_interval_s)
    options = [("grpc.keepalive_time_ms", 1300), ("grpc.keepalive_permit_without_calls", 1)]
    options += [("grpc.http2.max_pings_without_data", 0)]
    with grpc.insecure_channel(f"127.0.0.1:{serve().port}", options) as channel:
        states: list[grpc.ChannelConnectivity] = []
        ask(channel, LIVE)
        channel.subscribe(states.append)
        time.sleep(8)  # the third ping that comes too soon closes the connection
        assert (set(states) == {grpc.ChannelConnectivity.READY}) is is_kept


@pytest.mark.slow
def test_connections_are_renewed_without_a_failed_call_or_a_cut_stream(
    serve: Serve, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_CONNECTION_AGE_S", 1)
    states: list[grpc.ChannelConnectivity] = []
    with grpc.insecure_channel(f"127.0.0.1:{serve().port}") as channel:
        channel.subscribe(states.append)
        watching = watch(channel, "")
        assert next(watching).status == NOT_SERVING
        until = time.monotonic() + 8
        while time.monotonic() < until:
            assert ask(channel, INFER, b"abc") == b"ABC"
        service.health.update(True, {})
        assert next(watching).status == SERVING
        watching.cancel()
    assert states.count(grpc.ChannelConnectivity.READY) > 1
