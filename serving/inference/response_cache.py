"""The response cache: outputs of recent requests by the digest of their inputs, for models that ask for it.

Triton's `response_cache { enable: true }`. A backend sees the tensors of a request and nothing else, and computes all
outputs, whichever are requested: so the data, shapes and data types of the inputs decide what it returns, and one entry
answers gRPC and HTTP, any selection of the outputs, and classifications. Each model version has entries of its own,
which end with it: no answer outlives a swap.
"""

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from serving.inference.batch import ComputedBatch, QueuedRequest
from serving.inference.outputs import Outputs
from serving.observability.statistics import Statistics
from serving.protocol.tensors import Buffer, Shape

logger = logging.getLogger(__name__)

MAX_DIGESTED_BYTES = 4 << 20
"""Of the inputs of a request that is looked up. The thread that receives requests digests them: 2 ms for as many."""
ENTRY_BYTES = 2048
"""What an entry takes beside the bytes of its outputs."""

Key = tuple[tuple[Shape, ...], bytes]


def digest(parts: Sequence[Buffer]) -> bytes | None:
    """Returns the SHA-256 of parts and their lengths; None for more than is digested."""
    if sum(map(len, parts)) > MAX_DIGESTED_BYTES:
        return None
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()


class _Entry(NamedTuple):
    owner: "VersionCache"
    outputs: Outputs
    num_bytes: int


class ResponseCache:
    """The entries of all models, bounded together. The least recently used ones make room. Thread-safe.

    Args:
        max_bytes: of all entries.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[int, Key], _Entry] = OrderedDict()
        self._num_bytes = 0
        self._num_opened = 0

    def open(self, statistics: Statistics) -> "VersionCache":
        """Returns an empty cache for a model version that has been loaded."""
        with self._lock:
            self._num_opened += 1
            return VersionCache(self, self._num_opened, statistics)

    def find(self, owner: "VersionCache", key: Key) -> Outputs | None:
        """Returns the entry of a version; None if there is none."""
        with self._lock:
            entry = self._entries.get((owner.number, key))
            if entry is None:
                return None
            self._entries.move_to_end((owner.number, key))
            return entry.outputs

    def add(self, owner: "VersionCache", key: Key, outputs: Outputs) -> None:
        """Adds an entry, unless its version has been closed."""
        num_bytes = outputs.num_bytes + ENTRY_BYTES
        if num_bytes > self.max_bytes:
            return
        with self._lock:
            if owner.is_closed or (owner.number, key) in self._entries:
                return
            self._entries[owner.number, key] = _Entry(owner, outputs, num_bytes)
            self._count(owner, num_bytes)
            while self._num_bytes > self.max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self._count(oldest.owner, -oldest.num_bytes)

    def close(self, owner: "VersionCache") -> None:
        """Drops the entries of a version, which gets no more."""
        with self._lock:
            owner.is_closed = True
            for key in [key for key in self._entries if key[0] == owner.number]:
                self._count(owner, -self._entries.pop(key).num_bytes)

    def _count(self, owner: "VersionCache", num_bytes: int) -> None:
        owner.num_bytes += num_bytes
        self._num_bytes += num_bytes


class VersionCache:
    """The entries of one model version.

    Attributes:
        number: of all versions that have been loaded, the same one loaded again included.
        num_bytes: of its entries.
        is_closed: the version is gone.
    """

    def __init__(self, cache: ResponseCache, number: int, statistics: Statistics) -> None:
        self.number = number
        self.num_bytes = 0
        self.is_closed = False
        self._cache = cache
        self._statistics = statistics

    def find(self, request: QueuedRequest) -> Outputs | None:
        """Returns the outputs for a request, and counts a miss if there are none.

        A request that is looked up gets its `digest`, by which `keep` knows it again.
        """
        began_ns = time.monotonic_ns()
        outputs = self.look_up(request)
        if outputs is None and request.digest is not None:
            self._statistics.record_cache_miss(1, time.monotonic_ns() - began_ns)
        return outputs

    def look_up(self, request: QueuedRequest) -> Outputs | None:
        """As `find`, but counts nothing."""
        request.digest = digest(request.identity)
        return None if request.digest is None else self._cache.find(self, (request.shapes, request.digest))

    def keep(self, batch: ComputedBatch) -> None:
        """Adds the outputs of the requests of a batch."""
        began_ns = time.monotonic_ns()
        row = 0
        try:
            for request in batch.requests:
                if request.digest is not None:
                    outputs = batch.outputs.part(row, request.rows)
                    self._cache.add(self, (request.shapes, request.digest), outputs)
                row += request.rows
        except Exception:
            logger.exception("responses could not be cached")
        self._statistics.record_cache_miss(0, time.monotonic_ns() - began_ns)

    def close(self) -> None:
        """Drops all entries."""
        self._cache.close(self)
