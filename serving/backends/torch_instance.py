"""What the two backends of torch share: one module on one device, its inputs and outputs, its errors."""

import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.errors import LoadError, TransientLoadError
from serving.models.devices import CudaUnavailable
from serving.models.spec import ModelSpec
from serving.protocol.tensors import Array, TensorSpec

_BY_INDEX = re.compile(r".*__(\d+)")

_opening = threading.Lock()
"""Held while torch opens a file: Python's filters of warnings belong to the process."""


class TorchInstance:
    """One module on one device, with arrays in and out.

    On a GPU, each instance has a stream of its own, so that one instance copies while another computes, and page-locked
    memory for its inputs, which the GPU reads by itself
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#use-pinned-memory-buffers). It keeps this memory: to ask for
    some in each run takes longer than to copy a batch of small images.

    Args:
        module: called with a tensor for each argument.
        order: index of the input for each argument of the module.
        select: takes what the module returns, returns the outputs in the order of the configuration.
    """

    def __init__(
        self,
        module: Callable[..., Any],
        spec: ModelSpec,
        device: torch.device,
        order: Sequence[int],
        select: Callable[[Any], list[torch.Tensor]],
    ) -> None:
        self._module: Callable[..., Any] | None = module
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._dtypes = [torch.from_numpy(np.empty(0, tensor.datatype.dtype)).dtype for tensor in spec.inputs]
        self._order = order
        self._select = select
        self._staging: dict[int, torch.Tensor] = {}

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        assert self._module is not None, "the backend is closed"
        if self._stream is not None:
            return self._run_on_gpu(self._module, self._stream, inputs)
        with torch.inference_mode():
            result = self._module(*(_from_numpy(inputs[index]) for index in self._order))
            return [tensor.contiguous().numpy() for tensor in self._select(result)]

    def close(self) -> None:
        self._module = None

    def _run_on_gpu(
        self, module: Callable[..., Any], stream: torch.cuda.Stream, inputs: Sequence[Array]
    ) -> list[Array]:
        with torch.inference_mode(), torch.cuda.stream(stream):
            try:
                result = module(*(self._upload(index, inputs[index]) for index in self._order))
                return [tensor.cpu().contiguous().numpy() for tensor in self._select(result)]
            finally:
                stream.synchronize()  # before the next run writes its inputs, even if this one failed

    def _upload(self, index: int, array: Array) -> torch.Tensor:
        staging = self._staging.get(index)
        if staging is None or len(staging) < array.size:
            self._staging[index] = staging = torch.empty(array.size, dtype=self._dtypes[index], pin_memory=True)
        pinned = staging[: array.size].view(array.shape)
        pinned.numpy()[...] = array
        return pinned.to(self._device, non_blocking=True)


def _from_numpy(array: Array) -> torch.Tensor:
    # torch has no read-only tensors and warns about such arrays.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def open_device(spec: ModelSpec, gpu: int | None, num_threads: int) -> torch.device:
    """Returns an instance's device, and sets what torch has for the whole process.

    Args:
        gpu: index of the CUDA device; None for the CPU.
        num_threads: CPU threads that one batch may use. torch has one setting for the whole process: the last call
            sets it for all instances.

    Raises:
        CudaUnavailable: torch cannot use the GPU.
        LoadError: the configuration has strings, which torch does not have.
    """
    if gpu is not None and not torch.cuda.is_available():
        raise CudaUnavailable("this torch cannot use CUDA: it was built without CUDA, or the driver is too old")
    if strings := [tensor.name for tensor in (*spec.inputs, *spec.outputs) if tensor.datatype.size == 0]:
        raise LoadError(f"torch's models have no strings, but '{strings[0]}' is TYPE_STRING in the configuration")
    torch.set_num_threads(num_threads)
    _compute_in_float32()
    return torch.device("cpu") if gpu is None else torch.device("cuda", gpu)


def _compute_in_float32() -> None:
    """Forbids TF32 in this process, in which the golden batch was not computed: it differs by up to 1e-3.

    torch allows it for convolutions unless told otherwise; the environment (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE) and
    models in Python may allow it for products. They may have used torch's older settings or `fp32_precision`.
    """
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = False
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")


@contextmanager
def opening(file: Path, device: torch.device) -> Iterator[None]:
    """Context in which a file is opened, without warnings, which the operator cannot change.

    Raises:
        TransientLoadError: memory, a device or the disk are lacking now.
        LoadError: torch cannot load the file.
    """
    try:
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except LoadError:
        raise
    except Exception as error:
        may_pass = isinstance(error, torch.OutOfMemoryError | OSError) or "CUDA" in str(error)
        kind = TransientLoadError if may_pass else LoadError
        raise kind(f"torch cannot load {file.name}: {str(error).partition(chr(10))[0]}") from error
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # instances run on streams of their own, which do not wait for the weights


def order_of_inputs(inputs: Sequence[TensorSpec], arguments: Sequence[str]) -> list[int]:
    """Matches inputs to arguments: by name, by Triton's suffix `__<index>`, or because there is only one.

    Raises:
        LoadError: they do not match.
    """
    names = [tensor.name for tensor in inputs]
    if len(names) != len(arguments):
        raise LoadError(f"the configuration has {len(names)} inputs, but the model takes {list(arguments)}")
    if len(names) == 1:
        return [0]
    if set(names) == set(arguments):
        return [names.index(argument) for argument in arguments]
    indices = indices_of(names)
    if indices is None or sorted(indices) != list(range(len(names))):
        raise LoadError(
            f"the configuration's inputs {names} are neither the model's arguments {list(arguments)} nor numbered "
            "like INPUT__0, INPUT__1"
        )
    return [indices.index(index) for index in range(len(names))]


def output_selector(outputs: Sequence[TensorSpec]) -> Callable[[Any], list[torch.Tensor]]:
    """Returns a function that takes the outputs, in the order of the configuration, from what a module returns."""
    names = [tensor.name for tensor in outputs]
    indices = indices_of(names) or list(range(len(names)))

    def select(result: Any) -> list[torch.Tensor]:
        """Selects by name from a dictionary or named tuple, by index or in order from a tuple."""
        if isinstance(result, torch.Tensor):
            result = (result,)
        elif hasattr(result, "_asdict"):
            result = result._asdict()
        if isinstance(result, Mapping):
            if missing := [name for name in names if name not in result]:
                raise ValueError(f"the model returns {sorted(result)}, but not '{missing[0]}'")
            return [result[name] for name in names]
        if max(indices) >= len(result):
            raise ValueError(f"the model returns {len(result)} tensors, but the configuration has outputs {names}")
        return [result[index] for index in indices]

    return select


def indices_of(names: Sequence[str]) -> list[int] | None:
    """Returns the numbers of names such as `INPUT__0`; None unless each has one."""
    matches = [_BY_INDEX.fullmatch(name) for name in names]
    return [int(match[1]) for match in matches if match] if all(matches) else None
