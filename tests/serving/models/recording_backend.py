"""A backend of one numpy function, for tests of warm-up and golden check."""

from collections.abc import Callable, Sequence

from google.protobuf import text_format

from protos.model_config_pb2 import ModelConfig
from serving.models.spec import ModelSpec, to_spec
from serving.protocol.tensors import Array


class RecordingBackend:
    """A backend that runs a function and records the shapes of its first input."""

    def __init__(self, spec: ModelSpec, function: Callable[..., Sequence[Array]]) -> None:
        self.uses_gpu = False
        self.inputs, self.outputs = spec.inputs, spec.outputs
        self.shapes: list[tuple[int, ...]] = []
        self._function = function

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        self.shapes.append(inputs[0].shape)
        return list(self._function(*inputs))

    def close(self) -> None:
        pass


def make_spec(max_batch_size: int = 6, dims: str = "[ 2 ]", kind: str = "TYPE_FP32") -> ModelSpec:
    """One input `x` of the given type and one output `y` of FP32, of the same shape."""
    text = f"""max_batch_size: {max_batch_size}
    input {{ name: "x" data_type: {kind} dims: {dims} }} output {{ name: "y" data_type: TYPE_FP32 dims: {dims} }}"""
    return to_spec(text_format.Parse(text, ModelConfig()))


def double(x: Array) -> list[Array]:
    return [2 * x]
