"""Who is serving: the states that `grpc.health.v1` tells, for any transport. Knows no gRPC and no repository.

A probe may ask for the server ("" or its gRPC service, or `readiness`), for the process (`liveness`), or for one model
by its name. The server is serving when every model asked for is ready.
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
"""Services that stand for the server as a whole. These names win over models of the same name."""

Listener = Callable[[int], None]


class Health:
    """States by service name, and who wants to hear of changes. Thread-safe.

    Listeners are called under a lock, so that each hears of all changes in their order: they must not block, and may
    unsubscribe.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._listeners: dict[str, list[Listener]] = {}
        self.is_draining = False
        self._states = _states(False, {})

    def update(self, ready: bool, models: Mapping[str, bool]) -> None:
        """Set the state of the server and of all models; a model that is not named any more becomes unknown."""
        with self._lock:
            if self.is_draining:
                ready, models = False, dict.fromkeys(models, False)
            self._replace(_states(ready, models))

    def drain(self) -> None:
        """From now on nothing is serving but `liveness`, whatever `update` says."""
        with self._lock:
            self.is_draining = True
            self._replace(dict.fromkeys(self._states, NOT_SERVING) | {LIVENESS: SERVING})

    def check(self, service: str) -> int:
        """The present state.

        Raises:
            NotFound: no such service.
        """
        state = self._states.get(service)
        if state is None:
            raise NotFound(
                f"unknown service {quote(service)}: expected '', '{SERVER_SERVICES[1]}' or the name of a model"
            )
        return state

    def watch(self, service: str, listener: Listener) -> Callable[[], None]:
        """Tell the listener the present state at once (SERVICE_UNKNOWN if there is no such service) and each change.

        Returns:
            what ends that; calling it again does nothing.
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


def _states(ready: bool, models: Mapping[str, bool]) -> dict[str, int]:
    states = {name: SERVING if is_ready else NOT_SERVING for name, is_ready in models.items()}
    states |= dict.fromkeys(SERVER_SERVICES, SERVING if ready else NOT_SERVING)
    states[LIVENESS] = SERVING
    return states
