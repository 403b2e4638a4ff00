"""Compiles kernels before the first step asks for them: several at a time, in threads, while the process goes on.

Triton compiles a kernel when it is first started, and the next one when that is done. Most of the time goes to MLIR,
to LLVM, to ptxas and to the C compiler that makes a kernel's launcher: they leave Python's lock to other threads.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from trainer.kernels.launch import Start, started_by


class Compilation:
    """The kernels that a rehearsal would have started, compiled and loaded in the background.

    An error ends nothing: the step that starts the kernel compiles it again, and tells.

    Args:
        device: the GPU for which the kernels are.
        num_threads: kernels that are compiled at a time.
    """

    def __init__(self, device: torch.device, num_threads: int) -> None:
        self._device = device
        self._compilers = _Compilers(device, num_threads)
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
        """Ends the threads. Kernels whose compilation has not begun are left out."""
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._starts.put(None)
        self.wait()

    def _compile(self) -> None:
        with suppress(Exception), self._compilers:
            from triton import AsyncCompileMode  # type: ignore[import-untyped, unused-ignore]

            _use(self._device)
            # Within the mode, Triton hands each variant to the compilers once; at its end it knows them in all threads.
            with AsyncCompileMode(self._compilers, ignore_errors=True):
                for kernel, grid, arguments, constants in iter(self._starts.get, None):
                    kernel.warmup(*arguments, grid=grid, **constants)


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels, make their launchers, and load them."""

    def __init__(self, device: torch.device, num_threads: int) -> None:
        super().__init__(num_threads, "compile-kernel", initializer=_use, initargs=(device,))

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:  # type: ignore[override] # as Triton calls it
        def work() -> Any:
            kernel = compile_kernel()
            _ = kernel.run  # asking for it makes and loads what starts the kernel
            return kernel

        return super().submit(work)


def _use(device: torch.device) -> None:
    """Makes a GPU the current one of this thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
