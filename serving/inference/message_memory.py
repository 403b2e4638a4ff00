"""The memory of requests: one bound for all that arrive, wait or are computed, whatever their protocol and model.

A message has a bound of its own, and so has each queue. This one holds for all connections and models together. Small
messages are not counted: the numbers of connections and of queued requests bound them, and they must pass while large
ones fill the memory.
"""

import sys
import threading

from serving.errors import ResourceExhausted

UNCOUNTED_BYTES = 64 << 10
"""Size of a message up to which it is not counted."""

_RETRY_AFTER_MS = 1000


class MessageMemory:
    """The memory of all large messages of the process, of which each takes a `MemoryShare`.

    Args:
        max_bytes: of all messages together. A message that is alone may exceed it.

    Attributes:
        num_bytes: that are counted now.
        lock: is held while shares change.
    """

    def __init__(self, max_bytes: int = sys.maxsize) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.lock = threading.Lock()


class MemoryShare:
    """What one message takes of the memory.

    Attributes:
        num_bytes: that are counted; 0 while the message is small.
    """

    __slots__ = ("_memory", "_size", "num_bytes")

    def __init__(self, memory: MessageMemory) -> None:
        self.num_bytes = 0
        self._memory = memory
        self._size = 0

    def take(self, num_bytes: int) -> None:
        """Counts more bytes of the message.

        Raises:
            ResourceExhausted: there is no memory left for them.
        """
        memory, size = self._memory, self._size + num_bytes
        if size > UNCOUNTED_BYTES:
            with memory.lock:
                others = memory.num_bytes - self.num_bytes
                if others and others + size > memory.max_bytes:
                    raise ResourceExhausted(
                        f"requests fill the {memory.max_bytes >> 20} MB that the server has for them: retry later",
                        _RETRY_AFTER_MS,
                    )
                memory.num_bytes = others + size
                self.num_bytes = size
        self._size = size

    def free(self) -> None:
        """Frees what the message takes. Further calls do nothing."""
        if self.num_bytes:
            with self._memory.lock:
                self._memory.num_bytes -= self.num_bytes
                self.num_bytes = 0
