"""The health states that `grpc.health.v1` reports, for every front end. Knows neither gRPC nor the repository.

A probe names a service: "", the gRPC service or `readiness` for the server, `liveness` for the process, or a model. The
server is serving when every model that it should serve is ready.
"""

import threading
from collections.abc import Callable, Mapping

from serving.errors import NotFound, quote

SERVING = 1
NOT_SERVING = 2
SERVICE_UNKNOWN = 3

LIVENESS = "liveness"
READINESS = "readiness"
SERVER_SERVICES = ("", "inference.GRPCInferenceService", READINESS)
"""The services that stand for the whole server. They take precedence over models of the same name."""

Listener = Callable[[int], None]


class Health:
    """Health states by service name, and the listeners of each. Thread-safe.

    Listeners are called under a lock, so that each sees all changes in order. They must not block; they may
    unsubscribe.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._listeners: dict[str, list[Listener]] = {}
        self.is_draining = False
        self._states = _states(False, {})

    def update(self, ready: bool, models: Mapping[str, bool], *, live: bool = True) -> None:
        """Sets the state of the server and of all models; a model that is no longer listed becomes unknown.

        Args:
            live: False if the process must be restarted.
        """
        with self._lock:
            if self.is_draining:
                ready, models = False, dict.fromkeys(models, False)
            self._replace(_states(ready, models, live=live))

    def drain(self) -> None:
        """Makes every service but `liveness` NOT_SERVING for good, whatever `update` sets later."""
        with self._lock:
            self.is_draining = True
            self._replace(dict.fromkeys(self._states, NOT_SERVING) | {LIVENESS: self._states[LIVENESS]})

    def check(self, service: str) -> int:
        """Returns the current state.

        Raises:
            NotFound: the service is unknown.
        """
        state = self._states.get(service)
        if state is None:
            raise NotFound(
                f"unknown service {quote(service)}: expected '', '{SERVER_SERVICES[1]}' or the name of a model"
            )
        return state

    def watch(self, service: str, listener: Listener) -> Callable[[], None]:
        """Calls the listener with the current state, SERVICE_UNKNOWN for an unknown service, and on each change.

        Returns:
            A function that unsubscribes the listener; further calls of it do nothing.
        """
        with self._lock:
            self._listeners.setdefault(service, []).append(listener)
            listener(self._states.get(service, SERVICE_UNKNOWN))

        def unsubscribe() -> None:
            with self._lock:
                listeners = self._listeners.get(service, [])
                if listener in listeners:
                    listeners.remove(listener)
                    if not listeners:
                        del self._listeners[service]

        return unsubscribe

    def _replace(self, states: dict[str, int]) -> None:
        before, self._states = self._states, states
        for service, listeners in list(self._listeners.items()):
            state = states.get(service, SERVICE_UNKNOWN)
            if state != before.get(service, SERVICE_UNKNOWN):
                for listener in list(listeners):
                    listener(state)


def _states(ready: bool, models: Mapping[str, bool], *, live: bool = True) -> dict[str, int]:
    states = {name: SERVING if is_ready else NOT_SERVING for name, is_ready in models.items()}
    states |= dict.fromkeys(SERVER_SERVICES, SERVING if ready else NOT_SERVING)
    states[LIVENESS] = SERVING if live else NOT_SERVING
    return states
