"""Models of torch.export, and packages that AOTInductor compiled from them, on the CPU or on one GPU.

Both are files `model.pt2`. Opening one runs its code: torch evaluates expressions in it and may unpickle it, and a
package holds machine code.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from serving.backends.torch_instance import TorchInstance, indices_of, open_device, opening, order_of_inputs
from serving.backends.torch_instance import output_selector as select_outputs
from serving.errors import LoadError
from serving.models.devices import CudaUnavailable
from serving.models.spec import ModelSpec

_COMPILED = "/data/aotinductor/"
"""The folder of compiled code in the archive of a package."""


def load(file: Path, spec: ModelSpec, gpu: int | None, num_threads: int) -> TorchInstance:
    """Opens one instance; a `serving.backends.registry.Load`.

    Raises:
        CudaUnavailable: torch cannot use the GPU, or the package was compiled for the CPU.
        TransientLoadError: memory, a device or the disk are lacking now.
        LoadError: torch cannot load the file, or its arguments do not match the configuration's inputs.
    """
    device = open_device(spec, gpu, num_threads)
    with opening(file, device):
        module, arguments = _open_package(file, device) if _is_compiled(file) else _open_program(file, device)
    if arguments is None:  # a package does not know the names of its arguments
        order = indices_of([tensor.name for tensor in spec.inputs]) or list(range(len(spec.inputs)))
        order = [order.index(index) for index in sorted(order)]
    else:
        order = order_of_inputs(spec.inputs, arguments)
    return TorchInstance(module, spec, device, order, select_outputs(spec.outputs))


def _is_compiled(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return any(_COMPILED in name for name in archive.namelist())


def _open_program(file: Path, device: torch.device) -> tuple[Callable[..., Any], list[str]]:
    program = torch.export.load(file)
    if device.type == "cuda":
        program = move_to_device_pass(program, device)
    return program.module(), list(program.graph_signature.user_inputs)


def _open_package(file: Path, device: torch.device) -> tuple[Callable[..., Any], None]:
    index = -1 if device.index is None else device.index
    package = torch._inductor.aoti_load_package(str(file), device_index=index)
    compiled_for = package.get_metadata().get("AOTI_DEVICE_KEY", device.type)
    if compiled_for != device.type:
        message = f"{file.name} was compiled for {compiled_for}, and cannot run on {device.type}"
        raise CudaUnavailable(message) if device.type == "cuda" else LoadError(message)
    loader = package.loader
    outputs = pytree.treespec_loads(loader.get_call_spec()[1])  # the package itself would parse it at each call

    def run(*inputs: torch.Tensor) -> Any:
        return pytree.tree_unflatten(loader.boxed_run(list(inputs)), outputs)

    return run, None
