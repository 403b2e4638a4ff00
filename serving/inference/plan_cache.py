"""Finds the plan of a request that differs from an earlier one only in the bytes of its tensor.

Comparing a request's first bytes with a cached prefix replaces parsing and checking it.
"""

from google.protobuf.message import DecodeError

from protos.grpc_service_pb2 import ModelInferRequest
from serving.models.repository import Repository
from serving.protocol.grpc_codec import ResponseEncoder, raw_input_tag

_MAX_LENGTHS = 256
_MAX_PLANS_PER_LENGTH = 4
"""Clients whose requests have the same length but different prefixes do not evict each other."""


class CachedPlan:
    """A plan, and the bytes that its requests have in common: everything before the tensor's own."""

    __slots__ = ("encoder", "prefix")

    def __init__(self, prefix: bytes, encoder: ResponseEncoder) -> None:
        self.prefix = prefix
        self.encoder = encoder

    @classmethod
    def from_request(cls, payload: bytes, message: ModelInferRequest, encoder: ResponseEncoder) -> "CachedPlan | None":
        """Returns the plan of a request whose bytes end with its only raw tensor, as all known clients write them.

        Returns:
            None if the request has another form.
        """
        if len(message.raw_input_contents) != 1:
            return None
        size = len(message.raw_input_contents[0])
        prefix = payload[: len(payload) - size]
        tag = raw_input_tag(size)
        rest = ModelInferRequest()
        rest.CopyFrom(message)
        rest.ClearField("raw_input_contents")
        try:
            matches = prefix.endswith(tag) and ModelInferRequest.FromString(prefix[: -len(tag)]) == rest
        except DecodeError:
            return None
        return cls(prefix, encoder) if matches else None

    def tensor(self, payload: bytes) -> memoryview:
        """Returns the tensor's bytes in a request with this prefix, without a copy."""
        return memoryview(payload)[len(self.prefix) :]


class PlanCache:
    """Plans of recent requests, by the requests' length and prefix. Empties itself when a model version changes."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._generation = repository.generation
        self._plans: dict[int, tuple[CachedPlan, ...]] = {}

    def find(self, payload: bytes) -> CachedPlan | None:
        """Returns the plan of a serialised ModelInferRequest, if it is cached."""
        if self._generation != self._repository.generation:
            self._generation = self._repository.generation
            self._plans.clear()
        for cached in self._plans.get(len(payload), ()):
            if payload.startswith(cached.prefix):
                return cached
        return None

    def add(self, payload: bytes, message: ModelInferRequest, encoder: ResponseEncoder) -> None:
        """Caches the plan of a parsed request, if the request's form allows it."""
        cached = CachedPlan.from_request(payload, message, encoder)
        if cached is not None:
            if len(self._plans) >= _MAX_LENGTHS:
                self._plans.clear()
            others = self._plans.get(len(payload), ())
            self._plans[len(payload)] = (cached, *others[: _MAX_PLANS_PER_LENGTH - 1])

    def clear(self) -> None:
        self._plans.clear()
