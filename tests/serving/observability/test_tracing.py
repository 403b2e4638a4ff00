"""Traces of inferences through every front end, as a collector receives them."""

import http.server
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import grpc
import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from PIL import Image

from convoy.preprocessing import Preprocessing
from protos.grpc_service_pb2 import ModelInferRequest
from serving.errors import StartupError
from serving.frontends.common.services import Services
from serving.frontends.grpcio import GrpcioFrontend
from serving.frontends.http import HttpFrontend, HttpSettings
from serving.frontends.native import NativeFrontend
from serving.inference.request import InferInput, InferRequest, RequestContext
from serving.inference.service import InferenceService
from serving.models.images import ImageTensor
from serving.models.repository import Repository
from serving.observability import tracing
from serving.observability.calls import Calls
from serving.observability.health import Health
from serving.observability.tracing import Tracing, connect
from serving.protocol.admin import AdminService
from serving.protocol.methods import INFER, STREAM_INFER
from serving.protocol.tensors import DATATYPES, Elements
from tests.serving.fake_repository import PATIENCE_S, FakeRepository, backend_of, make_model, tensor, twice
from tests.serving.inference.test_plan_cache import Response

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
LIMIT = 1 << 20

Send = Callable[[dict[str, str]], None]


class Collector(http.server.ThreadingHTTPServer):
    """An OTLP collector that keeps the spans it receives."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []
        self.paths: set[str] = set()
        self.services: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        collector = cast(Collector, self.server)
        message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        collector.paths.add(self.path)
        for of_resource in message.resource_spans:
            names = {item.key: item.value.string_value for item in of_resource.resource.attributes}
            collector.services.add(names["service.name"])
            for of_scope in of_resource.scope_spans:
                collector.spans.extend(of_scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, args=(0.01,), daemon=True).start()
        yield collector
        collector.shutdown()


@pytest.fixture
def repository() -> Iterator[FakeRepository]:
    repository = FakeRepository(twice())
    yield repository
    repository.close()


@pytest.fixture
def traced(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Tracing:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")  # spans are sent by `close`
    return connect(collector.url, 0)


@pytest.fixture
def finish(repository: FakeRepository, traced: Tracing) -> Callable[[], None]:
    """Waits until all spans have been sent: those of a batch are made after its responses."""

    def finish() -> None:
        repository.close()
        traced.close()

    return finish


@pytest.fixture
def services(repository: FakeRepository, traced: Tracing) -> Services:
    found = cast(Repository, repository)
    return Services(InferenceService(found, traced), AdminService(found, Health(), calls=Calls(), version="1"))


def message(rows: int = 1) -> bytes:
    array = np.ones((rows, 3), np.float32)
    request = ModelInferRequest(model_name="twice", raw_input_contents=[array.tobytes()])
    request.inputs.add(name="numbers", datatype="FP32", shape=array.shape)
    encoded: bytes = request.SerializeToString()
    return encoded


@pytest.fixture(params=["native", "grpcio", "stream", "http", "http, repeated"])
def send(request: pytest.FixtureRequest, services: Services) -> Iterator[Send]:
    """Sends an inference with some headers through a front end."""
    if request.param.startswith("http"):
        frontend = HttpFrontend(
            services, HttpSettings(host="127.0.0.1", port=0, metrics_port=0), max_message_bytes=LIMIT
        )
        frontend.start()
        tensor = {"name": "numbers", "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": 12}}
        body = json.dumps({"inputs": [tensor]}).encode()
        length = {"Inference-Header-Content-Length": str(len(body))}
        url = f"http://127.0.0.1:{frontend.port}/v2/models/twice/infer"
        with httpx.Client() as client:

            def post(headers: dict[str, str]) -> None:
                response = client.post(url, content=body + bytes(12), headers=headers | length)
                assert response.status_code == 200

            if request.param != "http":
                for _ in range(2):
                    post({})
            yield post
    else:
        kind = NativeFrontend if request.param == "native" else GrpcioFrontend
        frontend = kind(services, address="127.0.0.1:0", max_message_bytes=LIMIT)
        frontend.start()
        with grpc.insecure_channel(f"127.0.0.1:{frontend.port}") as channel:
            if request.param == "stream":
                stream = channel.stream_stream(STREAM_INFER)
                yield lambda headers: list(stream(iter([message()]), metadata=list(headers.items()))) and None
            else:
                unary = channel.unary_unary(INFER)
                yield lambda headers: unary(message(), metadata=list(headers.items())) and None
    frontend.stop(5)


def by_name(collector: Collector) -> dict[str, Any]:
    found = {span.name: span for span in collector.spans}
    assert len(found) == len(collector.spans)
    return found


def test_a_sampled_request_has_its_spans(collector: Collector, finish: Callable[[], None], send: Send) -> None:
    before = time.time_ns()
    send({"traceparent": SAMPLED, "tracestate": "vendor=x"})
    after = time.time_ns()
    finish()
    assert collector.paths == {"/v1/traces"}
    assert collector.services == {"convoy"}
    spans = by_name(collector)
    [request] = [span for name, span in spans.items() if name in ("ModelInfer", "POST infer")]
    assert set(spans) - {request.name} == {"queue", "batch", "compute"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert {span.trace_state for span in spans.values()} == {"vendor=x"}
    parents = {name: span.parent_span_id for name, span in spans.items()}
    assert parents[request.name].hex() == PARENT
    assert parents["queue"] == parents["batch"] == request.span_id
    assert parents["compute"] == spans["batch"].span_id
    assert [link.span_id for link in spans["batch"].links] == [request.span_id]
    assert [link.span_id for link in spans["queue"].links] == [spans["batch"].span_id]
    for span in spans.values():
        assert before <= span.start_time_unix_nano <= span.end_time_unix_nano <= after
    assert spans["queue"].end_time_unix_nano == spans["batch"].start_time_unix_nano
    attributes = {item.key: item.value.string_value for item in request.attributes}
    assert attributes == {"convoy.model": "twice", "convoy.version": "1"}


@pytest.mark.parametrize("headers", [{}, {"traceparent": SAMPLED[:-1] + "0"}, {"traceparent": "nonsense"}])
def test_other_requests_have_none(
    collector: Collector, finish: Callable[[], None], send: Send, headers: dict[str, str]
) -> None:
    send(headers)
    finish()
    assert collector.spans == []


def test_a_share_of_the_others(
    collector: Collector, traced: Tracing, finish: Callable[[], None], send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traced, "_sample", 1.0)
    send({})
    finish()
    spans = by_name(collector)
    assert len(spans) == 4
    assert len({span.trace_id for span in spans.values()}) == 1
    assert spans.keys() >= {"queue", "batch", "compute"}


def test_open_metrics_have_exemplars(
    finish: Callable[[], None], services: Services, repository: FakeRepository
) -> None:
    frontend = HttpFrontend(services, HttpSettings(host="127.0.0.1", port=0, metrics_port=0), max_message_bytes=LIMIT)
    frontend.start()
    tensor = {"name": "numbers", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
    url = f"http://127.0.0.1:{frontend.port}/v2/models/twice/infer"
    assert httpx.post(url, json={"inputs": [tensor]}, headers={"traceparent": SAMPLED}).status_code == 200
    while not repository.get("twice").statistics.snapshot().exemplars:
        time.sleep(0.001)
    metrics = f"http://127.0.0.1:{frontend.metrics_port}/metrics"
    text = httpx.get(metrics, headers={"accept": "application/openmetrics-text; version=1.0.0"}).text
    [line] = [line for line in text.splitlines() if TRACE in line]
    assert line.startswith('convoy_request_duration_seconds_bucket{le="')
    assert f'# {{trace_id="{TRACE}"}} ' in line
    assert TRACE not in httpx.get(metrics).text
    frontend.stop(5)
    finish()


def test_a_batch_links_to_its_requests(
    collector: Collector, finish: Callable[[], None], services: Services, repository: FakeRepository
) -> None:
    backend = backend_of(repository.get("twice"))
    frontend = GrpcioFrontend(services, address="127.0.0.1:0", max_message_bytes=LIMIT)
    frontend.start()
    with grpc.insecure_channel(f"127.0.0.1:{frontend.port}") as channel:
        unary = channel.unary_unary(INFER)
        backend.free.clear()
        calls = [unary.future(message())]
        assert backend.began.acquire(timeout=PATIENCE_S)
        traces = [f"{number:032x}" for number in (1, 2, 3)]
        for trace in traces:
            calls.append(unary.future(message(), metadata=[("traceparent", f"00-{trace}-{PARENT}-01")]))
        calls.append(unary.future(message()))
        while repository.get("twice").batcher.num_queued < 4:
            time.sleep(0.001)
        backend.free.set()
        for call in calls:
            call.result(PATIENCE_S)
    frontend.stop(5)
    finish()
    [batch] = [span for span in collector.spans if span.name == "batch"]
    assert sorted(link.trace_id.hex() for link in batch.links) == traces
    facts = {item.key: item.value.int_value or item.value.string_value for item in batch.attributes}
    assert facts == {
        "convoy.model": "twice",
        "convoy.batch.rows": 4,
        "convoy.batch.requests": 4,
        "convoy.batch.closed": "idle",
    }
    queued = [span for span in collector.spans if span.name == "queue"]
    assert sorted(span.trace_id.hex() for span in queued) == traces
    assert {span.links[0].span_id for span in queued} == {batch.span_id}


def test_decoding_has_a_span_before_the_queue(
    collector: Collector,
    traced: Tracing,
    finish: Callable[[], None],
    repository: FakeRepository,
    services: Services,
) -> None:
    tensors = [tensor("images", "UINT8", -1, 3, 4, 4)], [tensor("sum", "FP32", -1, 1)]
    model = make_model("images", lambda x: [x.reshape(len(x), -1).sum(axis=1, keepdims=True, dtype="f4")], tensors)
    repository.replace(replace(model, images=ImageTensor("images", (3, 4, 4), 8, Preprocessing())))
    content, response = io.BytesIO(), Response()
    Image.new("RGB", (400, 400)).save(content, "PNG")
    files = Elements(DATATYPES["BYTES"], [content.getvalue()])
    request = InferRequest("images", [InferInput("images", "BYTES", (1,), files)])
    context = RequestContext(trace=traced.begin("x", {"traceparent": SAMPLED}))
    services.inference.submit(request, context, cast(Any, response))
    response.result(PATIENCE_S)
    finish()
    spans = by_name(collector)
    assert spans.keys() == {"x", "decode", "queue", "batch", "compute"}
    assert spans["decode"].parent_span_id == spans["x"].span_id
    times = [
        time
        for name in ("decode", "queue")
        for time in (spans[name].start_time_unix_nano, spans[name].end_time_unix_nano)
    ]
    assert times == sorted(times)
    assert times[1] > times[0]
    assert spans["x"].start_time_unix_nano <= times[0]


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_errors_are_in_the_span(
    collector: Collector, finish: Callable[[], None], services: Services, kind: str
) -> None:
    if kind == "grpc":
        frontend: Any = GrpcioFrontend(services, address="127.0.0.1:0", max_message_bytes=LIMIT)
        frontend.start()
        with grpc.insecure_channel(f"127.0.0.1:{frontend.port}") as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary(INFER)(message(rows=9), metadata=[("traceparent", SAMPLED)])
    else:
        frontend = HttpFrontend(
            services, HttpSettings(host="127.0.0.1", port=0, metrics_port=0), max_message_bytes=LIMIT
        )
        frontend.start()
        url = f"http://127.0.0.1:{frontend.port}/v2/models/twice/infer"
        assert httpx.post(url, content=b"{}", headers={"traceparent": SAMPLED}).status_code == 400
    frontend.stop(5)
    finish()
    [span] = collector.spans
    assert (span.status.code, bool(span.status.message)) == (2, True)
    attributes = {item.key: item.value.string_value for item in span.attributes}
    assert attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"


def test_a_collector_that_does_not_answer_does_not_delay_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "CLOSE_S", 0.1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # seconds, after which it gives up
    traced = connect("http://127.0.0.1:9", 1)
    trace = traced.begin("x", {})
    assert trace is not None
    trace.end()
    began = time.monotonic()
    traced.close()
    assert time.monotonic() - began < PATIENCE_S / 3
    for thread in threading.enumerate():
        if thread.name == "tracing-close":  # would draw random numbers for its pauses beside the next tests
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def test_a_missing_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartupError, match=r"^--trace-endpoint needs OpenTelemetry: pip install "):
        connect("http://127.0.0.1:4318", 1)
