"""The inputs of a configuration's `model_warmup`, which each instance runs before it serves.

As in Triton: a sample lists all inputs, without the batch dimension, as zeros, random numbers, or a file of the folder
`warmup` beside the versions, in the form of `serving.protocol.tensors`. Its row is repeated up to `batch_size`
(https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto, message ModelWarmup).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from protos.model_config_pb2 import DataType, ModelWarmup
from serving.backends import Backend
from serving.errors import InvalidArgument, LoadError, TransientLoadError
from serving.models.files import describe, read_bytes
from serving.models.scanner import WARMUP_FOLDER
from serving.models.spec import ModelSpec, check_inside
from serving.models.warmup import run_checked
from serving.protocol.tensors import Array, TensorSpec, to_array


@dataclass(frozen=True, slots=True)
class Sample:
    """One element of `model_warmup`.

    Args:
        rows: None for a model without a batch dimension.
        inputs: in the model's order.
        count: how often it runs.
    """

    name: str
    rows: int | None
    inputs: Sequence[Array]
    count: int


def read_samples(folder: Path, spec: ModelSpec) -> list[Sample]:
    """Returns the samples of a model.

    Args:
        folder: the model's folder.

    Raises:
        TransientLoadError: a file cannot be read.
        LoadError: a sample does not fit the model; the message names it.
    """
    samples = []
    for number, config in enumerate(spec.config.model_warmup):
        name = config.name or str(number)
        try:
            samples.append(_read_sample(folder, spec, config, name))
        except LoadError as error:
            raise type(error)(f"model_warmup '{name}': {error}") from error
    return samples


def run_samples(backend: Backend, spec: ModelSpec, samples: Sequence[Sample]) -> float:
    """Runs the samples. Returns the seconds of the fastest run of the slowest one; 0 without samples.

    Raises:
        LoadError: the model fails on one.
    """
    slowest_s = 0.0
    for sample in samples:
        fastest_s = math.inf
        for _ in range(sample.count):
            began = time.perf_counter()
            try:
                run_checked(backend, spec, sample.inputs, sample.rows)
            except LoadError as error:
                raise type(error)(f"model_warmup '{sample.name}': {error}") from error
            fastest_s = min(fastest_s, time.perf_counter() - began)
        slowest_s = max(slowest_s, fastest_s)
    return slowest_s


def _read_sample(folder: Path, spec: ModelSpec, config: ModelWarmup, name: str) -> Sample:
    rows = config.batch_size or 1
    if rows > max(1, spec.max_batch_size):
        raise LoadError(f"batch_size must be between 1 and {max(1, spec.max_batch_size)}, got {rows}")
    expected = [tensor.name for tensor in spec.inputs]
    if set(config.inputs) != set(expected):
        raise LoadError(f"expected the inputs {', '.join(expected)}, got {', '.join(sorted(config.inputs)) or 'none'}")
    inputs = [_read_input(folder, tensor, config.inputs[tensor.name], spec, rows) for tensor in spec.inputs]
    return Sample(name, rows if spec.max_batch_size else None, inputs, config.count or 1)


def _read_input(folder: Path, tensor: TensorSpec, config: ModelWarmup.Input, spec: ModelSpec, rows: int) -> Array:
    dims = tuple(config.dims)
    shape = (1, *dims) if spec.max_batch_size else dims
    kind = DataType.Name(config.data_type) if config.data_type in DataType.values() else "none"
    if kind != tensor.datatype.config_name or min(dims, default=0) < 0 or not tensor.accepts(shape):
        wanted = f"{tensor.datatype.config_name} of dims {list(tensor.shape[1 if spec.max_batch_size else 0 :])}"
        raise LoadError(f"input '{tensor.name}' is {wanted}, got {kind} of dims {list(dims)}")
    row = _read_row(folder, tensor, config, shape)
    return np.repeat(row, rows, axis=0) if spec.max_batch_size and rows > 1 else row


def _read_row(folder: Path, tensor: TensorSpec, config: Any, shape: tuple[int, ...]) -> Array:
    dtype = tensor.datatype.dtype
    source = config.WhichOneof("input_data_type")
    if source is None:
        raise LoadError(f"input '{tensor.name}' needs zero_data, random_data or input_data_file")
    if source == "input_data_file":
        return _read_file(folder, tensor, config.input_data_file, shape)
    if not tensor.datatype.size:  # random_data of strings are empty strings in Triton, too
        return np.full(shape, b"", object)
    if source == "zero_data":
        return np.zeros(shape, dtype)
    random = np.random.default_rng(0)
    if dtype.kind == "f":
        return random.random(shape, np.float64).astype(dtype)
    if dtype.kind == "b":
        return random.random(shape) < 0.5
    limits = np.iinfo(dtype)
    return random.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def _read_file(folder: Path, tensor: TensorSpec, name: str, shape: tuple[int, ...]) -> Array:
    check_inside("input_data_file", name)
    path = f"{WARMUP_FOLDER}/{name}"
    try:
        data = read_bytes(folder / path)
    except OSError as error:
        raise TransientLoadError(f"{path} cannot be read: {describe(error)}") from error
    if data is None:
        raise LoadError(f"{path} does not exist")
    try:
        return to_array(tensor.datatype, shape, data)
    except (ValueError, InvalidArgument) as error:
        raise LoadError(f"{path} does not hold {tensor.datatype.name} of shape {list(shape)}: {error}") from error
