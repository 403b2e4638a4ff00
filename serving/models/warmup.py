"""Warms up an instance before it serves, and measures which batch size computes rows fastest."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from serving.backends import Backend
from serving.errors import LoadError, TransientLoadError
from serving.inference.outputs import OutputChecker, OutputMismatch, describe_mismatch
from serving.models.spec import ModelSpec
from serving.protocol.tensors import Array, TensorSpec

_LONG_RUN_S = 0.1
"""Other load on the machine changes the time of such a run by little, so that fewer repetitions suffice."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What warm-up measured.

    Args:
        batch_size: the largest batch size whose cost per row is at most 5 % above the cheapest; on CPUs, larger batches
            no longer fit into the caches. The maximum batch size if nothing was measured.
        slowest_s: the time of the slowest batch size; 0 if nothing was measured.
    """

    batch_size: int
    slowest_s: float


def warm_up(backend: Backend, spec: ModelSpec, golden: Mapping[str, Array]) -> Measured:
    """Runs the largest batch size and every power of two below it: the first run of a size is the slow one.

    The largest size runs first, so that memory pools allocate all that they will need at once. Each size runs several
    times: torch compiles on the second run what it saw on the first, and the fastest run is taken as the size's cost.
    Inputs are zeros, or known inputs repeated. Inputs of strings, or with open sizes besides the batch dimension, have
    no safe made-up value: a model that has such inputs and no known ones is not warmed up.

    Args:
        golden: inputs by tensor name: the golden batch, or a sample of the configuration; may be empty.

    Raises:
        TransientLoadError: the model fails.
        LoadError: its outputs differ from the configuration in shape or data type.
    """
    if not all(tensor.name in golden or _has_fixed_size(tensor, spec) for tensor in spec.inputs):
        return Measured(spec.max_batch_size, 0.0)
    row_s: dict[int, float] = {}
    for rows in _batch_sizes(spec.max_batch_size):
        inputs = [_warmup_input(tensor, golden.get(tensor.name), rows) for tensor in spec.inputs]
        row_s[rows or 0] = _fastest_s(backend, spec, inputs, rows) / (rows or 1)
    best = max(rows for rows, seconds in row_s.items() if seconds <= 1.05 * min(row_s.values()))
    return Measured(best, max(seconds * (rows or 1) for rows, seconds in row_s.items()))


def zero_row(spec: ModelSpec) -> list[Array] | None:
    """Returns one row of zeros for each input; None if strings or open sizes leave the value open."""
    if not all(_has_fixed_size(tensor, spec) for tensor in spec.inputs):
        return None
    return [_warmup_input(tensor, None, 1 if spec.max_batch_size else None) for tensor in spec.inputs]


def run_checked(backend: Backend, spec: ModelSpec, inputs: Sequence[Array], rows: int | None) -> list[Array]:
    """Runs one batch and checks shapes and data types of inputs and outputs against the configuration.

    Args:
        rows: None for a model without a batch dimension.

    Raises:
        TransientLoadError: the model fails.
        LoadError: an array differs from the configuration.
    """
    for tensor, array in zip(spec.inputs, inputs, strict=True):
        _check_input(tensor, array, rows)
    try:
        outputs = backend.run(inputs)
        OutputChecker(spec.outputs).check(outputs, rows)
    except OutputMismatch as error:
        raise LoadError(str(error)) from error
    except BaseException as error:  # backends raise errors of any class
        of_rows = "" if rows is None else f" on a batch of {rows} rows"
        raise TransientLoadError(f"the model fails{of_rows}: {str(error).strip().partition(chr(10))[0]}") from error
    return outputs


def _batch_sizes(max_batch_size: int) -> list[int | None]:
    """Largest first; [None] for a model without a batch dimension."""
    if not max_batch_size:
        return [None]
    powers = (2**exponent for exponent in range(max_batch_size.bit_length()))
    return sorted({*powers, max_batch_size}, reverse=True)


def _has_fixed_size(tensor: TensorSpec, spec: ModelSpec) -> bool:
    return tensor.datatype.size > 0 and -1 not in tensor.shape[1 if spec.max_batch_size else 0 :]


def _warmup_input(tensor: TensorSpec, golden: Array | None, rows: int | None) -> Array:
    if golden is None:
        return np.zeros(tensor.shape if rows is None else (rows, *tensor.shape[1:]), tensor.datatype.dtype)
    return golden if rows is None else np.resize(golden, (rows, *golden.shape[1:]))


def _fastest_s(backend: Backend, spec: ModelSpec, inputs: Sequence[Array], rows: int | None) -> float:
    """Seconds of the fastest of five runs, or of three long ones."""
    runs_s: list[float] = []
    while len(runs_s) < 3 or (len(runs_s) < 5 and min(runs_s) < _LONG_RUN_S):
        began = time.perf_counter()
        run_checked(backend, spec, inputs, rows)
        runs_s.append(time.perf_counter() - began)
    return min(runs_s)


def _check_input(tensor: TensorSpec, array: Array, rows: int | None) -> None:
    shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
    expected = TensorSpec(tensor.name, tensor.datatype, shape)
    if array.dtype != tensor.datatype.dtype or not expected.accepts(array.shape):
        raise LoadError(f"the golden input {describe_mismatch(tensor, array, rows)}")
