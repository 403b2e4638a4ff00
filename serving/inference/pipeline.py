"""The pipeline of inference requests: finds or makes a request's plan, binds its inputs to it, and queues it.

Knows no protocol: `serving.inference.service` has one pipeline for each form in which requests arrive.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from convoy.images import Pixels
from serving.errors import Internal, ServingError, Unavailable
from serving.inference.batcher import BatcherClosed
from serving.inference.bound_request import BoundRequest, DecodedRequest, Encoder
from serving.inference.decoder import ImageDecoder
from serving.inference.image_files import ImageFiles, NeedsDecoding, find_files
from serving.inference.message_memory import MemoryShare, MessageMemory
from serving.inference.plan import Plan
from serving.inference.plan_cache import PlanCache
from serving.inference.request import EncodedRequest, InferRequest, RequestContext, RequestHandle, ResponseSink
from serving.inference.shared_memory import NeedsSharedMemory, SharedMemory, refusal
from serving.models.repository import Repository
from serving.observability.refusals import Refusals
from serving.protocol.tensors import Buffer

logger = logging.getLogger(__name__)

_MAX_SWAPS = 8
"""How often the model version may be replaced while a request is being queued."""

S = TypeVar("S", bound=EncodedRequest)
R = TypeVar("R")


class CountedSink(Generic[R]):
    """Frees what its message takes of the message memory, before it passes the response on."""

    def __init__(self, sink: ResponseSink[R], share: MemoryShare) -> None:
        self._sink = sink
        self._share = share

    def succeed(self, response: R, /) -> None:
        self._share.free()
        self._sink.succeed(response)

    def fail(self, error: ServingError) -> None:
        self._share.free()
        self._sink.fail(error)


@dataclass(frozen=True, slots=True)
class CountedRequest:
    """A `RequestHandle` that frees what its message takes of the message memory when it is cancelled."""

    request: RequestHandle
    share: MemoryShare

    def cancel(self) -> None:
        self.request.cancel()
        self.share.free()


class Pipeline(Generic[S, R]):
    """The pipeline of one protocol's requests, from its form of a request to its form of a response.

    Args:
        decoder: decodes image files.
        shared_memory: of clients; None for a server that allows none.
        message_memory: counts large requests.
        parse: returns the values in a request.
        make_encoder: returns what makes a plan's responses.
    """

    def __init__(  # noqa: PLR0913 (what both protocols share, and what they do not)
        self,
        repository: Repository,
        refusals: Refusals,
        decoder: ImageDecoder,
        shared_memory: SharedMemory | None,
        message_memory: MessageMemory,
        parse: Callable[[S], InferRequest],
        make_encoder: Callable[[Plan, S], Encoder[S, R]],
    ) -> None:
        self._shared_memory = shared_memory
        self._message_memory = message_memory
        self._repository = repository
        self._refusals = refusals
        self._decoder = decoder
        self._parse = parse
        self._make_encoder = make_encoder
        self._encoders: PlanCache[Encoder[S, R]] = PlanCache(repository)

    def run(
        self,
        encoded: S,
        context: RequestContext,
        sink: ResponseSink[R],
        resolved: InferRequest | None = None,
        files: ImageFiles | None = None,
    ) -> RequestHandle | None:
        """Runs a request. The response or the error goes to `sink`.

        Args:
            resolved: its values, once its inputs have been read from shared memory or decoded; None for a request that
                holds its inputs itself.
            files: that its inputs have been decoded from; None for any other request.

        Returns:
            The request in flight; None if `sink` has been called already.
        """
        try:
            for _ in range(_MAX_SWAPS):
                encoder, buffers = self._bind(encoded, resolved, files)
                queued: BoundRequest[R]
                if files is None:
                    queued = BoundRequest(encoder, buffers, encoded.request_id, context, sink)
                else:
                    queued = DecodedRequest(encoder, buffers, encoded.request_id, context, sink, files)
                try:
                    encoder.plan.model.batcher.submit(queued)
                    return queued
                except BatcherClosed:  # the version was replaced after it was found: the repository has a newer one
                    self._encoders.clear()
            self._refuse(Unavailable("the model is being replaced"), sink)
        except NeedsDecoding as needed:
            return self._decode(needed, encoded, context, sink)
        except NeedsSharedMemory as needed:
            return self._run_with_shared_memory(needed.request, encoded, context, sink)
        except ServingError as error:  # `_bind` or the batcher has counted it
            sink.fail(error)
        except Exception as error:
            self._refuse(error, sink)
        return None

    def _refuse(self, error: Exception, sink: ResponseSink[R], model: str = "") -> None:
        """Answers, and counts, a request that is not queued."""
        if not isinstance(error, ServingError):
            logger.error("a request failed before it was queued", exc_info=error)
            error = Internal("the request could not be run; the server's log says why")
        self._refusals.count_error(error, model)
        sink.fail(error)

    def run_if_cached(self, encoded: S, context: RequestContext, sink: ResponseSink[R]) -> RequestHandle | None:
        """Runs a request if its plan is cached and nothing is wrong with it.

        Returns:
            None if it has not been run: then `run` does, or finds out why not.
        """
        encoder = self._encoders.find(encoded.key)
        if encoder is None or encoder.plan.timeout_s is not None:
            return None
        try:
            queued = BoundRequest(encoder, encoder.bind(encoded), encoded.request_id, context, sink)
        except ServingError:
            return None
        try:
            encoder.plan.model.batcher.submit(queued)
        except BatcherClosed:
            return None
        except ServingError as error:
            sink.fail(error)
        return queued

    def _bind(
        self, encoded: S, resolved: InferRequest | None, files: ImageFiles | None
    ) -> tuple[Encoder[S, R], tuple[Buffer, ...]]:
        """Returns the encoder of a request's plan, and its inputs in the model's order.

        The plan of a resolved request is not kept: to read or decode its inputs takes far longer.

        Raises:
            NeedsDecoding, NeedsSharedMemory: the inputs must be decoded or read before.
        """
        key = encoded.key if resolved is None else None
        encoder = self._encoders.find(key)
        name = ""
        try:
            if encoder is not None:
                return encoder, encoder.bind(encoded)
            generation = self._repository.generation
            request = resolved or self._parse(encoded)
            if request.uses_shared_memory and resolved is None:
                raise NeedsSharedMemory(request)
            model = self._repository.get(request.model_name, request.model_version)
            name = model.spec.name
            if files is not None and model.images != files.images:
                raise Unavailable("the model was replaced while images were decoded for it: retry")
            if model.images is not None and (found := find_files(request, model.images)) is not None:
                raise NeedsDecoding(request, model, found)
            encoder = self._make_encoder(Plan(model, request), encoded)
            buffers = encoder.plan.bind_inputs(request.tensors)
            self._encoders.add(key, encoder, generation)
            return encoder, buffers
        except ServingError as error:
            self._refusals.count_error(error, name or (encoder.plan.model.spec.name if encoder else ""))
            raise

    def _run_with_shared_memory(
        self, request: InferRequest, encoded: S, context: RequestContext, sink: ResponseSink[R]
    ) -> RequestHandle | None:
        """Reads what a request has in shared memory, then runs it. What is read counts in the message memory."""
        share = MemoryShare(self._message_memory)
        try:
            if self._shared_memory is None:
                raise refusal(request)
            resolved = self._shared_memory.resolve(request, share)
        except Exception as error:
            share.free()
            self._refuse(error, sink)
            return None
        queued = self.run(encoded, context, CountedSink(sink, share), resolved)
        return None if queued is None else CountedRequest(queued, share)

    def _decode(
        self, needed: NeedsDecoding, encoded: S, context: RequestContext, sink: ResponseSink[R]
    ) -> RequestHandle | None:
        """Decodes the image files of a request, then runs it. Decodes nothing for one that does not fit the model."""
        request, files = needed.request, needed.files

        def fail(error: Exception) -> None:
            self._refuse(error, sink, request.model_name)

        def run(pixels: Pixels) -> RequestHandle | None:
            decoded = replace(request, inputs=[files.decoded(pixels.reshape(-1).data)])
            return self.run(encoded, context, sink, decoded, files)

        try:
            plan = Plan(needed.model, replace(request, inputs=[files.decoded(b"")]))
            context = replace(context, deadline=plan.deadline(context))  # decoding counts in the request's time-out
            if self._answer_from_cache(plan, files, encoded, context, sink):
                return None
            return self._decoder.submit(files, context.deadline, then=run, fail=fail)
        except Exception as error:
            fail(error)
            return None

    def _answer_from_cache(
        self, plan: Plan, files: ImageFiles, encoded: S, context: RequestContext, sink: ResponseSink[R]
    ) -> bool:
        """Answers a request whose image files the response cache knows. Returns whether it does."""
        if plan.model.cache is None or files.find_digest() is None:
            return False
        request = DecodedRequest(self._make_encoder(plan, encoded), (), encoded.request_id, context, sink, files)
        return plan.model.batcher.answer_from_cache(request)
