"""How requests reach the service: one module a transport, and what each must do."""

from typing import Protocol


class Frontend(Protocol):
    """A listener that hands RPCs to the service."""

    port: int
    """What it listens on once started; 0 for a Unix socket."""

    def start(self) -> None:
        """Listen.

        Raises:
            StartupError: the address cannot be had.
        """

    def stop(self, grace_s: float) -> None:
        """Refuse what comes, finish what is under way, at most for so long, then close."""
