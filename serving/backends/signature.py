"""Checks the tensors that a configuration declares against those of the model."""

from collections.abc import Iterable, Sequence

from serving.errors import LoadError
from serving.protocol.tensors import Datatype, Shape, TensorSpec

ModelTensor = tuple[str, Datatype, Shape | None]
"""Name, data type and shape of a tensor in a model file: -1 for an open size, None for an unknown rank."""


def check_inputs(declared: Sequence[TensorSpec], actual: Sequence[ModelTensor]) -> None:
    """Checks that the declared inputs are exactly those of the model.

    Raises:
        LoadError: the first difference.
    """
    _check_tensors("input", declared, actual)
    if missing := {name for name, _, _ in actual} - {spec.name for spec in declared}:
        raise LoadError(f"the model has input {_quoted(missing)}, which the configuration does not list")


def check_outputs(declared: Sequence[TensorSpec], actual: Sequence[ModelTensor]) -> None:
    """Checks that each declared output is one of the model's, which may have more.

    Raises:
        LoadError: the first difference.
    """
    _check_tensors("output", declared, actual)


def _check_tensors(side: str, declared: Sequence[TensorSpec], actual: Sequence[ModelTensor]) -> None:
    by_name = {name: (datatype, shape) for name, datatype, shape in actual}
    for spec in declared:
        if spec.name not in by_name:
            raise LoadError(f"the configuration has {side} '{spec.name}', but the model has {_quoted(by_name)}")
        datatype, shape = by_name[spec.name]
        if datatype is not spec.datatype:
            raise LoadError(
                f"{side} '{spec.name}' is {spec.datatype.name} in the configuration and {datatype.name} in the model"
            )
        if shape is not None and not _accepts(spec.shape, shape):
            raise LoadError(
                f"{side} '{spec.name}' has shape {list(spec.shape)} in the configuration (with the batch dimension) "
                f"and {list(shape)} in the model"
            )


def _accepts(declared: Shape, actual: Shape) -> bool:
    """Returns whether the model accepts every shape that the configuration allows."""
    return len(declared) == len(actual) and all(have in (-1, want) for want, have in zip(declared, actual, strict=True))


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "none"
