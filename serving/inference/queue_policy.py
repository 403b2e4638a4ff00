"""How the requests of each priority wait for their model: what `dynamic_batching` of its configuration says."""

from dataclasses import dataclass


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
