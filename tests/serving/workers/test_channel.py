"""Calls between two processes over one socket."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest

from serving.errors import Cancelled, Internal, NotFound, Unavailable
from serving.models.changes import Caller, Changes
from serving.workers.channel import Channel
from serving.workers.messages import BEGIN, END, Change
from serving.workers.worker import Group

PATIENCE_S = 30
Pair = Callable[..., tuple[Channel, Channel]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    made: list[Channel] = []

    def pair(handle: Callable[[str, Any], Any], on_close: Callable[[], None] = lambda: None) -> tuple[Channel, Channel]:
        one, other = socket.socketpair()
        made.append(Channel(Connection(one.detach()), lambda name, argument: None, on_close))
        made.append(Channel(Connection(other.detach()), handle))
        for channel in made[-2:]:
            channel.start()
        return made[-2], made[-1]

    yield pair
    for channel in made:
        channel.close()


def test_calls_return_values_and_raise_errors(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    def handle(name: str, argument: Any) -> Any:
        if name == "missing":
            raise NotFound(f"no {argument}")
        if name == "defect":
            raise ZeroDivisionError
        return name, argument

    one, _ = pair(handle)
    assert one.call("echo", [1, {"a": b"x"}]) == ("echo", [1, {"a": b"x"}])
    with pytest.raises(NotFound, match=r"^no model$"):
        one.call("missing", "model")
    with pytest.raises(Internal, match="its log says why"):
        one.call("defect")
    assert "ZeroDivisionError" in caplog.text


def test_a_slow_call_holds_up_no_other(pair: Pair) -> None:
    go_on = threading.Event()
    one, _ = pair(lambda name, argument: go_on.wait(PATIENCE_S) if name == "slow" else argument)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(one.call, "slow")
        assert one.call("quick", 7) == 7
        with pytest.raises(Unavailable, match=r"did not answer within 0\.01 s"):
            one.call("slow", timeout_s=0.01)
        go_on.set()
        assert slow.result(PATIENCE_S) is True


def test_the_end_of_the_other_side_ends_calls(pair: Pair) -> None:
    began, ended = threading.Event(), threading.Event()
    one, other = pair(lambda name, argument: (began.set(), ended.wait(PATIENCE_S)), ended.set)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.call, "wait")
        assert began.wait(PATIENCE_S)
        other.close()
        with pytest.raises(Unavailable):
            waiting.result(PATIENCE_S)
    assert ended.wait(PATIENCE_S)
    with pytest.raises(Unavailable, match="has ended"):
        one.call("echo")
    one.tell("echo")


def test_the_end_of_the_other_side_is_noticed_before_the_caller_has_taken_its_answer(pair: Pair) -> None:
    """A worker would outlive its supervisor."""
    ended = threading.Event()
    one, other = pair(lambda name, argument: None, ended.set)
    answered, unanswered = one._waiting[7], one._waiting[8] = Future[str](), Future[str]()
    other._send(("answer", 7, "value", None))
    other.close()
    assert ended.wait(PATIENCE_S)
    assert answered.result(0) == "value"
    with pytest.raises(Unavailable, match="has ended"):
        unanswered.result(0)


def test_a_caller_who_has_gone_waits_for_no_turn(pair: Pair) -> None:
    asked: list[tuple[str, Any]] = []
    channel, _ = pair(lambda name, argument: asked.append((name, argument)))  # None: another worker has the turn
    caller = Caller(is_cancelled=lambda: len(asked) > 1)
    with pytest.raises(Cancelled, match="of model 'm' was not started"), Group(channel).changing("load", "m", caller):
        raise AssertionError("it has no turn")
    assert asked == [(BEGIN, "m")] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_all_make_a_change_that_its_caller_has_left_once_it_is_made(pair: Pair, fails: bool) -> None:
    asked: list[tuple[str, Any]] = []
    channel, _ = pair(lambda name, argument: asked.append((name, argument)) or True)
    is_made, has_gone = threading.Event(), threading.Event()
    caller = Caller(is_cancelled=has_gone.is_set)
    changes = Changes()

    def change() -> None:
        has_gone.set()
        is_made.wait(PATIENCE_S)
        if fails:
            raise Internal("it does not load")

    with pytest.raises(Cancelled, match="goes on"), Group(channel).changing("load", "m", caller, "{}"):
        changes.call("m", change, caller)
    assert asked == [(BEGIN, "m")]
    is_made.set()
    while changes.is_busy("m"):
        time.sleep(0.001)
    assert asked[1:] == [(END, ("m", Change("load", "m", "{}"), not fails))], "a load may fail in part"
