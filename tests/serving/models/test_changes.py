"""Changes of a model are made one after the other; none holds up another model, nor a caller beyond its deadline."""

import contextlib
import threading
import time

import pytest

from serving.errors import Cancelled, DeadlineExceeded, ResourceExhausted, Unavailable
from serving.models import changes as changes_module
from serving.models.changes import ANYONE, MAX_CHANGES, Caller, Changes, LoadTurn

TIMEOUT_S = 60


@pytest.fixture
def free():
    """Set at the end of a test, for changes that hang until then."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def changes():
    return Changes()


def hang(changes, name, free):
    """Starts a change that hangs until `free` is set."""
    began = threading.Event()
    future = changes.submit(name, lambda: (began.set(), free.wait(TIMEOUT_S)))
    assert began.wait(TIMEOUT_S)
    return future


def soon(seconds):
    return Caller(deadline=time.monotonic() + seconds)


def test_a_change_returns_its_result_or_raises(changes):
    assert changes.call("m", lambda: 7, ANYONE) == 7
    with pytest.raises(TimeoutError, match="of the disk"):
        changes.call("m", lambda: (_ for _ in ()).throw(TimeoutError("of the disk")), ANYONE)
    assert changes.call("m", lambda: 8, soon(TIMEOUT_S)) == 8


def test_changes_of_a_model_are_made_in_order(changes):
    order = []
    futures = [changes.submit("m", lambda n=n: (time.sleep(0.001), order.append(n))) for n in range(50)]
    for future in futures:
        future.result(TIMEOUT_S)
    assert order == list(range(50))


def test_a_change_that_hangs_holds_up_its_own_model_only(changes, free):
    hang(changes, "m", free)
    assert changes.call("other", lambda: 7, soon(TIMEOUT_S)) == 7
    assert (changes.is_busy("m"), changes.is_busy("other")) == (True, False)
    made = []
    with pytest.raises(DeadlineExceeded, match="the change of model 'm' waits for another change and is not made"):
        changes.call("m", lambda: made.append(1), soon(0.05))
    free.set()
    changes.submit("m", lambda: None).result(TIMEOUT_S)
    assert made == [], "nobody waits for it any more"


def test_a_caller_leaves_a_change_that_has_started(changes, free):
    with pytest.raises(DeadlineExceeded, match="goes on; the index will show its result"):
        changes.call("m", lambda: free.wait(TIMEOUT_S), soon(1))


def test_a_caller_without_a_deadline_does_not_wait_for_ever(changes, free, monkeypatch):
    monkeypatch.setattr(changes_module, "_MAX_WAIT_S", 1.0)
    with pytest.raises(Unavailable, match="goes on; the index will show its result"):
        changes.call("m", lambda: free.wait(TIMEOUT_S), ANYONE)


@pytest.mark.parametrize(
    ("caller", "error"),
    [(Caller(is_cancelled=lambda: True), Cancelled), (Caller(deadline=0.0), DeadlineExceeded)],
)
def test_a_change_whose_caller_has_gone_is_not_started(changes, caller, error):
    made = []
    with pytest.raises(error):
        changes.call("m", lambda: made.append(1), caller)
    changes.submit("m", lambda: None).result(TIMEOUT_S)
    assert made == []


def test_changes_of_callers_are_bounded(changes, free):
    threads = [
        threading.Thread(target=lambda n=n: changes.call(f"m{n}", lambda: free.wait(TIMEOUT_S), ANYONE))
        for n in range(MAX_CHANGES)
    ]
    for thread in threads:
        thread.start()
    while not all(changes.is_busy(f"m{n}") for n in range(MAX_CHANGES)):
        time.sleep(0.001)
    with pytest.raises(ResourceExhausted, match="16 loads and unloads run or wait already: retry later") as caught:
        changes.call("more", lambda: None, ANYONE)
    assert caught.value.retry_after_ms == 1000
    free.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert changes.call("more", lambda: 7, ANYONE) == 7


def test_callers_who_left_take_no_room(changes, free):
    hang(changes, "m", free)
    for _ in range(2 * MAX_CHANGES):
        with pytest.raises(DeadlineExceeded):
            changes.call("m", lambda: None, soon(0.001))
    assert len(changes._queues["m"]) == 0
    assert changes.call("other", lambda: 7, ANYONE) == 7


def test_callers_who_hang_up_take_no_room(changes, free):
    hang(changes, "m", free)
    has_gone = threading.Event()
    errors = []

    def call():
        with pytest.raises(Cancelled, match="'m' waits for another change and is not made") as caught:
            changes.call("m", lambda: None, Caller(is_cancelled=has_gone.is_set))
        errors.append(caught.value)

    threads = [threading.Thread(target=call) for _ in range(MAX_CHANGES)]
    for thread in threads:
        thread.start()
    while len(changes._queues["m"]) < MAX_CHANGES:
        time.sleep(0.001)
    has_gone.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert len(errors) == MAX_CHANGES
    assert changes.call("other", lambda: 7, ANYONE) == 7


def test_one_model_loads_at_a_time():
    turn, inside, most = LoadTurn(), [], []

    def load(n):
        with turn.take(f"m{n}"):
            inside.append(n)
            most.append(len(inside))
            time.sleep(0.002)
            inside.remove(n)

    threads = [threading.Thread(target=load, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert most == [1] * 20


def most_at_once(turn, sizes):
    """Returns how many loads had their turn at once."""
    inside, most, together = [], [], threading.Barrier(2, timeout=60)

    def load(size):
        with turn.take("m", size):
            inside.append(size)
            most.append(len(inside))
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(0.05)
            inside.remove(size)

    threads = [threading.Thread(target=load, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    return max(most)


def test_a_few_load_at_once():
    assert most_at_once(LoadTurn(num_loads=2), [0] * 8) == 2


def test_those_that_do_not_fit_into_memory_take_turns():
    assert most_at_once(LoadTurn(num_loads=4, free_bytes=lambda: 100), [60] * 4) == 1
    assert most_at_once(LoadTurn(num_loads=4, free_bytes=lambda: 100), [50] * 4) == 2
    assert most_at_once(LoadTurn(num_loads=4, free_bytes=lambda: 0), [60] * 2) == 1, "one at a time always may"


def test_the_turn_passes_on_from_a_load_that_hangs(free, caplog):
    turn = LoadTurn(patience_s=0.1)
    holds = threading.Event()

    def load():
        with turn.take("m version 1"):
            holds.set()
            free.wait(TIMEOUT_S)

    hanging = threading.Thread(target=load)
    hanging.start()
    assert holds.wait(TIMEOUT_S)
    with turn.take("other"):
        assert "m version 1 is still loading after 0.1 s: others wait no longer" in caplog.text
        free.set()
        hanging.join(TIMEOUT_S)
        assert len(turn._loads) == 1, "the end of the load that hung does not end the turn of the other"
    assert not turn._loads


def test_a_process_without_threads_refuses_changes_and_recovers(changes, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    for _ in range(2 * MAX_CHANGES):
        with pytest.raises(Unavailable, match="the change of model 'm' was not started: can't start new thread"):
            changes.call("m", lambda: 7, ANYONE)
    monkeypatch.undo()
    assert changes.call("m", lambda: 7, ANYONE) == 7
