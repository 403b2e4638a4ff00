"""Limits how many instances of all models compute at once, by the resources that their configurations name.

Triton's rate limiter: an instance with a batch waits until its resources are free. Of those that wait, the one with
the fewest turns goes first, where a turn counts as much as its priority: one of priority 2 gets half as many as one of
priority 1 (https://github.com/triton-inference-server/server/blob/main/docs/user_guide/rate_limiter.md). Resources are
names and numbers; they stand for memory, bandwidth or whatever the models share.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serving.errors import LoadError

Key = tuple[str, str]
"""A resource and the device that has it: the number of a GPU, "cpu", or "" for the whole server."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource that each instance of a group needs.

    Args:
        is_global: whether the whole server has it, rather than each device.
    """

    name: str
    count: int
    is_global: bool = False


class RateLimiter:
    """The resources of one process. Thread-safe.

    Args:
        available: by name and device, or by name and "" for all devices. Of any other resource, there is as much as the
            largest need of an instance.
    """

    def __init__(self, available: Mapping[Key, int] | None = None) -> None:
        self._available = dict(available or {})
        self._lock = threading.Lock()
        self._turns: list[Turn] = []
        self._waiting: list[Turn] = []
        self._used: Counter[Key] = Counter()
        self._capacity: dict[Key, int] = {}
        self._now = 0
        """The start of the turn that was given last, in turns of priority 1: new instances begin there, not at 0."""

    def register(self, resources: Sequence[Resource], gpu: int | None, priority: int) -> "Turn":
        """Returns the turns of an instance on a GPU, or the CPU.

        Args:
            priority: 1 for the most turns.

        Raises:
            LoadError: it needs more of a resource than there is.
        """
        device = "cpu" if gpu is None else str(gpu)
        needs: Counter[Key] = Counter()
        for resource in resources:
            needs[resource.name, "" if resource.is_global else device] += resource.count
        for key, count in needs.items():
            limit = self._limit(key)
            if limit is not None and count > limit:
                raise LoadError(f"an instance needs {count} of the resource '{key[0]}', but the server has {limit}")
        turn = Turn(self, needs, max(1, priority))
        with self._lock:
            self._turns.append(turn)
            self._measure()
        return turn

    def take(self, turn: "Turn") -> None:
        """Waits until the resources of an instance are free, and takes them."""
        with self._lock:
            turn.start = max(self._now, turn.next_start)
            turn.may_run.clear()
            self._waiting.append(turn)
            self._grant()
        turn.may_run.wait()

    def give_back(self, turn: "Turn") -> None:
        """Frees the resources of an instance, once."""
        with self._lock:
            if turn.is_running:
                turn.is_running = False
                self._used.subtract(turn.needs)
                self._grant()

    def remove(self, turn: "Turn") -> None:
        """Forgets an instance."""
        with self._lock:
            if turn in self._turns:
                self._turns.remove(turn)
                self._measure()
                self._grant()

    def _limit(self, key: Key) -> int | None:
        return self._available.get(key, self._available.get((key[0], "")))

    def _measure(self) -> None:
        """Finds out how much there is of each resource."""
        self._capacity = {}
        for turn in self._turns:
            for key, count in turn.needs.items():
                self._capacity[key] = max(count, self._capacity.get(key, 0), self._limit(key) or 0)

    def _grant(self) -> None:
        """Gives turns, in order. An instance for which there is not enough keeps what it needs from later ones."""
        kept: set[Key] = set()
        for turn in sorted(self._waiting, key=lambda turn: turn.start):
            fits = all(self._used[key] + count <= self._capacity.get(key, count) for key, count in turn.needs.items())
            if not fits or not kept.isdisjoint(turn.needs):
                kept |= turn.needs.keys()
                continue
            self._waiting.remove(turn)
            self._used.update(turn.needs)
            self._now = max(self._now, turn.start)
            turn.next_start = turn.start + turn.priority
            turn.is_running = True
            turn.may_run.set()


class Turn:
    """The turns of one instance.

    Attributes:
        start: of the turn that it waits for, as `RateLimiter` counts them; `next_start`: of the one after it.
        is_running: the instance has its resources.
        waited_s: how long it has waited, in all.
    """

    def __init__(self, limiter: RateLimiter, needs: Mapping[Key, int], priority: int) -> None:
        self.needs = needs
        self.priority = priority
        self.start = self.next_start = 0
        self.is_running = False
        self.may_run = threading.Event()
        self.waited_s = 0.0
        self._limiter = limiter

    def __enter__(self) -> None:
        began = time.monotonic()
        self._limiter.take(self)
        self.waited_s += time.monotonic() - began

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Frees the resources: after the turn, or before it ends if the instance hangs, which must hold up no other."""
        self._limiter.give_back(self)

    def close(self) -> None:
        """Gives the turns up."""
        self._limiter.remove(self)


def parse_resource(text: str) -> tuple[Key, int] | None:
    """Returns what `NAME:COUNT` or `NAME:COUNT:GPU` says; None if it is neither."""
    name, _, rest = text.partition(":")
    count, _, device = rest.partition(":")
    if not name or not count.isdecimal() or not (device in ("", "cpu") or device.isdecimal()):
        return None
    return (name, device), int(count)
