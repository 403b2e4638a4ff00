"""Casts a network's weights to autocast's type in one operation, and leaves their gradients in that type.

Autocast casts each weight on its own, and each gradient back: some 16 kernels of a step of the lecture's net, which has
86. The values are the same, to the bit; what adds gradients up, or updates weights by them, reads them as float32.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from trainer.kernels.updates import cast

_LAYERS = (nn.Conv2d, nn.Linear)


class CastWeights:
    """A model's forward pass with the trained weights of its convolutions and linear layers cast beforehand.

    Biases of convolutions stay as they are: our kernels add them in float32.

    Args:
        model: whose layers of these types use their weights in no other way.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        named = [
            (f"{prefix}.{name}" if prefix else name, parameter)
            for prefix, module in model.named_modules()
            if type(module) in _LAYERS
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and not (name == "bias" and isinstance(module, nn.Conv2d))
        ]
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        for parameter in self._parameters:
            parameter.grad_dtype = None  # of whatever type

    def __call__(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns the model's result; call it within autocast to the same type."""
        weights = _CastTogether.apply(dtype, *self._parameters)
        result: torch.Tensor = functional_call(self._model, dict(zip(self._names, weights, strict=True)), (images,))
        return result


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = [torch.empty_like(parameter, dtype=dtype) for parameter in parameters]
        cast(parameters, weights)
        ctx.set_materialize_grads(False)
        return tuple(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, *gradients
