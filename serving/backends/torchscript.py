"""TorchScript models through torch, on the CPU or on one GPU. torch has deprecated the format: prefer ONNX or pt2."""

from pathlib import Path

import torch

from serving.backends.torch_instance import TorchInstance, open_device, opening, order_of_inputs, output_selector
from serving.models.spec import ModelSpec


def load(file: Path, spec: ModelSpec, gpu: int | None, num_threads: int) -> TorchInstance:
    """Opens one instance; a `serving.backends.registry.Load`.

    Raises:
        CudaUnavailable: torch cannot use the GPU.
        TransientLoadError: memory, a device or the disk are lacking now.
        LoadError: torch cannot load the file, or its arguments do not match the configuration's inputs.
    """
    device = open_device(spec, gpu, num_threads)
    with opening(file, device):
        module = torch.jit.load(file, map_location=device).eval()
    arguments = [argument.name for argument in module.forward.schema.arguments[1:]]
    order, select = order_of_inputs(spec.inputs, arguments), output_selector(spec.outputs)
    return TorchInstance(module, spec, device, order, select)
