"""The health service's Watch calls."""

from collections.abc import Callable

from serving.errors import InvalidArgument
from serving.frontends.common import limits
from serving.frontends.common.limits import OpenCalls
from serving.observability.health import Health
from serving.observability.refusals import Refusals
from serving.protocol.admin import watched_service


class Watches:
    """The Watch calls of one front end.

    Attributes:
        open_calls: bounds their number, and counts those that are refused.
    """

    def __init__(self, health: Health, refusals: Refusals) -> None:
        self.open_calls = OpenCalls("Watch", refusals, limits.MAX_WATCHES, limits.MAX_WATCHES_PER_HOST)
        self._health = health

    def service(self, payload: bytes) -> str:
        """Returns the service that a call's message names.

        Raises:
            InvalidArgument: the message is malformed, or too long.
        """
        try:
            return watched_service(payload)
        except InvalidArgument as error:
            self.open_calls.count_refused(error)
            raise

    def open(self, payload: bytes, peer: str, send: Callable[[int], None]) -> Callable[[], None]:
        """Sends the state of the service that a call's message names, and each change.

        Args:
            peer: the client's address.

        Returns:
            A function that ends this, to be called once.

        Raises:
            InvalidArgument: the message is malformed, or too long.
            ResourceExhausted: too many calls are open.
        """
        service = self.service(payload)
        self.open_calls.open(peer)
        unsubscribe = self._health.watch(service, send)

        def end() -> None:
            unsubscribe()
            self.open_calls.close(peer)

        return end
