"""Measures the load of the run's store with processes that only send heartbeats.

    python benchmarks/heartbeats.py --ranks 8 16 32 64

The store is in this process, as it is in torchrun; each rank is a process with a watchdog and nothing else. Prints, for
each number of ranks, the calls to the store and the bytes of their values per second, over all ranks, and the processor
time of the store, of rank 0, which is the monitor, and of the other ranks. See docs/decisions/0015-heartbeats.md.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

import trainer.ranks.watchdog
from trainer.ranks.activity import Activity
from trainer.ranks.failure import FailureContext
from trainer.ranks.rendezvous import rendezvous
from trainer.ranks.watchdog import Watchdog

COUNTED = ("set", "get", "multi_get", "check")


class CountingStore:
    """A connection to the store that counts calls and the bytes of their values."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.num_calls = 0
        self.num_bytes = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in COUNTED:
            return method

        def counted(*arguments: Any) -> Any:
            result = method(*arguments)
            self.num_calls += 1
            values = arguments[1:] if name == "set" else result if name == "multi_get" else [result]
            self.num_bytes += sum(len(value) for value in values if not isinstance(value, bool))
            return result

        return counted


def send_heartbeats(rank: int, size: int, seconds: float, pipe: Connection) -> None:
    """Runs one rank, and sends its calls, bytes and processor seconds per second through the pipe."""
    trainer.ranks.watchdog.LAUNCHER_PID = os.getppid()  # a fork has imported it before
    store = dist.TCPStore("127.0.0.1", pipe.recv(), is_master=False, wait_for_workers=False)
    counting = CountingStore(store.clone())
    name = rendezvous(store, rank, size)
    watchdog = Watchdog(FailureContext(rank=rank, world_size=size), Activity())
    watchdog.watch_peers(counting, name)
    watchdog.watch_launcher()  # starts the failure detector
    pipe.send("ready")
    pipe.recv()
    began = time.monotonic(), counting.num_calls, counting.num_bytes, time.process_time()
    time.sleep(seconds)
    ended = time.monotonic(), counting.num_calls, counting.num_bytes, time.process_time()
    elapsed, *counts = (after - before for before, after in zip(began, ended, strict=True))
    pipe.send([count / elapsed for count in counts])
    pipe.recv()
    watchdog.stop()


def measure(size: int, seconds: float) -> str:
    """Returns a row of the table for so many ranks."""
    context = multiprocessing.get_context("fork")  # before this process has the store's threads
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=send_heartbeats, args=(rank, size, seconds, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for pipe in pipes:
        pipe.send(store.port)
    for pipe in pipes:
        pipe.recv()
    began = time.monotonic(), time.process_time()
    for pipe in pipes:
        pipe.send("go")
    calls, num_bytes, cpu = zip(*(pipe.recv() for pipe in pipes), strict=True)
    store_cpu = (time.process_time() - began[1]) / (time.monotonic() - began[0])
    for pipe in pipes:
        pipe.send("end")
    for process in processes:
        process.join()
    return (
        f"| {size} | {sum(calls):,.0f} | {sum(calls) / size:.1f} | {sum(num_bytes) / 1e3:,.0f} kB "
        f"| {100 * store_cpu:.1f} % | {100 * cpu[0]:.2f} % | {100 * statistics.median(cpu):.2f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    print("| ranks | calls/s | calls/s per rank | bytes/s | CPU of the store | of rank 0 | of a rank (median) |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.ranks:
        print(measure(size, arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
