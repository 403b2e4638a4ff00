"""The backends that run models. Only the modules of this folder import torch or onnxruntime."""

from collections.abc import Sequence
from typing import Protocol

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
