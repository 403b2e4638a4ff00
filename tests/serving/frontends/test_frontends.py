"""Behavior that all gRPC front ends share, tested with grpcio's own client over real sockets."""

import contextlib
import functools
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from convoy import auth
from convoy.auth import TokenFile
from protos import health_pb2
from serving.errors import StartupError
from serving.frontends import Frontend
from serving.frontends.common import limits
from serving.frontends.common.auth import SCOPES
from serving.frontends.common.limits import MAX_BLOCKING
from serving.frontends.common.status import code_without_response
from serving.frontends.grpcio import frontend
from serving.frontends.grpcio.handlers import REFLECTION
from serving.observability.health import NOT_SERVING, SERVICE_UNKNOWN, SERVING
from serving.protocol.methods import HEALTH_CHECK, HEALTH_WATCH, INFER, STREAM_INFER
from tests.serving.frontends import raw_http2
from tests.serving.frontends.callers import (
    LIMIT,
    LIVE,
    WAIT_S,
    Serve,
    Stream,
    ask,
    bearer,
    held,
    is_refused,
    reflection,
    refusal,
    response,
    silent_calls,
    unary,
    wait_until,
    watch,
)
from tests.serving.frontends.fake_service import ERRORS, FakeServices
from tests.serving.frontends.raw_http2 import EMPTY_MESSAGE

LOAD = "/inference.GRPCInferenceService/RepositoryModelLoad"

Make = Callable[..., Frontend]


def refused(services: FakeServices) -> dict[tuple[str, str], int]:
    """Returns the number of refused calls by method and status."""
    calls = services.inference.refusals.calls.snapshot()
    return {(method, status): sum(found.counts) for (method, status, _), found in calls.items()}


class TestUnary:
    @pytest.mark.parametrize(("path", "response"), [(INFER, b"ABC"), (LIVE, b"abc")])
    def test_responds(self, channel: grpc.Channel, path: str, response: bytes) -> None:
        assert ask(channel, path, b"abc") == response
        assert ask(channel, path, b"") == b""

    @pytest.mark.parametrize("path", [INFER, LIVE])
    @pytest.mark.parametrize("name", sorted(ERRORS.keys() - {b"long", b"Unsupported"}))
    def test_errors_have_a_code_details_and_trailers(
        self, channel: grpc.Channel, kind: str, path: str, name: bytes
    ) -> None:
        error = refusal(lambda: ask(channel, path, name))
        codes = {"InvalidArgument": "INVALID_ARGUMENT", "DeadlineExceeded": "DEADLINE_EXCEEDED"}
        codes |= {"NotFound": "NOT_FOUND", "ResourceExhausted": "RESOURCE_EXHAUSTED"}
        assert error.code().name == codes.get(name.decode(), name.decode().upper())
        assert error.details() == str(ERRORS[name])
        trailers = [tuple(pair) for pair in error.trailing_metadata()]
        # pygrpc-native refuses to send names that begin with grpc-.
        name_sent = "retry-pushback-ms" if kind == "native" else "grpc-retry-pushback-ms"
        assert trailers == ([(name_sent, "25")] if name == b"ResourceExhausted" else [])

    @pytest.mark.parametrize("path", [INFER, LIVE])
    def test_long_details_are_cut_to_fit_in_a_header(self, channel: grpc.Channel, path: str) -> None:
        error = refusal(lambda: ask(channel, path, b"long"))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert set(error.details()) == {"ü"}

    def test_an_unexpected_exception_is_internal_and_logged(
        self, channel: grpc.Channel, caplog: pytest.LogCaptureFixture
    ) -> None:
        error = refusal(lambda: ask(channel, LIVE, b"crash"))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "no one" not in error.details()
        assert f"{LIVE} failed" in caplog.text
        assert "no one expects this" in caplog.text

    def test_an_unknown_rpc_is_named(self, channel: grpc.Channel) -> None:
        error = refusal(lambda: ask(channel, "/some.Service/Method"))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "unknown RPC '/some.Service/Method'" in error.details()

    @pytest.mark.parametrize("path", [INFER, LIVE])
    def test_messages_over_the_limit_are_refused(self, channel: grpc.Channel, path: str) -> None:
        error = refusal(lambda: ask(channel, path, b"x" * (LIMIT + 1)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        options = {"compression": grpc.Compression.Gzip}
        assert refusal(lambda: ask(channel, path, b"x" * 4 * LIMIT, **options)).code() is error.code()
        assert len(ask(channel, path, b"x" * (LIMIT - 100))) == LIMIT - 100

    @pytest.mark.parametrize("path", [INFER, LIVE])
    def test_a_call_without_a_message_is_refused(self, channel: grpc.Channel, kind: str, path: str) -> None:
        error = refusal(lambda: list(channel.stream_stream(path)(iter(()), timeout=WAIT_S)))
        if kind == "native":  # by pygrpc-native itself
            assert error.code() is grpc.StatusCode.INTERNAL
        else:
            assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
        assert ask(channel, path, b"1") == b"1"

    def test_responses_reach_their_callers(self, channel: grpc.Channel, services: FakeServices) -> None:
        calls = [unary(channel).future(b"hold-%d" % number, timeout=WAIT_S) for number in range(100)]
        waiting = sorted((held(services) for _ in calls), key=lambda one: one.payload[::-1])
        for one in waiting:
            one.sink.succeed(b"for " + one.payload)
        assert [call.result() for call in calls] == [b"for hold-%d" % number for number in range(100)]


class TestOddCalls:
    """Calls as only faulty or hostile clients make them. They harm nobody else."""

    @pytest.mark.parametrize("kind", ["native", "grpcio"])  # with threads, they occupy those
    @pytest.mark.parametrize("path", [INFER, LIVE, HEALTH_CHECK, HEALTH_WATCH, LOAD])
    def test_without_their_messages_occupy_no_thread(
        self, serve: Serve, monkeypatch: pytest.MonkeyPatch, path: str
    ) -> None:
        for name in ("MAX_STREAMS", "MAX_WATCHES", "MAX_REFLECTIONS"):
            monkeypatch.setattr(limits, name, 1)
        monkeypatch.setattr(frontend, "NUM_SPARE_THREADS", 1)
        with grpc.insecure_channel(f"127.0.0.1:{serve().port}") as channel, silent_calls(channel, *[path] * 8):
            assert ask(channel, LIVE, b"1") == b"1"
            assert len(ask(channel, HEALTH_CHECK)) > 0
            stream = Stream(channel)
            stream.send(b"")
            assert stream.next() == response("")
            stream.close()

    @pytest.mark.parametrize("value", [b"\xff\xfe", b"\x80", "größe".encode("latin-1")])
    @pytest.mark.parametrize("name", [b"x-odd", b"authorization"])
    def test_with_metadata_that_are_not_unicode(
        self, server: Frontend, name: bytes, value: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert raw_http2.call(server.port, (name, value)) >= len(EMPTY_MESSAGE)
        assert caplog.records == []

    @pytest.mark.parametrize("timeout", [b"0m", b"99999999H", b"999999999H", b"-1S", b"abc"])
    def test_with_an_odd_timeout(self, server: Frontend, channel: grpc.Channel, timeout: bytes) -> None:
        raw_http2.call(server.port, (b"grpc-timeout", timeout))
        assert ask(channel, LIVE, b"1") == b"1"

    @pytest.mark.parametrize(
        "body", [b"", EMPTY_MESSAGE * 2, EMPTY_MESSAGE + b"more", b"\0\0\0\0\x05ab", b"\x01\0\0\0\0", b"\xff" * 5]
    )
    def test_with_an_odd_body(self, server: Frontend, channel: grpc.Channel, body: bytes) -> None:
        raw_http2.call(server.port, body=body)
        assert ask(channel, LIVE, b"1") == b"1"

    def test_compressed_ones_count_with_their_size(self, channel: grpc.Channel, kind: str) -> None:
        for method in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            if (kind, method) == ("native", grpc.Compression.Deflate):
                expected = grpc.StatusCode.UNIMPLEMENTED  # pygrpc-native has gzip only: docs/serving-security.md
            else:
                assert ask(channel, LIVE, b"abc", compression=method) == b"abc"
                expected = grpc.StatusCode.RESOURCE_EXHAUSTED
            error = refusal(functools.partial(ask, channel, LIVE, b"x" * 4 * LIMIT, compression=method))
            assert error.code() is expected


class TestCancellation:
    def test_an_expired_deadline_cancels(self, channel: grpc.Channel, services: FakeServices) -> None:
        error = refusal(lambda: unary(channel)(b"hold", timeout=0.2))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # On a busy machine the deadline may pass before the message arrives.
        with contextlib.suppress(queue.Empty):
            assert services.inference.held.get(timeout=1).is_cancelled.wait(WAIT_S)

    def test_a_late_response_to_a_cancelled_call_is_ignored(
        self, channel: grpc.Channel, services: FakeServices
    ) -> None:
        goes = unary(channel).future(b"hold-1")
        stays = unary(channel).future(b"hold-2", timeout=WAIT_S)
        one, two = sorted([held(services), held(services)], key=lambda held: held.payload)
        goes.cancel()
        assert one.is_cancelled.wait(WAIT_S)
        one.sink.succeed(b"late")
        assert not two.is_cancelled.is_set()
        two.sink.succeed(b"in time")
        assert stays.result() == b"in time"

    def test_a_closed_channel_cancels(self, server: Frontend, services: FakeServices) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = unary(channel).future(b"hold")
            one = held(services)
        assert call.code() is grpc.StatusCode.CANCELLED
        assert one.is_cancelled.wait(WAIT_S)

    def test_a_finished_call_is_not_cancelled(self, channel: grpc.Channel, services: FakeServices) -> None:
        call = unary(channel).future(b"hold", timeout=WAIT_S)
        one = held(services)
        one.sink.succeed(b"done")
        assert call.result() == b"done"
        ask(channel, LIVE)
        assert not one.is_cancelled.is_set()

    def test_many_clients_some_of_which_cancel(self, channel: grpc.Channel, services: FakeServices) -> None:
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
        while not services.inference.held.empty():
            assert services.inference.held.get().is_cancelled.wait(WAIT_S)


class TestChanges:
    """Calls that load or unload models."""

    def test_are_limited_and_do_not_block_others(self, channel: grpc.Channel, services: FakeServices) -> None:
        loads = [unary(channel, LOAD).future(b"%d" % number, timeout=WAIT_S) for number in range(MAX_BLOCKING + 1)]
        done: queue.Queue[grpc.Call] = queue.Queue()
        for load in loads:
            load.add_done_callback(done.put)
        first = done.get(timeout=WAIT_S)
        assert first.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "16 models are being loaded or unloaded already" in first.details()
        assert ask(channel, LIVE, b"still here") == b"still here"
        services.admin.gate.set()
        assert len([load for load in loads if load.code() is grpc.StatusCode.OK]) == MAX_BLOCKING
        assert refused(services) == {("RepositoryModelLoad", "RESOURCE_EXHAUSTED"): 1}

    def test_whose_callers_have_gone_are_not_made(self, channel: grpc.Channel, services: FakeServices) -> None:
        load = unary(channel, LOAD)
        cancelled, late, stays = load.future(b"1"), load.future(b"2", timeout=0.5), load.future(b"3", timeout=WAIT_S)
        callers = [services.admin.callers.get(timeout=WAIT_S) for _ in range(3)]
        assert not any(caller.is_cancelled() for caller in callers)
        cancelled.cancel()
        assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(lambda: [caller.is_cancelled() for caller in callers].count(True) == 2)
        services.admin.gate.set()
        assert stays.result() == b"3"
        assert services.admin.loaded == [b"3"]

    def test_that_crash_are_answered(
        self, channel: grpc.Channel, services: FakeServices, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        services.admin.gate.set()
        monkeypatch.setattr(services.admin, "loaded", None)
        error = refusal(lambda: ask(channel, LOAD, b"1"))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "its log says why" in error.details()


class TestHealth:
    def test_check(self, channel: grpc.Channel, services: FakeServices) -> None:
        services.admin.health.update(True, {"mnist": False})
        for name, state in (("", SERVING), ("mnist", NOT_SERVING), ("liveness", SERVING)):
            request = health_pb2.HealthCheckRequest(service=name).SerializeToString()
            response = health_pb2.HealthCheckResponse.FromString(ask(channel, HEALTH_CHECK, request))
            assert response.status == state

    def test_watch_sends_the_state_and_its_changes(self, channel: grpc.Channel, services: FakeServices) -> None:
        states = watch(channel, "mnist")
        assert next(states).status == SERVICE_UNKNOWN
        services.admin.health.update(True, {"mnist": True})
        assert next(states).status == SERVING
        services.admin.health.drain()
        assert next(states).status == NOT_SERVING
        states.cancel()

    def test_a_cancelled_watch_is_unsubscribed(self, channel: grpc.Channel, services: FakeServices) -> None:
        states = watch(channel, "mnist")
        next(states)
        assert list(services.admin.health._listeners) == ["mnist"]
        states.cancel()
        wait_until(lambda: services.admin.health._listeners == {})

    def test_the_number_of_watches_is_limited(
        self, serve: Serve, services: FakeServices, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits, "MAX_WATCHES", 2)
        with grpc.insecure_channel(f"127.0.0.1:{serve().port}") as channel:
            one, two = watch(channel, "mnist"), watch(channel, "")
            assert [next(states).status for states in (one, two)] == [SERVICE_UNKNOWN, NOT_SERVING]
            error = refusal(lambda: next(watch(channel, "")))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.details() == "this server serves at most 2 Watch calls at a time"
            one.cancel()
            wait_until(lambda: list(services.admin.health._listeners) == [""])
            three = watch(channel, "mnist")
            assert next(three).status == SERVICE_UNKNOWN
            for states in (two, three):
                states.cancel()

    def test_the_number_of_watches_of_one_host_is_limited(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "MAX_WATCHES_PER_HOST", 1)
        target = f"127.0.0.1:{serve().port}"
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(target, options) as one, grpc.insecure_channel(target) as two:
            states = watch(one, "")
            assert next(states).status == NOT_SERVING
            error = refusal(lambda: next(watch(two, "")))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.details() == "this server serves at most 1 Watch calls of one host"
            states.cancel()

    def test_watches_and_reflection_leave_room_for_inference(
        self, serve: Serve, services: FakeServices, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("MAX_STREAMS", "MAX_WATCHES", "MAX_REFLECTIONS"):
            monkeypatch.setattr(limits, name, 1)
        with grpc.insecure_channel(f"127.0.0.1:{serve().port}") as channel:
            states, tool = watch(channel, ""), reflection(channel)
            assert next(states).status == NOT_SERVING
            next(tool)
            stream = Stream(channel)
            stream.send(b"")
            assert stream.next() == response("")
            for one_more in (watch(channel, ""), reflection(channel), Stream(channel).call):
                error = refusal(functools.partial(next, one_more))
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "at most 1 " in error.details()
            names = ("Watch", "ServerReflectionInfo", "ModelStreamInfer")
            assert refused(services) == {(name, "RESOURCE_EXHAUSTED"): 1 for name in names}
            stream.close()
            states.cancel()
            tool.cancel()

    @pytest.mark.parametrize("kind", ["grpcio", "grpcio-threads"])  # native ends the call of a client that is behind
    def test_a_slow_client_gets_the_newest_state(self, channel: grpc.Channel, services: FakeServices) -> None:
        states = watch(channel, "mnist")
        assert next(states).status == SERVICE_UNKNOWN
        for number in range(1000):
            services.admin.health.update(True, {"mnist": number % 2 == 0})
        services.admin.health.update(True, {})
        assert next(state for state in states if state.status == SERVICE_UNKNOWN)
        states.cancel()

    @pytest.mark.parametrize(
        "message", [b"\xff\xff", health_pb2.HealthCheckRequest(service="x" * 5000).SerializeToString()]
    )
    def test_malformed_and_long_messages_are_refused(
        self, channel: grpc.Channel, services: FakeServices, message: bytes
    ) -> None:
        call = channel.unary_stream(HEALTH_WATCH)(message, timeout=WAIT_S)
        assert refusal(lambda: next(call)).code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refused(services) == {("Watch", "INVALID_ARGUMENT"): 1}


class TestToken:
    @pytest.fixture
    def token_file(self, tmp_path: Path) -> Path:
        path = tmp_path / "token"
        path.write_text("secret-1")
        path.chmod(0o600)
        return path

    @pytest.fixture
    def channel(self, serve: Serve, token_file: Path) -> Iterator[grpc.Channel]:
        with grpc.insecure_channel(f"127.0.0.1:{serve(tokens=TokenFile(token_file, SCOPES)).port}") as channel:
            yield channel

    @pytest.mark.parametrize("path", [INFER, LIVE])
    def test_calls_need_it(self, channel: grpc.Channel, path: str) -> None:
        assert ask(channel, path, b"1", **bearer("secret-1")) == b"1"
        for options in ({}, bearer("secret-2"), {"metadata": (("authorization-bin", b"Bearer secret-1"),)}):
            error = refusal(functools.partial(ask, channel, path, b"1", **options))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "authorization: Bearer TOKEN" in error.details()

    def test_can_change_while_the_server_runs(self, channel: grpc.Channel, token_file: Path) -> None:
        assert ask(channel, INFER, b"1", **bearer("secret-1")) == b"1"
        token_file.with_name("new").write_text("secret-2")
        token_file.with_name("new").replace(token_file)
        assert ask(channel, INFER, b"1", **bearer("secret-2")) == b"1"
        error = refusal(lambda: ask(channel, INFER, b"1", **bearer("secret-1")))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED

    def test_streams_reflection_and_unknown_rpcs_need_it(self, channel: grpc.Channel) -> None:
        for path in (STREAM_INFER, REFLECTION[0], "/no.Such/Rpc"):
            call = channel.stream_stream(path)(iter([b""]), timeout=WAIT_S)
            error = refusal(functools.partial(next, call))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED

    def test_open_streams_end_when_it_is_revoked(
        self, channel: grpc.Channel, token_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(auth, "LOOK_EVERY_S", 0.05)
        token_file.write_text("secret-1 name=a scopes=infer\nsecret-2 name=a scopes=infer\n")
        revoked, kept = (Stream(channel, **bearer(token)) for token in ("secret-1", "secret-2"))
        described = reflection(channel, **bearer("secret-1"))
        for stream in (revoked, kept):
            stream.send(b"1")
            next(stream.call)
        next(described)
        token_file.write_text("secret-2 name=a scopes=infer\n")
        error = refusal(functools.partial(next, revoked.call))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "the token of this call is no longer valid",
        )
        assert refusal(functools.partial(next, described)).code() is grpc.StatusCode.CANCELLED
        kept.send(b"1")
        next(kept.call)
        for stream in (revoked, kept):
            stream.close()

    def test_refused_calls_are_counted_by_method(
        self, channel: grpc.Channel, services: FakeServices, token_file: Path
    ) -> None:
        token_file.write_text("reader name=a scopes=admin\nslow name=b scopes=infer,admin requests_per_second=0.01\n")
        for path in (LIVE, LOAD, STREAM_INFER, REFLECTION[1], "/no.Such/Rpc"):
            call = channel.stream_stream(path)(iter([b""]), timeout=WAIT_S)
            refusal(functools.partial(next, call))
        call = channel.stream_stream("/no.Such/Rpc")(iter([b""]), timeout=WAIT_S, **bearer("reader"))
        refusal(functools.partial(next, call))
        refusal(functools.partial(ask, channel, INFER, b"", **bearer("reader")))
        ask(channel, LIVE, b"", **bearer("slow"))
        for path in (LIVE, LOAD):
            refusal(functools.partial(ask, channel, path, b"", **bearer("slow")))
        assert refused(services) == {
            ("ServerLive", "UNAUTHENTICATED"): 1,
            ("RepositoryModelLoad", "UNAUTHENTICATED"): 1,
            ("ModelStreamInfer", "UNAUTHENTICATED"): 1,
            ("ServerReflectionInfo", "UNAUTHENTICATED"): 1,
            ("unknown", "UNAUTHENTICATED"): 1,
            ("unknown", "UNIMPLEMENTED"): 1,
            ("ModelInfer", "PERMISSION_DENIED"): 1,
            ("ServerLive", "RESOURCE_EXHAUSTED"): 1,
            ("RepositoryModelLoad", "RESOURCE_EXHAUSTED"): 1,
        }
        reasons = {reason: count for (reason, _), count in services.inference.refusals.snapshot().items()}
        assert reasons == {"unauthenticated": 5, "unimplemented": 1, "permission_denied": 1, "resource_exhausted": 2}

    def test_health_does_not_need_it(self, channel: grpc.Channel) -> None:
        assert health_pb2.HealthCheckResponse.FromString(ask(channel, HEALTH_CHECK)).status == NOT_SERVING
        states = watch(channel, "")
        assert next(states).status == NOT_SERVING
        states.cancel()


def test_a_client_that_vanished_is_disconnected(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not respond to pings, such as a host that lost power."""
    monkeypatch.setattr(limits, "KEEPALIVE_S", 1)
    monkeypatch.setattr(limits, "KEEPALIVE_TIMEOUT_S", 1)
    with socket.create_connection(("127.0.0.1", serve().port), timeout=WAIT_S) as connection:
        settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        while connection.recv(1000):
            pass


class TestAddress:
    def start(self, make: Make, address: str) -> str:
        """Returns the error of a server that cannot listen there."""
        server = make(address=address)
        with pytest.raises(StartupError) as caught:
            server.start()
        server.stop(0)
        return str(caught.value)

    def test_a_port_in_use_is_one_line(self, make: Make, serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
        address = f"127.0.0.1:{serve().port}"
        assert self.start(make, address) == f"cannot listen on {address}: address already in use"
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
    def test_an_unusable_address_is_one_line(
        self, make: Make, address: str, complaint: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        line = self.start(make, address)
        assert line.startswith(f"cannot listen on {address}: ")
        assert complaint in line
        assert capfd.readouterr().err == ""

    def test_a_port_is_free_when_its_connections_have_just_ended(self, serve: Serve) -> None:
        first = serve()
        with grpc.insecure_channel(f"127.0.0.1:{first.port}") as channel:
            ask(channel, LIVE)
            first.stop(0)
        assert serve(address=f"127.0.0.1:{first.port}").port == first.port

    def test_a_unix_socket(self, serve: Serve, make: Make, tmp_path: Path) -> None:
        address = f"unix:{tmp_path / 'socket'}"
        assert serve(address=address).port == 0
        with grpc.insecure_channel(address) as channel:
            assert ask(channel, INFER, b"abc") == b"ABC"
        assert "address already in use" in self.start(make, address)

    def test_a_unix_socket_left_behind_is_replaced(self, serve: Serve, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        serve(address=f"unix:{path}")
        with grpc.insecure_channel(f"unix:{path}") as channel:
            assert ask(channel, INFER, b"abc") == b"ABC"

    def test_a_file_is_not_replaced(self, make: Make, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        assert "is not a socket" in self.start(make, f"unix:{tmp_path / 'file'}")
        assert (tmp_path / "file").read_text() == "mine"


class TestStop:
    def test_calls_in_flight_finish_and_new_ones_are_refused(
        self, server: Frontend, channel: grpc.Channel, services: FakeServices
    ) -> None:
        call = unary(channel).future(b"hold", timeout=WAIT_S)
        stream = Stream(channel)
        stream.send(b"hold")
        one, two = held(services), held(services)
        stopping = threading.Thread(target=server.stop, args=(WAIT_S,))
        stopping.start()
        wait_until(lambda: is_refused(server))
        one.sink.succeed(response("unhurt"))
        two.sink.succeed(response("unhurt"))
        assert call.result() == response("unhurt")
        assert stream.next() == response("unhurt")
        error = refusal(stream.next)
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        stopping.join(WAIT_S)
        assert not stopping.is_alive()
        stream.close()

    def test_calls_that_exceed_the_grace_period_are_cancelled(
        self, server: Frontend, channel: grpc.Channel, services: FakeServices
    ) -> None:
        call = unary(channel).future(b"hold", timeout=WAIT_S)
        one = held(services)
        server.stop(0.05)
        assert one.is_cancelled.wait(WAIT_S)
        assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        one.sink.succeed(b"too late for anyone")

    def test_open_streams_do_not_delay_it(self, server: Frontend, channel: grpc.Channel) -> None:
        states = watch(channel, "")
        next(states)
        idle = Stream(channel)
        idle.send(b"NotFound")
        idle.next()
        tool = reflection(channel)
        next(tool)
        began = time.monotonic()
        server.stop(2 * WAIT_S)
        assert time.monotonic() - began < WAIT_S
        assert refusal(lambda: next(states)).code() is grpc.StatusCode.UNAVAILABLE
        assert refusal(idle.next).code() is grpc.StatusCode.UNAVAILABLE
        assert refusal(lambda: next(tool)).code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        idle.close()

    @pytest.mark.parametrize("kind", ["native", "grpcio"])  # with threads, calls wait for the grace period
    def test_silent_clients_do_not_delay_it(
        self, server: Frontend, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A connection without a byte, one without a call, and calls without a message."""
        monkeypatch.setattr(frontend, "MESSAGE_GRACE_S", 0.1)
        with socket.create_connection(("127.0.0.1", server.port)), silent_calls(channel, INFER, HEALTH_WATCH) as calls:
            began = time.monotonic()
            server.stop(2 * WAIT_S)
            assert time.monotonic() - began < WAIT_S
            for call in calls:
                assert refusal(functools.partial(next, call)).code() is grpc.StatusCode.UNAVAILABLE

    def test_a_server_that_never_started_stops(self, make: Make) -> None:
        make().stop(WAIT_S)


class TestAccessLog:
    @pytest.fixture
    def server(self, serve: Serve) -> Frontend:
        return serve(access_log=True)

    @pytest.mark.parametrize("path", [INFER, LIVE])
    def test_has_an_entry_for_each_rpc(
        self, channel: grpc.Channel, log_entries: Callable[[int], list[tuple[str, str]]], path: str
    ) -> None:
        ask(channel, path, b"1")
        assert log_entries(1) == [(path, "OK")]
        refusal(lambda: ask(channel, path, b"NotFound"))
        assert log_entries(2)[1:] == [(path, "NOT_FOUND")]

    def test_contains_cancelled_calls(
        self, channel: grpc.Channel, services: FakeServices, log_entries: Callable[[int], list[tuple[str, str]]]
    ) -> None:
        call = unary(channel).future(b"hold")
        one = held(services)
        call.cancel()
        assert log_entries(1) == [(INFER, "CANCELLED")]
        one.sink.succeed(b"too late for a second entry")
        states = watch(channel, "")
        next(states)
        states.cancel()
        assert log_entries(2)[1:] == [(HEALTH_WATCH, "CANCELLED")]

    def test_contains_calls_that_stopping_cut_off(
        self,
        server: Frontend,
        channel: grpc.Channel,
        services: FakeServices,
        log_entries: Callable[[int], list[tuple[str, str]]],
    ) -> None:
        call = unary(channel).future(b"hold")
        one = held(services)
        states = watch(channel, "")
        next(states)
        server.stop(0.05)
        one.sink.succeed(b"too late for a second entry")
        assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        (first, *_), (second, status) = sorted(log_entries(2), reverse=True)
        assert (first, second, status) == (INFER, HEALTH_WATCH, "UNAVAILABLE")

    def test_contains_calls_past_their_deadline(
        self, channel: grpc.Channel, log_entries: Callable[[int], list[tuple[str, str]]]
    ) -> None:
        refusal(lambda: unary(channel)(b"hold", timeout=0.2))
        # At its deadline the client cancels too: which one the server sees first depends on the request's transit time.
        assert log_entries(1) in ([(INFER, "DEADLINE_EXCEEDED")], [(INFER, "CANCELLED")])
        assert code_without_response(time.monotonic()) == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert code_without_response(time.monotonic() + WAIT_S) == grpc.StatusCode.CANCELLED.value[0]
        assert code_without_response(None) == grpc.StatusCode.CANCELLED.value[0]
