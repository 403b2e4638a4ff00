"""`--compile`: the network of the training step, with its forward and backward passes compiled by torch.compile.

Validation, evaluation and export use the network as it is.
"""

import time
import warnings
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.ranks.activity import Activity


class CompiledNetwork(nn.Module):
    """A network that is compiled for shards of some sizes, and eager for others.

    Each size is compiled by itself, which an epoch's last, smaller batch is not worth. The size alone decides, so that
    the number of ranks does not.

    Args:
        network: maps pixels to logits.
        sizes: images of the shards to compile for.
        log: prints one line for the user.

    Raises:
        ConfigError: this machine lacks what torch.compile needs.
    """

    def __init__(
        self,
        network: nn.Module,
        sizes: Collection[int],
        *,
        device: torch.device,
        activity: Activity,
        log: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.network = network
        with _without_warnings():
            check_compiler(device)
            self._compiled = torch.compile(network.forward, dynamic=False, options=_options())
        self._sizes = frozenset(size for size in sizes if size > 1)  # norms treat a single image in a way of their own
        self._known: set[tuple[int, Hashable]] = set()
        self._activity = activity
        self._log = log

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns logits, float `[B, classes]`, of pixels `[B, C, H, W]`."""
        forward = self._compiled if len(pixels) in self._sizes else self.network
        logits: torch.Tensor = forward(pixels)
        return logits

    def step(self, sizes: Collection[int], kind: Hashable) -> AbstractContextManager[None]:
        """Context of a step: tells the user what compiling costs, where it compiles.

        Args:
            sizes: images of its shards.
            kind: of the step; the passes of each kind are compiled by themselves.

        Raises:
            ConfigError: compiling fails.
        """
        new = {(size, kind) for size in self._sizes.intersection(sizes)} - self._known
        self._known |= new
        return self._compiling([size for size, _ in new]) if new else nullcontext()

    @contextmanager
    def _compiling(self, sizes: Collection[int]) -> Iterator[None]:
        began = time.perf_counter()
        try:
            with self._activity.slow_phase(), _without_warnings():  # others compile, and this process is idle
                yield
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigError(f"--compile: torch.compile fails: {reason.strip()}; leave --compile out") from error
        images = " and ".join(map(str, sorted(sizes)))
        self._log(f"--compile: compiling took {time.perf_counter() - began:.1f} s, for {images} images at a time")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Context without the warnings of torch.compile that no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.11's compiler imports what torch has deprecated
        warnings.filterwarnings("ignore", message="TensorFloat32")  # advice, and `--precision tf32` is a choice
        yield


def check_compiler(device: torch.device) -> None:
    """Checks that torch.compile can make kernels for the device.

    Raises:
        ConfigError: it needs a compiler that is not installed.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError(
                "--compile: on a GPU torch.compile needs Triton, and it is not installed: pip install triton, or leave "
                "--compile out"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError(
            "--compile: on a CPU torch.compile needs a C++ compiler, and there is none: install g++, or leave "
            "--compile out"
        ) from None


def _options() -> dict[str, Any]:
    """Returns inductor's options: kernels that are not chosen by timing, so that a resumed run computes the same."""
    import torch._inductor.config as inductor

    return {"deterministic": True} if hasattr(inductor, "deterministic") else {}
