"""The backends that run models. Only the modules of this folder import torch or onnxruntime.

`serving.backends.registry` finds them. docs/model-configuration.md describes how another package adds one.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from serving.protocol.tensors import Array, TensorSpec


class Backend(Protocol):
    """One instance of one model version on one device. Not thread-safe.

    Attributes:
        uses_gpu: whether `run` waits for a GPU, which would idle while the same thread does something else.
    """

    uses_gpu: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Runs the model. Blocks, without holding the GIL.

        Args:
            inputs: in the order of `self.inputs`; may be read-only.

        Returns:
            The outputs in the order of `self.outputs`, C-contiguous; the caller may keep them.
        """

    def close(self) -> None:
        """Frees the model. The instance must not be used afterwards."""


class BackendInstance:
    """A `Backend` made of what a backend's `load` returns, which needs the method `run` alone.

    Args:
        opened: what `load` has returned.
        inputs, outputs: as the configuration lists them.
    """

    def __init__(
        self, opened: Any, *, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], uses_gpu: bool
    ) -> None:
        self.opened = opened
        self.uses_gpu = uses_gpu
        self.inputs = inputs
        self.outputs = outputs
        self.run: Callable[[Sequence[Array]], list[Array]] = opened.run
        self._close: Callable[[], None] = getattr(opened, "close", lambda: None)

    def close(self) -> None:
        self._close()
