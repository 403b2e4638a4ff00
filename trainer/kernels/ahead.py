"""Compiles kernels before the first step asks for them: several at a time, while the process goes on.

Triton compiles a kernel when it is first started, and the next one when that is done. Here threads do. Most of the time
goes to MLIR, to LLVM, to ptxas and to the C compiler that makes a kernel's launcher, which leave Python's lock to other
threads; but a third is Python. So where Triton's cache is empty, each thread has a process that compiles for it.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from trainer.kernels.compiler import Compiler, Description
from trainer.kernels.launch import Start, started_by


class Compilation:
    """The kernels that a rehearsal would have started, compiled and loaded in the background.

    An error ends nothing: the step that starts the kernel compiles it again, and tells.

    Args:
        device: the GPU for which the kernels are.
        num_threads: kernels that are compiled at a time.
        has_processes: each thread has a process of its own. They start at once, so that they are ready in time.
    """

    def __init__(self, device: torch.device, num_threads: int, *, has_processes: bool = False) -> None:
        self._device = device
        self._compilers = _Compilers(device, num_threads)
        self._num_processes = num_threads if has_processes else 0
        self._starts: SimpleQueue[Start | None] = SimpleQueue()
        self._thread = Thread(target=self._compile, name="compile-kernels", daemon=True)
        self._thread.start()

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Context, once, in which `launch` hands kernels to the compilers instead of starting them."""
        try:
            with started_by(self._starts.put):
                yield
        finally:
            self._starts.put(None)

    def wait(self) -> None:
        """Returns when the kernels are compiled."""
        self._thread.join()

    def close(self) -> None:
        """Ends the threads and processes. Kernels whose compilation has not begun are left out."""
        self._compilers.is_over = True
        self._starts.put(None)
        self.wait()

    def _compile(self) -> None:
        with suppress(Exception), self._compilers:
            self._compilers.start_processes(self._num_processes)
            from triton import AsyncCompileMode, knobs  # type: ignore[import-untyped, unused-ignore]

            _use(self._device)
            # Within the mode, Triton hands each variant to the compilers once; at its end it knows them in all threads.
            with AsyncCompileMode(self._compilers, ignore_errors=True):
                for kernel, grid, arguments, constants in iter(self._starts.get, None):
                    knobs.runtime.jit_cache_hook = self._compilers.describe
                    try:
                        kernel.warmup(*arguments, grid=grid, **constants)
                    finally:
                        knobs.runtime.jit_cache_hook = None
        self._compilers.end_processes()


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels, make their launchers, and load them."""

    def __init__(self, device: torch.device, num_threads: int) -> None:
        super().__init__(num_threads, "compile-kernel", initializer=_use, initargs=(device,))
        self.is_over = False
        """Nothing new is compiled. (Triton would wait for ever for a future that is cancelled by a shutdown.)"""
        self._processes: list[Compiler] = []
        self._idle: SimpleQueue[Compiler] = SimpleQueue()
        self._description: Description | None = None

    def start_processes(self, number: int) -> None:
        with suppress(OSError):  # there may be too many
            for _ in range(number):
                process = Compiler()
                self._processes.append(process)
                self._idle.put(process)

    def end_processes(self) -> None:
        for process in self._processes:
            process.close()
        self._processes.clear()

    def describe(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> None:
        """Hook of Triton's: keeps the description of the kernel that it submits next."""
        from triton.runtime import driver  # type: ignore[import-untyped, unused-ignore]

        capability = driver.active.get_current_target().arch
        self._description = Description(fn.module, fn.name, compile["specialization_data"], capability)

    def submit(self, compile_kernel: Callable[[], Any], *_: Any) -> Future[Any]:  # type: ignore[override]
        """Takes what Triton hands over: a function that returns the compiled kernel, from its cache if it is there."""
        description = self._description

        def work() -> Any:
            if self.is_over:
                raise CancelledError
            if self._processes and description is not None:
                self._compile_elsewhere(description)
            kernel = compile_kernel()
            _ = kernel.run  # asking for it makes and loads what starts the kernel
            return kernel

        return super().submit(work)

    def _compile_elsewhere(self, description: Description) -> None:
        process = self._idle.get()
        try:
            with suppress(OSError):
                process.compile(description)
        finally:
            self._idle.put(process)


def is_cache_empty() -> bool:
    """Returns whether Triton has compiled nothing on this machine yet."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    path = Path(folder) if folder else Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"
    try:
        return not any(path.iterdir())
    except OSError:
        return True


def _use(device: torch.device) -> None:
    """Makes a GPU the current one of this thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
