"""A pool whose system has no more threads."""

import threading
from collections.abc import Callable

import pytest

from convoy.threads import ThreadPool

WAIT_S = 30.0


@pytest.fixture
def no_more_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    return lambda: monkeypatch.setattr(threading.Thread, "start", refuse)


def test_jobs_wait_for_the_threads_that_there_are(no_more_threads: Callable[[], None]) -> None:
    go_on, done = threading.Event(), []
    with ThreadPool(4, "few") as pool:
        first = pool.submit(go_on.wait, WAIT_S)
        no_more_threads()
        others = [pool.submit(done.append, number) for number in range(5)]
        assert done == []
        go_on.set()
        assert first.result(WAIT_S)
        assert [other.result(WAIT_S) for other in others] == [None] * 5
    assert done == [0, 1, 2, 3, 4]


def test_a_pool_without_a_thread_is_an_error_at_once(no_more_threads: Callable[[], None]) -> None:
    no_more_threads()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        ThreadPool(4, "none")
