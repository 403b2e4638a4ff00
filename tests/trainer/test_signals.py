"""A signal is a wish; a process that cannot hear it ends all the same."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from trainer.signals import StopRequest


def test_a_signal_is_noted_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.number is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


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
