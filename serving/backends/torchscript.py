"""TorchScript models, on the CPU or on one GPU. The only module of the server that imports torch."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from serving.errors import LoadError
from serving.models.devices import CudaUnavailable
from serving.models.spec import ModelSpec
from serving.protocol.tensors import Array, TensorSpec

_BY_INDEX = re.compile(r".*__(\d+)")


class TorchScriptBackend:
    """One module on one device.

    Args:
        order: for each argument of the module, which of the inputs it is.
        pick: the outputs, in the order of the configuration, out of what the module returns.
    """

    def __init__(
        self,
        module: torch.jit.ScriptModule,
        spec: ModelSpec,
        device: torch.device,
        order: Sequence[int],
        pick: Callable[[Any], list[torch.Tensor]],
    ) -> None:
        self.inputs = spec.inputs
        self.outputs = spec.outputs
        self._module: torch.jit.ScriptModule | None = module
        self._device = device
        self._order = order
        self._pick = pick

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        assert self._module is not None, "the backend is closed"
        with torch.inference_mode():
            result = self._module(*(self._to_device(inputs[place]) for place in self._order))
            return [tensor.contiguous().cpu().numpy() for tensor in self._pick(result)]

    def close(self) -> None:
        self._module = None

    def _to_device(self, array: Array) -> torch.Tensor:
        # torch has no read-only tensors and warns about them.
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self._device)


def load(file: Path, spec: ModelSpec, gpu: int | None, num_threads: int) -> TorchScriptBackend:
    """One instance.

    Args:
        gpu: which CUDA device; None for the CPU.
        num_threads: of the CPU that one batch may use; torch has one number for the whole process, the last one given.

    Raises:
        LoadError: the file is no TorchScript, or its arguments are not the configuration's inputs; `CudaUnavailable` where
            there is a GPU that torch cannot use.
    """
    if gpu is not None and not torch.cuda.is_available():
        raise CudaUnavailable("this torch cannot use CUDA: it was built without, or the driver is too old for it")
    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    torch.set_num_threads(num_threads)
    torch.backends.cudnn.allow_tf32 = False  # the golden batch was computed in float32: TF32 is off by 1e-3
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is deprecated is nothing that the operator can change
            module = torch.jit.load(file, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise LoadError(f"torch cannot load {file.name}: {str(error).partition(chr(10))[0]}") from error
    if strings := [tensor.name for tensor in (*spec.inputs, *spec.outputs) if tensor.datatype.size == 0]:
        raise LoadError(f"TorchScript models have no strings, but '{strings[0]}' is TYPE_STRING in the configuration")
    arguments = [argument.name for argument in module.forward.schema.arguments[1:]]
    return TorchScriptBackend(module, spec, device, _order_of_inputs(spec.inputs, arguments), _picker(spec.outputs))


def _order_of_inputs(inputs: Sequence[TensorSpec], arguments: Sequence[str]) -> list[int]:
    """By name, by the `__<index>` at the end of each name (Triton's convention), or because there is only one."""
    names = [tensor.name for tensor in inputs]
    if len(names) != len(arguments):
        raise LoadError(f"the configuration has {len(names)} inputs, but the model takes {list(arguments)}")
    if len(names) == 1:
        return [0]
    if set(names) == set(arguments):
        return [names.index(argument) for argument in arguments]
    places = _indices(names)
    if places is None or sorted(places) != list(range(len(names))):
        raise LoadError(
            f"the configuration's inputs {names} are neither the model's arguments {list(arguments)} nor numbered "
            "like INPUT__0, INPUT__1"
        )
    return [places.index(place) for place in range(len(names))]


def _picker(outputs: Sequence[TensorSpec]) -> Callable[[Any], list[torch.Tensor]]:
    names = [tensor.name for tensor in outputs]
    places = _indices(names) or list(range(len(names)))

    def pick(result: Any) -> list[torch.Tensor]:
        """Out of a dictionary or a named tuple by name; out of a tuple by number, or in its order."""
        if isinstance(result, torch.Tensor):
            result = (result,)
        elif hasattr(result, "_asdict"):
            result = result._asdict()
        if isinstance(result, Mapping):
            if missing := [name for name in names if name not in result]:
                raise ValueError(f"the model returns {sorted(result)}, and no '{missing[0]}'")
            return [result[name] for name in names]
        if max(places) >= len(result):
            raise ValueError(f"the model returns {len(result)} tensors, and the configuration has outputs {names}")
        return [result[place] for place in places]

    return pick


def _indices(names: Sequence[str]) -> list[int] | None:
    matches = [_BY_INDEX.fullmatch(name) for name in names]
    return [int(match[1]) for match in matches if match] if all(matches) else None
