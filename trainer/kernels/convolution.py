"""Convolutions whose weights' gradient is our own. Import this only where Triton is installed; see `choice`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from trainer.kernels import conv_kernels as kernels
from trainer.kernels.fused import add_up
from trainer.kernels.launch import empty_floats, launch, power_of_two

_BLOCK_ROWS = 64
_BLOCK_COLUMNS = 32
_MAX_PROGRAMS = 128


def convolution(x: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
    """Returns the convolution of x `[B, C, H, W]` with weights `[F, C, h, w]`, of stride 1, in the type of x."""
    result: torch.Tensor = _Convolution.apply(x, weight, padding)
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.padding, ctx.dtype = padding, weight.dtype
        return F.conv2d(x, cast, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = None
        if needs_x:
            ones, zeros, wanted = [1, 1], [0, 0], [True, False, False]
            arguments = (dy, x, weight, None, ones, list(ctx.padding), ones, False, zeros, 1, wanted)
            dx = torch.ops.aten.convolution_backward(*arguments)[0]
        return dx, _weight_gradient(x, dy, weight, ctx.padding).to(ctx.dtype) if needs_weight else None, None


def _weight_gradient(x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
    """Returns the gradient of the weights, float32, channels last."""
    filters, channels, kernel_y, kernel_x = weight.shape
    rows, columns = dy.numel() // filters, kernel_y * kernel_x * channels
    programs = min(_MAX_PROGRAMS, power_of_two(-(-rows // _BLOCK_ROWS)))
    partial = empty_floats(x, programs, filters * columns)
    launch(
        kernels.weight_gradient,
        (programs, -(-columns // _BLOCK_COLUMNS)),
        x,
        dy,
        partial,
        rows,
        *x.shape[2:],
        *dy.shape[2:],
        CHANNELS=channels,
        FILTERS=filters,
        KERNEL_X=kernel_x,
        PAD_Y=padding[0],
        PAD_X=padding[1],
        K=columns,
        BM=_BLOCK_ROWS,
        BN=max(16, power_of_two(filters)),
        BK=_BLOCK_COLUMNS,
        PROGRAMS=programs,
    )
    return add_up(partial).view(filters, kernel_y, kernel_x, channels).permute(0, 3, 1, 2)
