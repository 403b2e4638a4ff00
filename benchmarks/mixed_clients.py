"""Clients of many kinds that check every answer: gRPC and HTTP, valid and invalid, cancelled and late."""

import collections
import http.client
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, str(Path(__file__).parent.parent))

from protos import grpc_service_pb2 as pb
from serving.protocol.methods import INFER, STREAM_INFER
from tests.serving.fuzzing.grpc_sender import check_response
from tests.serving.fuzzing.http_oracle import HttpExpected, expect_http
from tests.serving.fuzzing.http_sender import check_response as check_http_response
from tests.serving.fuzzing.messages import http_value
from tests.serving.fuzzing.oracle import expect_infer
from tests.serving.fuzzing.requests import Request, random_request, to_protobuf
from tests.serving.server_process import ServerProcess

NUM_REQUESTS = 200
"""Different requests of each kind; made once, so that the clients cost little."""

Outcome = str | None
"""What is wrong with an answer."""
HttpCall = tuple[str, dict[str, str], bytes, HttpExpected]
"""Path, headers and body of a request, and what is right for it."""


class Calls:
    """One kind of client: sends a request and checks the answer, at a given rate, on a thread of its own."""

    def __init__(self, name: str, call: Callable[[random.Random], Outcome]) -> None:
        self.name = name
        self._call = call
        self._rng = random.Random(name)
        self.num_calls = 0
        self.failures: collections.Counter[str] = collections.Counter()
        self.times_ms: collections.deque[float] = collections.deque(maxlen=20_000)

    def run(self, over: threading.Event, per_second: float | None) -> None:
        """Calls until `over` is set; without pause if there is no rate."""
        due = time.monotonic()
        while not over.is_set():
            if per_second is not None:
                due = max(due + 1 / per_second, time.monotonic() - 1)
                if over.wait(max(0.0, due - time.monotonic())):
                    return
            began = time.monotonic()
            try:
                problem = self._call(self._rng)
            except Exception as error:
                problem = repr(error)[:300]
            self.times_ms.append(1000 * (time.monotonic() - began))
            self.num_calls += 1
            if problem is not None:
                self.failures[problem[:300]] += 1


class Clients:
    """All kinds of clients of one server.

    Calls that end early have a connection of their own: the native transport ends connections with many such calls
    (docs/serving-security.md).

    Attributes:
        num_ended: calls on that connection that failed because it was ended.
    """

    def __init__(self, server: ServerProcess) -> None:
        own_connection = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(server.target(), own_connection)
        self._infer = self._channel.unary_unary(INFER)
        self._infer_briefly = grpc.insecure_channel(server.target(), own_connection).unary_unary(INFER)
        self.num_ended = 0
        self._port = server.http_port()
        rng = random.Random(0)
        requests = [random_request(rng) for _ in range(NUM_REQUESTS)]
        self._payloads = {
            typed: [to_protobuf(request, typed=typed).SerializeToString() for request in requests]
            for typed in (False, True)
        }
        self._expected = {payload: expect_infer(payload) for some in self._payloads.values() for payload in some}
        self._http = {style: self._http_messages(rng, requests, style) for style in ("json", "binary")}
        self._local = threading.local()
        self.kinds = [
            Calls("gRPC, raw", lambda rng: self.grpc(rng, typed=False)),
            Calls("gRPC, typed", lambda rng: self.grpc(rng, typed=True)),
            Calls("gRPC, one model of one form", lambda rng: self.same()),
            Calls("gRPC, with ids", self.with_id),
            Calls("gRPC, short deadlines", self.short_deadline),
            Calls("gRPC, cancelled", self.cancelled),
            Calls("gRPC, stream of 8", self.stream),
            Calls("gRPC, invalid", self.invalid),
            Calls("HTTP, JSON", lambda rng: self.http(rng, "json")),
            Calls("HTTP, binary", lambda rng: self.http(rng, "binary")),
        ]

    def grpc(self, rng: random.Random, *, typed: bool) -> Outcome:
        payload = rng.choice(self._payloads[typed])
        return self._check(payload, self._infer(payload, timeout=60))

    def same(self) -> Outcome:
        payload = self._payloads[False][0]
        return self._check(payload, self._infer(payload, timeout=60))

    def with_id(self, rng: random.Random) -> Outcome:
        message = pb.ModelInferRequest.FromString(rng.choice(self._payloads[False]))
        message.id = f"request {rng.random()}"
        response = pb.ModelInferResponse.FromString(self._infer(message.SerializeToString(), timeout=60))
        return None if response.id == message.id else f"the id is {response.id!r}"

    def short_deadline(self, rng: random.Random) -> Outcome:
        payload = rng.choice(self._payloads[False])
        try:
            return self._check(payload, self._infer_briefly(payload, timeout=rng.choice([0.0005, 0.001, 0.003])))
        except grpc.RpcError as error:
            is_right = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED or self._is_ended(error)
            return None if is_right else _describe(error)

    def cancelled(self, rng: random.Random) -> Outcome:
        call = self._infer_briefly.future(rng.choice(self._payloads[False]), timeout=60)
        time.sleep(rng.choice([0, 0.0005, 0.001]))
        call.cancel()
        code = call.code()
        is_right = code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.OK) or self._is_ended(call)
        return None if is_right else f"{code.name} after a cancellation"

    def _is_ended(self, call: Any) -> bool:
        """Says whether the server ended the connection; a call that was being sent then reports a broken pipe."""
        signs = ("too_many_resets", "Broken pipe")
        is_ended: bool = call.code() == grpc.StatusCode.UNAVAILABLE and any(sign in call.details() for sign in signs)
        self.num_ended += is_ended
        return is_ended

    def stream(self, rng: random.Random) -> Outcome:
        payloads = rng.choices(self._payloads[False], k=8)
        call = self._channel.stream_stream(STREAM_INFER, None, pb.ModelStreamInferResponse.FromString)
        responses = list(call(iter(payloads), timeout=60))
        if len(responses) != len(payloads):
            return f"{len(responses)} responses to {len(payloads)} requests"
        for payload, response in zip(payloads, responses, strict=True):
            problem = response.error_message or check_response(response.infer_response, self._expected[payload])
            if problem:
                return str(problem)
        return None

    def invalid(self, rng: random.Random) -> Outcome:
        payload = rng.choice(self._payloads[False])
        try:
            self._infer(rng.choice([payload[:-1], payload + b"\xff", b"\xff" + payload]), timeout=60)
        except grpc.RpcError as error:
            return None if error.code() == grpc.StatusCode.INVALID_ARGUMENT else _describe(error)
        return "an invalid request was answered"

    def http(self, rng: random.Random, style: str) -> Outcome:
        path, headers, body, expected = rng.choice(self._http[style])
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            content = response.read()
        except OSError:
            connection.close()
            raise
        if response.status != 200:
            return f"{response.status}: {content[:200]!r}"
        return check_http_response(expected, {k.lower(): v for k, v in response.getheaders()}, content)

    def _check(self, payload: bytes, response: bytes) -> Outcome:
        return check_response(pb.ModelInferResponse.FromString(response), self._expected[payload])

    def _http_messages(self, rng: random.Random, requests: list[Request], style: str) -> list[HttpCall]:
        messages = []
        for request in requests:
            value, tail = http_value(rng, request, style)
            text = json.dumps(value).encode()
            headers = {"Inference-Header-Content-Length": str(len(text))} if tail else {}
            version = f"/versions/{request.version}" if request.version else ""
            length = str(len(text)).encode() if tail else None
            expected = expect_http(request.model, request.version, text + tail, length)
            if expected.expected is not None and 0 in expected.expected.codes:
                path = f"/v2/models/{request.model}{version}/infer"
                messages.append((path, headers, text + tail, expected))
        return messages


def _describe(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}"


def run_clients(kinds: list[Calls], seconds: float, rates: dict[str, float] | None) -> float:
    """Runs all kinds of clients for some seconds. Returns the calls per second."""
    over = threading.Event()
    before = sum(kind.num_calls for kind in kinds)
    threads = [threading.Thread(target=kind.run, args=(over, rates and rates[kind.name])) for kind in kinds]
    for thread in threads:
        thread.start()
    over.wait(seconds)
    over.set()
    for thread in threads:
        thread.join()
    return (sum(kind.num_calls for kind in kinds) - before) / seconds
