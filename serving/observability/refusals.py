"""Counts the requests that are refused before they reach a model's queue. `statistics` has those that queues refuse."""

import threading
from collections import Counter

from serving.errors import ServingError
from serving.observability.calls import MODEL_INFER, Calls
from serving.protocol.status import status_name

_STATUSES = {"malformed": "INVALID_ARGUMENT", "timeout": "DEADLINE_EXCEEDED", "connections": "UNAVAILABLE"}
"""The statuses of the reasons that are not named after one."""


class Refusals:
    """Numbers of refused requests by reason and model. Thread-safe.

    Reasons are the names of gRPC's status codes in lower case, and what HTTP alone refuses: `malformed` (no HTTP),
    `timeout` (the client was too slow) and `connections` (there are too many).

    Attributes:
        calls: has the refused requests too.
    """

    def __init__(self) -> None:
        self.calls = Calls()
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def count(self, reason: str, model: str = "", method: str = MODEL_INFER) -> None:
        """Counts a request.

        Args:
            model: a name that is in the repository, so that clients cannot make up label values; else empty.
            method: name of an RPC, also for HTTP.
        """
        with self._lock:
            self._counts[reason, model] += 1
        self.calls.record(method, _STATUSES.get(reason) or reason.upper(), model=model)

    def count_error(self, error: ServingError, model: str = "", method: str = MODEL_INFER) -> None:
        """Counts a request that is refused with this error."""
        self.count(status_name(error).lower(), model, method)

    def snapshot(self) -> dict[tuple[str, str], int]:
        """Returns the number of refused requests by reason and model."""
        with self._lock:
            return dict(self._counts)
