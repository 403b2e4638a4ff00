"""ModelInfer, the one entry of all front ends: splits a message within a budget, and runs it in a pipeline.

gRPC front ends call `infer` with serialised messages, HTTP calls `infer_json` with bodies, and `submit` takes values.
Knows no front end; all other RPCs are in `serving.protocol.admin`.
"""

from serving.errors import ServingError
from serving.inference.decoder import ImageDecoder
from serving.inference.message_memory import UNCOUNTED_BYTES, MemoryShare, MessageMemory
from serving.inference.parser_pool import ParserPool
from serving.inference.pipeline import CountedRequest, CountedSink, Pipeline
from serving.inference.plan import ValueEncoder
from serving.inference.request import (
    InferRequest,
    InferResponse,
    RequestContext,
    RequestHandle,
    ResponseSink,
    TracedSink,
)
from serving.inference.shared_memory import SharedMemory
from serving.models.repository import Repository
from serving.observability.refusals import Refusals
from serving.observability.tracing import Tracing
from serving.protocol.grpc_codec import make_response_encoder, parse_request
from serving.protocol.json_infer import JsonEncoder, JsonRequest, JsonResponse
from serving.protocol.wire_format import SplitRequest

MAX_QUICK_BYTES = 64 << 10
"""Size of a header up to which `infer` parses it at once, on the thread that receives all calls."""


class InferenceService:
    """Inference over the models of a repository.

    Args:
        tracing: begins the traces of requests, for all front ends; None for no tracing.
        shared_memory: of clients; None to allow none.
        message_memory: counts large requests; the HTTP front end counts its own there. None for no bound.
    """

    def __init__(
        self,
        repository: Repository,
        tracing: Tracing | None = None,
        shared_memory: SharedMemory | None = None,
        message_memory: MessageMemory | None = None,
    ) -> None:
        self.repository = repository
        self.message_memory = message_memory or MessageMemory()
        self.refusals = Refusals()
        """Of requests that no batcher has counted, by all front ends."""
        self.tracing = tracing
        self.decoder = ImageDecoder()
        shared = (repository, self.refusals, self.decoder, shared_memory, self.message_memory)
        self._grpc: Pipeline[SplitRequest, bytes] = Pipeline(*shared, parse_request, make_response_encoder)
        self._json: Pipeline[JsonRequest, JsonResponse] = Pipeline(*shared, JsonRequest.parse, JsonEncoder)
        self._values: Pipeline[InferRequest, InferResponse] = Pipeline(
            *shared, lambda request: request, lambda plan, _: ValueEncoder(plan)
        )
        self._parsers = ParserPool()

    def infer(self, payload: bytes, context: RequestContext, sink: ResponseSink[bytes]) -> RequestHandle | None:
        """Runs a serialised ModelInferRequest. A serialised ModelInferResponse or the error goes to `sink`.

        Returns:
            The request in flight; None if `sink` has been called already.
        """
        if context.trace is not None:
            sink = TracedSink(sink, context.trace)
        run = self._infer if len(payload) <= UNCOUNTED_BYTES else self._infer_large
        return run(payload, context, sink)

    def _infer_large(self, payload: bytes, context: RequestContext, sink: ResponseSink[bytes]) -> RequestHandle | None:
        """Runs a message that takes a share of the message memory."""
        share = MemoryShare(self.message_memory)
        try:
            share.take(len(payload))
        except ServingError as error:
            self._refuse(error, sink)
            return None
        request = self._infer(payload, context, CountedSink(sink, share))
        return None if request is None else CountedRequest(request, share)

    def _infer(self, payload: bytes, context: RequestContext, sink: ResponseSink[bytes]) -> RequestHandle | None:
        try:
            split = SplitRequest(payload)
            if len(split.header) > MAX_QUICK_BYTES:
                return self._parsers.submit(
                    len(payload),
                    lambda: self._grpc.run(split, context, sink),
                    lambda error: self._refuse(error, sink),
                )
        except ServingError as error:
            self._refuse(error, sink)
            return None
        return self._grpc.run(split, context, sink)

    def _refuse(self, error: ServingError, sink: ResponseSink[bytes]) -> None:
        self.refusals.count_error(error)
        sink.fail(error)

    def infer_json(
        self, request: JsonRequest, context: RequestContext, sink: ResponseSink[JsonResponse]
    ) -> RequestHandle | None:
        """Runs the body of an HTTP request. Like `infer`."""
        if context.trace is not None:
            sink = TracedSink(sink, context.trace)
        return self._json.run(request, context, sink)

    def infer_json_if_cached(
        self, request: JsonRequest, context: RequestContext, sink: ResponseSink[JsonResponse]
    ) -> RequestHandle | None:
        """Runs the body of an HTTP request if one of the same form was run before, and nothing is wrong with this one.

        Returns:
            None if it has not been run, and `sink` will not be called.
        """
        if request.key is None:
            try:
                request.parse()
            except ServingError:
                return None
        if context.trace is not None:
            sink = TracedSink(sink, context.trace)
        return self._json.run_if_cached(request, context, sink)

    def submit(
        self, request: InferRequest, context: RequestContext, sink: ResponseSink[InferResponse]
    ) -> RequestHandle | None:
        """Runs a request given as values. Like `infer`."""
        if context.trace is not None:
            sink = TracedSink(sink, context.trace)
        return self._values.run(request, context, sink)
