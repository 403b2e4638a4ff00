"""Plans of recent requests, by what the requests have in common: everything but their tensors' bytes and their ids."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from serving.models.repository import Repository

MAX_PLANS = 256
"""Each holds a reference to its model version, and a key of a few kilobytes at most."""

P = TypeVar("P")


class PlanCache(Generic[P]):
    """The most recently used plans. Thread-safe. Holds none whose model version may have been replaced."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._lock = threading.Lock()
        self._generation = repository.generation
        self._plans: OrderedDict[Hashable, P] = OrderedDict()

    def find(self, key: Hashable | None) -> P | None:
        """Returns the plan of the requests with this key, if it is cached and the repository has not changed."""
        with self._lock:
            if self._generation != self._repository.generation:
                self._empty()
                return None
            plan = self._plans.get(key)
            if plan is not None:
                self._plans.move_to_end(key)
            return plan

    def add(self, key: Hashable | None, plan: P, generation: int) -> None:
        """Caches a plan, unless the repository has changed.

        Args:
            key: None for a plan that is not kept.
            generation: of the repository, read before the plan's model version was looked up.
        """
        with self._lock:
            if self._generation != self._repository.generation:
                self._empty()
            if key is not None and generation == self._generation:
                self._plans[key] = plan
                if len(self._plans) > MAX_PLANS:
                    self._plans.popitem(last=False)

    def clear(self) -> None:
        """Forgets all plans, and with them their model versions."""
        with self._lock:
            self._empty()

    def _empty(self) -> None:
        self._generation = self._repository.generation  # first: a change in between is seen by the next call
        self._plans.clear()
