"""How requests wait for their model: by `dynamic_batching` of its configuration, and by their own parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.errors import InvalidArgument, quote


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How requests of one priority wait.

    Args:
        max_queue_size: requests; 0 for the server's default.
        timeout_us: how long one may wait; 0 for no limit.
        delays: a request that has waited too long is delayed, rather than refused.
        allows_override: a request may set a shorter time.
    """

    max_queue_size: int = 0
    timeout_us: int = 0
    delays: bool = False
    allows_override: bool = False

    @property
    def interprets_timeout(self) -> bool:
        """Whether the policy decides what the request parameter `timeout` means, rather than setting a deadline."""
        return self.delays or self.allows_override

    def wait_us(self, timeout_us: int) -> int:
        """Returns how long a request may wait that asks for this time; 0 for no limit."""
        if not (self.allows_override and timeout_us):
            return self.timeout_us
        return min(timeout_us, self.timeout_us or timeout_us)


@dataclass(frozen=True, slots=True)
class QueuePolicies:
    """The policies of all priorities.

    Args:
        levels: the highest first.
        default: place of the priority of requests that name none, or one that does not exist.
    """

    levels: tuple[QueuePolicy, ...]
    default: int = 0

    def level(self, priority: object) -> int:
        """Returns the place of a priority of the protocol, which counts from 1."""
        return priority - 1 if type(priority) is int and 1 <= priority <= len(self.levels) else self.default


@dataclass(frozen=True, slots=True)
class Scheduling:
    """What a request's parameters, and its model's configuration, say of its time in the queue.

    Args:
        level: of priority, as in `QueuePolicies`.
        wait_us: how long it may wait, by the policy of its level; 0 for no limit.
        timeout_s: in which it must be answered; None for no limit.
    """

    level: int = 0
    wait_us: int = 0
    timeout_s: float | None = None


def scheduling_of(parameters: Mapping[str, Any], policies: QueuePolicies | None) -> Scheduling:
    """Returns what the parameters `priority` and `timeout` (in microseconds) mean for a model.

    https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_schedule_policy.md

    Raises:
        InvalidArgument: one is not a whole number, or is negative.
    """
    timeout = _whole_number(parameters, "timeout", " of microseconds")
    timeout_s = timeout * 1e-6 if timeout else None
    if policies is None:
        return Scheduling(timeout_s=timeout_s)
    level = policies.level(_whole_number(parameters, "priority"))
    policy = policies.levels[level]
    return Scheduling(level, policy.wait_us(timeout), None if policy.interprets_timeout else timeout_s)


def _whole_number(parameters: Mapping[str, Any], name: str, unit: str = "") -> int:
    value = parameters.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidArgument(f"parameter '{name}' must be a whole number{unit}, got {quote(value)}")
    return value
