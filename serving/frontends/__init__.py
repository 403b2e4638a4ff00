"""Front ends: listeners that hand clients' requests to the services. One module or folder for each, and `common`."""

from typing import Protocol


class Frontend(Protocol):
    """A listener."""

    port: int
    """The port that it listens on once started; 0 for a Unix socket."""

    def start(self) -> None:
        """Starts to listen.

        Raises:
            StartupError: the address is not available.
        """

    def stop(self, grace_s: float) -> None:
        """Refuses new requests, finishes those in flight within `grace_s`, then closes all connections."""
