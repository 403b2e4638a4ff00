"""The golden batch, `golden.npz`: inputs and outputs that the trainer recorded at export, to check a loaded model.

It is optional: a model repository made for Triton has none.
"""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from serving.backends import Backend
from serving.errors import LoadError, TransientLoadError
from serving.models.files import describe, is_file
from serving.models.spec import ModelSpec
from serving.models.warmup import run_checked
from serving.protocol.tensors import Array

GOLDEN_FILE = "golden.npz"


def read_golden(folder: Path) -> dict[str, Array]:
    """Returns the golden inputs and outputs by tensor name; empty if there is no golden batch.

    Raises:
        TransientLoadError: the file cannot be read.
        LoadError: its content is damaged.
    """
    try:
        if not is_file(folder / GOLDEN_FILE):
            return {}
        with (folder / GOLDEN_FILE).open("rb") as file:
            if not zipfile.is_zipfile(file):  # NumPy would advise to trust it
                raise LoadError(f"{GOLDEN_FILE} cannot be read: it is no .npz file")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
    except OSError as error:
        raise TransientLoadError(f"{GOLDEN_FILE} cannot be read: {describe(error)}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise LoadError(f"{GOLDEN_FILE} cannot be read: {error}") from error


def check_golden(backend: Backend, spec: ModelSpec, golden: Mapping[str, Array], tolerance: float) -> None:
    """Runs the golden inputs and compares the outputs with the recorded ones.

    Args:
        golden: inputs and expected outputs by tensor name; empty for no check. Outputs may be missing, but not all.
        tolerance: largest absolute difference allowed between two numbers.

    Raises:
        LoadError: a difference is larger, or the golden batch does not fit the model.
    """
    if not golden:
        return
    if missing := [tensor.name for tensor in spec.inputs if tensor.name not in golden]:
        raise LoadError(f"the golden batch has no input '{missing[0]}'")
    expected = {index: golden[tensor.name] for index, tensor in enumerate(spec.outputs) if tensor.name in golden}
    if not expected:
        raise LoadError(f"the golden batch has none of the outputs {[tensor.name for tensor in spec.outputs]}")
    for rows, part in _parts(spec, golden):
        inputs = [np.ascontiguousarray(golden[tensor.name][part]) for tensor in spec.inputs]
        outputs = run_checked(backend, spec, inputs, rows)
        for index, array in expected.items():
            _compare(spec.outputs[index].name, outputs[index], array[part], tolerance)


def _parts(spec: ModelSpec, golden: Mapping[str, Array]) -> Iterator[tuple[int | None, slice]]:
    """Number of rows and slice of each part; no part has more rows than the maximum batch size."""
    if not spec.max_batch_size:
        yield None, slice(None)
        return
    total = min((golden[tensor.name].shape or (0,))[0] for tensor in spec.inputs)
    if not total:
        raise LoadError("the golden batch has no rows")
    for start in range(0, total, spec.max_batch_size):
        end = min(total, start + spec.max_batch_size)
        yield end - start, slice(start, end)


def _compare(name: str, output: Array, expected: Array, tolerance: float) -> None:
    if output.shape != expected.shape:
        raise LoadError(f"the golden '{name}' has shape {list(expected.shape)}, the model's {list(output.shape)}")
    if output.dtype == object or expected.dtype.kind not in "biuf":
        raise LoadError(f"the golden '{name}' cannot be compared: it does not hold numbers")
    difference = float(np.max(np.abs(output.astype(np.float64) - expected), initial=0.0))
    if not difference <= tolerance:  # also true for NaN
        raise LoadError(
            f"the model fails the golden check: '{name}' differs by {difference:.3g}, more than {tolerance:g}"
        )
