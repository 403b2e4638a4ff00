"""A process that compiles kernels for others: it reads descriptions, and leaves what it made in Triton's cache.

It imports Triton, and no torch. `Compiler` is its handle in the process that asks.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import astuple, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True)
class Description:
    """A kernel for certain types and constants.

    Args:
        module: where its function is.
        specialization: Triton's own description, as JSON.
        capability: of the GPU, such as 90.
    """

    module: str
    name: str
    specialization: str
    capability: int


class Compiler:
    """A process that compiles kernels, one at a time."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import main; main()"],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the process that asks, which ends this one
            text=True,
        )

    def compile(self, description: Description) -> None:
        """Returns when the kernel is compiled, or cannot be.

        Raises:
            OSError: the process is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(astuple(description))}\n")
        self._process.stdin.flush()
        self._process.stdout.readline()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        with suppress(OSError):  # for what could not be written
            self._process.communicate()


class _Gpu:
    """The GPU of another process, as Triton's driver."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped, unused-ignore]

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0


def main() -> None:
    """Compiles the kernels that are described on the input, and answers each with a line."""
    from triton.runtime import driver  # type: ignore[import-untyped, unused-ignore]

    for line in sys.stdin:
        module, name, specialization, capability = json.loads(line)
        with suppress(Exception):  # the process that asks compiles it again, and tells
            driver.set_active(_Gpu(capability))
            kernel = getattr(import_module(module), name).preload(specialization)
            _make_launcher(kernel)
        print(flush=True)


def _make_launcher(kernel: Any) -> None:
    """Makes what starts a kernel, which takes Triton up to 3.6 a C compiler."""
    from triton.backends.nvidia.driver import CudaLauncher  # type: ignore[import-untyped, unused-ignore]

    CudaLauncher(kernel.src, kernel.metadata)
