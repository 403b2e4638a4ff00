"""The health states that probes see."""

import itertools
import threading
from collections.abc import Callable

import pytest

from serving.errors import NotFound
from serving.observability.health import NOT_SERVING, SERVICE_UNKNOWN, SERVING, Health

SERVER = ["", "inference.GRPCInferenceService", "readiness"]


def states(health: Health, *services: str) -> list[int]:
    return [health.check(service) for service in services]


def test_a_new_server_is_live_and_not_ready() -> None:
    health = Health()
    assert states(health, *SERVER) == [NOT_SERVING] * 3
    assert health.check("liveness") == SERVING


def test_server_and_models_have_separate_states() -> None:
    health = Health()
    health.update(True, {"mnist": True, "cifar": False})
    assert states(health, *SERVER, "mnist", "cifar") == [SERVING] * 4 + [NOT_SERVING]


def test_an_unknown_service_is_named() -> None:
    health = Health()
    with pytest.raises(NotFound, match="unknown service 'mnist'"):
        health.check("mnist")


def test_an_unloaded_model_becomes_unknown() -> None:
    health, seen = Health(), list[int]()
    health.update(True, {"mnist": True})
    health.watch("mnist", seen.append)
    health.update(True, {})
    with pytest.raises(NotFound):
        health.check("mnist")
    assert seen == [SERVING, SERVICE_UNKNOWN]


def test_a_listener_gets_the_current_state_and_changes_only() -> None:
    health, seen = Health(), list[int]()
    health.watch("", seen.append)
    health.update(True, {})
    health.update(True, {"mnist": True})
    health.update(False, {"mnist": False})
    assert seen == [NOT_SERVING, SERVING, NOT_SERVING]


def test_a_listener_of_an_unknown_service_is_called_once_it_is_known() -> None:
    health, seen = Health(), list[int]()
    health.watch("mnist", seen.append)
    health.update(False, {"mnist": False})
    health.update(True, {"mnist": True})
    assert seen == [SERVICE_UNKNOWN, NOT_SERVING, SERVING]


def test_unsubscribing_ends_the_calls_of_one_listener_only() -> None:
    health, unsubscribed, subscribed = Health(), list[int](), list[int]()
    unsubscribe = health.watch("", unsubscribed.append)
    health.watch("", subscribed.append)
    unsubscribe()
    unsubscribe()
    health.update(True, {})
    assert (unsubscribed, subscribed) == ([NOT_SERVING], [NOT_SERVING, SERVING])


def test_a_listener_may_unsubscribe_while_it_is_called() -> None:
    health, seen = Health(), list[int]()
    unsubscribers: list[Callable[[], None]] = []

    def once(state: int) -> None:
        seen.append(state)
        for unsubscribe in unsubscribers:
            unsubscribe()

    unsubscribers.append(health.watch("", once))
    later: list[int] = []
    health.watch("", later.append)
    health.update(True, {})
    health.update(False, {})
    assert seen == [NOT_SERVING, SERVING]
    assert later == [NOT_SERVING, SERVING, NOT_SERVING]


def test_a_draining_server_stays_live_and_never_serves_again() -> None:
    health, seen = Health(), list[int]()
    health.update(True, {"mnist": True})
    health.watch("mnist", seen.append)
    health.drain()
    health.update(True, {"mnist": True, "late": True})
    assert states(health, *SERVER, "mnist", "late") == [NOT_SERVING] * 5
    assert health.check("liveness") == SERVING
    assert seen == [SERVING, NOT_SERVING]


def test_a_model_cannot_replace_the_server_s_services() -> None:
    health = Health()
    health.update(False, {"readiness": True, "liveness": False})
    assert states(health, "readiness", "liveness") == [NOT_SERVING, SERVING]


def test_listeners_added_during_changes_end_with_the_last_state() -> None:
    health = Health()
    seen: list[list[int]] = [[] for _ in range(200)]
    begun = threading.Event()

    def flap() -> None:
        for number in range(2000):
            health.update(number % 2 == 0, {})
            begun.set()
        health.update(True, {})

    flapping = threading.Thread(target=flap)
    flapping.start()
    begun.wait()
    for states_seen in seen:
        health.watch("", states_seen.append)
    flapping.join()
    assert {states_seen[-1] for states_seen in seen} == {SERVING}
    for states_seen in seen:
        assert all(one != next_one for one, next_one in itertools.pairwise(states_seen))
