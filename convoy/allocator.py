"""What Convoy asks of glibc's `malloc`. Each function does nothing if the C library is not glibc."""

import contextlib
import ctypes
import os

from convoy.cpus import num_available_cpus

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # <malloc.h>, the same on every glibc


def keep_freed_memory() -> None:
    """Makes glibc reuse the memory of freed tensors instead of returning it to the kernel.

    By default every activation of more than a few hundred kB is a fresh `mmap`: 3,520 page faults per step for the
    lecture's net at batch size 100, and half of its time. So malloc maps nothing and never trims the top of the heap.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Returns freed memory to the system, from the middle of glibc's heaps too.

    Blocks that other models and requests hold lie between those of a closed model, so that a server whose models are
    replaced for days would grow. Takes some milliseconds.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def limit_arenas() -> None:
    """Gives all threads together two heaps for each CPU, unless the environment says how many. Call it at the start.

    By default glibc makes up to eight heaps for each CPU, and spreads new threads over them. Each change of a model
    starts threads, and in a soak test these heaps grew; benchmarks/results has how much less with two.
    """
    if "MALLOC_ARENA_MAX" in os.environ or "glibc.malloc.arena_max" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, 2 * num_available_cpus())
