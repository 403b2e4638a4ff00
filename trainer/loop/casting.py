"""Casts a network's weights to autocast's type in one operation, and their gradients back in another.

Autocast casts each weight on its own: some 16 kernels of a step of the lecture's net, which has 86. The values are the
same, to the bit.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

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

    def __call__(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns the model's result; call it within autocast to the same type."""
        cast = _CastTogether.apply(dtype, *self._parameters)
        result: torch.Tensor = functional_call(self._model, dict(zip(self._names, cast, strict=True)), (images,))
        return result


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cast = [torch.empty_like(parameter, dtype=dtype) for parameter in parameters]
        torch._foreach_copy_(cast, list(parameters))
        ctx.set_materialize_grads(False)
        return tuple(cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        known = [gradient for gradient in gradients if gradient is not None]
        cast = [torch.empty_like(gradient, dtype=torch.float32) for gradient in known]
        if known:
            torch._foreach_copy_(cast, known)
        remaining = iter(cast)
        return None, *(None if gradient is None else next(remaining) for gradient in gradients)
