"""A signal ends the run, or is a wish; a process that cannot hear it ends all the same."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer import signals
from trainer.errors import Interrupted
from trainer.signals import StopRequest


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def interrupted(work: Callable[[StopRequest], None]) -> Interrupted:
    """What ends the work."""
    with pytest.raises(Interrupted) as raised, StopRequest() as stop:
        work(stop)
    return raised.value


def test_a_signal_ends_the_run_at_once_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    error = interrupted(lambda stop: send(signal.SIGTERM))
    assert (str(error), error.signal_number) == ("SIGTERM: stopped", signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_deferred_a_signal_is_a_wish_until_the_end() -> None:
    heard = []

    def work(stop: StopRequest) -> None:
        with stop.deferred():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):  # as torchrun passes on a Ctrl-C
                send(number)
                heard.append(stop.number)

    assert interrupted(work).signal_number == signal.SIGINT
    assert heard == [signal.SIGINT] * 3


def test_a_second_signal_does_not_wait_for_the_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "AGAIN_AFTER_S", 0.0)

    def work(stop: StopRequest) -> None:
        with stop.deferred():
            send(signal.SIGINT)
            time.sleep(0.01)
            send(signal.SIGTERM)
            pytest.fail("the second signal was not heard")

    assert interrupted(work).signal_number == signal.SIGTERM


def test_who_is_leaving_already_is_not_disturbed() -> None:
    def work(stop: StopRequest) -> None:
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGINT)
            left.append("in order")

    left: list[str] = []
    assert interrupted(work).signal_number == signal.SIGTERM
    assert left == ["in order"]


def test_who_asks_for_the_end_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "AGAIN_AFTER_S", 0.0)

    def work(stop: StopRequest) -> None:
        with stop.deferred():
            stop.ask(signal.SIGPIPE, "SIGPIPE")
            assert stop.number == signal.SIGPIPE
            stop.ask(signal.SIGPIPE, "SIGPIPE")

    assert interrupted(work).signal_number == signal.SIGPIPE


# Locking a mutex twice waits in C for ever, as a collective does whose peer is gone: Python's handler never runs.
HANGS = """
import ctypes, trainer.signals
trainer.signals.STUCK_AFTER_S = 0.3
with trainer.signals.StopRequest():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    print(hex(ctypes.addressof(mutex)), flush=True)
    libc.pthread_mutex_lock(mutex)
"""


def test_a_process_that_hangs_in_a_call_is_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            mutex = process.stdout.readline().strip()
            # A signal that comes before the call has begun would be heard by Python's handler. The kernel tells which
            # system call the main thread waits in, and its first argument is the lock.
            while mutex not in Path(f"/proc/{process.pid}/syscall").read_text().split():
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 128 + signal.SIGTERM
        finally:
            process.kill()


# Python's handler runs here, and the wait begins again, as in a sum whose peer has stopped.
WAITS = """
import socket, trainer.signals
trainer.signals.STUCK_AFTER_S = 0.3
ours, theirs = socket.socketpair()
with trainer.signals.StopRequest() as stop, stop.deferred():
    GRANT
    print("waits", flush=True)
    while True:
        ours.settimeout(2)
        try:
            ours.recv(1)
        except TimeoutError:
            print("granted" if stop.number else "no signal", flush=True)
            break
"""


@pytest.mark.parametrize(("grant", "said"), [("", ""), ("stop.grant()", "granted\n")])
def test_who_has_heard_the_wish_and_does_not_grant_it_is_ended(grant: str, said: str) -> None:
    command = [sys.executable, "-c", WAITS.replace("GRANT", grant)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == said
            assert process.wait(timeout=60) == (1 if said else 128 + signal.SIGTERM)
        finally:
            process.kill()
