"""A signal ends the run at once or at the end of a step, even if the process is stuck."""

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
from trainer.signals import StopRequest, handled_signals


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def interrupted(work: Callable[[StopRequest], None]) -> Interrupted:
    """Returns the exception that ends the work."""
    with pytest.raises(Interrupted) as raised, StopRequest() as stop:
        work(stop)
    return raised.value


def test_a_signal_ends_the_run_at_once_and_the_old_handler_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    error = interrupted(lambda stop: send(signal.SIGTERM))
    assert (str(error), error.signal_number) == ("SIGTERM: stopped", signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_a_closed_terminal_and_schedulers_end_the_run_as_sigterm_does(number: signal.Signals) -> None:
    def work(stop: StopRequest) -> None:
        with stop.deferred():
            send(number)
            assert stop.signal_number == number

    error = interrupted(work)
    assert (str(error), error.signal_number) == (f"{number.name}: stopped", number)
    assert signal.getsignal(number) is signal.SIG_DFL


def test_nohup_keeps_the_run_from_ending_with_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            send(signal.SIGHUP)
            assert stop.signal_number is None
        assert signal.SIGHUP not in handled_signals()
        assert signal.SIGTERM in handled_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_deferred_signal_raises_at_the_end() -> None:
    numbers = []

    def work(stop: StopRequest) -> None:
        with stop.deferred():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):  # torchrun forwards Ctrl-C
                send(number)
                numbers.append(stop.signal_number)

    assert interrupted(work).signal_number == signal.SIGINT
    assert numbers == [signal.SIGINT] * 3


def test_a_second_signal_raises_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_WITHIN_S", 0.0)

    def work(stop: StopRequest) -> None:
        with stop.deferred():
            send(signal.SIGINT)
            time.sleep(0.01)
            send(signal.SIGTERM)
            pytest.fail("the second signal was ignored")

    assert interrupted(work).signal_number == signal.SIGTERM


def test_a_second_signal_does_not_interrupt_the_cleanup() -> None:
    def work(stop: StopRequest) -> None:
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGINT)
            cleaned_up.append("completely")

    cleaned_up: list[str] = []
    assert interrupted(work).signal_number == signal.SIGTERM
    assert cleaned_up == ["completely"]


def test_a_signal_after_the_acknowledgement_prints_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    """torchrun sends SIGTERM to the ranks that still save when the first one has exited after Ctrl-C."""

    def work(stop: StopRequest) -> None:
        with stop.deferred():
            send(signal.SIGINT)
            stop.acknowledge()
            time.sleep(0.3)  # until the watch has noticed it
            send(signal.SIGTERM)

    assert interrupted(work).signal_number == signal.SIGINT
    assert capfd.readouterr().err == ""


def test_a_request_to_stop_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_WITHIN_S", 0.0)

    def work(stop: StopRequest) -> None:
        with stop.deferred():
            stop.request(signal.SIGPIPE, "SIGPIPE")
            assert stop.signal_number == signal.SIGPIPE
            stop.request(signal.SIGPIPE, "SIGPIPE")

    assert interrupted(work).signal_number == signal.SIGPIPE


# Locking a mutex twice waits in C for ever, like a collective without its peer: Python's handler never runs.
HANGS = """
import ctypes, trainer.signals
trainer.signals.GRACE_PERIOD_S = 0.3
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
            # Before the call, Python's handler would run. The kernel shows the system call in which the main thread
            # waits, and its first argument, the mutex.
            while mutex not in Path(f"/proc/{process.pid}/syscall").read_text().split():
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 128 + signal.SIGTERM
        finally:
            process.kill()


# Python's handler runs here, and the wait begins again, like a sum whose peer has stopped.
WAITS = """
import socket, trainer.signals
trainer.signals.GRACE_PERIOD_S = 0.3
ours, theirs = socket.socketpair()
with trainer.signals.StopRequest() as stop, stop.deferred():
    ACKNOWLEDGE
    print("waits", flush=True)
    while True:
        ours.settimeout(2)
        try:
            ours.recv(1)
        except TimeoutError:
            print("acknowledged" if stop.signal_number else "no signal", flush=True)
            break
"""


@pytest.mark.parametrize(("acknowledge", "output"), [("", ""), ("stop.acknowledge()", "acknowledged\n")])
def test_a_process_that_does_not_acknowledge_a_signal_is_ended(acknowledge: str, output: str) -> None:
    command = [sys.executable, "-c", WAITS.replace("ACKNOWLEDGE", acknowledge)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == output
            assert process.wait(timeout=60) == (1 if output else 128 + signal.SIGTERM)
        finally:
            process.kill()
