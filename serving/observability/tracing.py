"""Traces of inferences, sent to an OpenTelemetry collector. Imports OpenTelemetry only when tracing is on.

A traced request has a span from its arrival to its response, one for decoding its image files, and one for its time in
the queue. A batch has a span, and the model's run has one inside it. It belongs to the trace of its first traced
request and links to all of them, and their queue spans link to it. A request that comes with a W3C `traceparent`
follows its sampled flag (https://www.w3.org/TR/trace-context/); of all others, a share is traced.
"""

import logging
import random
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from convoy.extras import how_to_install
from serving.errors import ServingError, StartupError
from serving.protocol.status import status_name

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

PATH = "/v1/traces"
"""Of an OTLP collector (https://opentelemetry.io/docs/specs/otlp/)."""
CLOSE_S = 2.0
"""How long a stopping server waits for the collector."""

_HEADERS = ("traceparent", "tracestate")
_SAMPLED = 1


class Tracing:
    """Begins the traces of requests. Thread-safe.

    Args:
        sample: share of the requests without `traceparent` that are traced.
        processor: receives the spans that have ended.
    """

    def __init__(self, sample: float, processor: "SpanProcessor") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._sample = sample
        resource = Resource.create()
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):  # no variable names it
            resource = resource.merge(Resource({"service.name": "convoy"}))
        self._provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("convoy.serving")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, headers: Mapping[str, str]) -> "RequestTrace | None":
        """Begins the trace of a request.

        Args:
            name: of its span.
            headers: `traceparent` and `tracestate`, where the request has them.

        Returns:
            None if the request is not traced.
        """
        context: Context | None = None
        parent = headers.get("traceparent")
        if parent is not None:
            if not _is_sampled(parent):
                return None
            context = self._propagator.extract(headers)
        if not context and random.random() >= self._sample:  # no parent, or a malformed one
            return None
        from opentelemetry.trace import SpanKind

        return RequestTrace(self._tracer, self._tracer.start_span(name, context, SpanKind.SERVER))

    def begin_call(self, metadata: Iterable[Any]) -> "RequestTrace | None":
        """Begins the trace of a ModelInfer call, by its gRPC metadata."""
        return self.begin("ModelInfer", {item[0]: item[1] for item in metadata if item[0] in _HEADERS})

    def begin_http(self, headers: Mapping[bytes, bytes]) -> "RequestTrace | None":
        """Begins the trace of an inference over HTTP, by its headers."""
        names = [name for name in _HEADERS if name.encode() in headers]
        return self.begin("POST infer", {name: headers[name.encode()].decode("latin-1") for name in names})

    def close(self) -> None:
        """Sends the spans that wait, if the collector takes them within a moment."""
        closer = threading.Thread(target=self._provider.shutdown, name="tracing-close", daemon=True)
        with suppress(RuntimeError):  # no thread is left for it
            closer.start()
            closer.join(CLOSE_S)


class RequestTrace:
    """The trace of one request. Used by one thread at a time."""

    __slots__ = ("_context", "_span", "_to_epoch", "_tracer")

    def __init__(self, tracer: Any, span: "Span") -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer = tracer
        self._span = span
        self._context: Context = set_span_in_context(span)
        self._to_epoch = time.time_ns() - time.monotonic_ns()  # measured once: else spans would overlap by nanoseconds

    @property
    def trace_id(self) -> str:
        """The trace's id, as tools show it."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def set_model(self, name: str, version: str) -> None:
        """Names the model version that runs the request."""
        self._span.set_attributes({"convoy.model": name, "convoy.version": version})

    def end(self, error: ServingError | None = None) -> None:
        """Ends the request's span. Further calls do nothing."""
        if error is not None and self._span.is_recording():
            from opentelemetry.trace import Status, StatusCode

            self._span.set_attribute("rpc.response.status_code", status_name(error))
            self._span.set_status(Status(StatusCode.ERROR, str(error)))
        if self._span.is_recording():
            self._span.end()

    def add_decoding(self, began_ns: int, ended_ns: int) -> None:
        """Adds the span of decoding the request's image files. Times are of `time.monotonic_ns`."""
        decode = self._tracer.start_span("decode", self._context, start_time=began_ns + self._to_epoch)
        decode.end(ended_ns + self._to_epoch)

    def add_batch(
        self, queued: "Sequence[tuple[RequestTrace, int]]", times_ns: tuple[int, int, int], facts: Mapping[str, Any]
    ) -> None:
        """Adds the spans of a batch, and of the queue of its traced requests. Call it on the first of them.

        Args:
            queued: the traces of all its traced requests, this one included, and when each was queued.
            times_ns: when the batch was closed, assembled and computed. As all times, of `time.monotonic_ns`.
            facts: attributes of the batch.
        """
        from opentelemetry.trace import Link, set_span_in_context

        closed, assembled, computed = (moment + self._to_epoch for moment in times_ns)
        links = [Link(trace._span.get_span_context()) for trace, _ in queued]
        batch = self._tracer.start_span("batch", self._context, links=links, attributes=facts, start_time=closed)
        compute = self._tracer.start_span("compute", set_span_in_context(batch), start_time=assembled)
        compute.end(computed)
        batch.end(computed)
        link = [Link(batch.get_span_context())]
        for trace, queued_ns in queued:
            start = queued_ns + trace._to_epoch
            queue = self._tracer.start_span("queue", trace._context, links=link, start_time=start)
            queue.end(times_ns[0] + trace._to_epoch)


def connect(endpoint: str, sample: float) -> Tracing:
    """Returns tracing that sends its spans to a collector, by OTLP over HTTP.

    OpenTelemetry's own environment variables set headers, certificates, time-outs, and the size of what waits.

    Args:
        endpoint: URL of the collector; without a path, that of OTLP's traces is added.

    Raises:
        StartupError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StartupError(f"--trace-endpoint needs OpenTelemetry: {how_to_install('tracing')}") from error
    url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + PATH
    return Tracing(sample, BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))


def _is_sampled(traceparent: str) -> bool:
    """Returns whether the flags of a traceparent say that its trace is recorded."""
    fields = traceparent.strip().split("-")
    try:
        return bool(int(fields[3], 16) & _SAMPLED)
    except (IndexError, ValueError):
        return True  # malformed: it counts as none
