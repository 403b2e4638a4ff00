"""What computes a model. Only the modules beside this one import torch or onnxruntime."""

from collections.abc import Sequence
from typing import Protocol

from serving.protocol.tensors import Array, TensorSpec


class Backend(Protocol):
    """One instance of one model version on one device; used by one thread at a time."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Compute all outputs, in the order of `outputs`, of all inputs, in the order of `inputs`.

        The arrays may be read-only. The outputs are C-contiguous and the caller's to keep. Blocks, without the GIL.
        """

    def close(self) -> None:
        """Free what it holds; it is not used afterwards."""
