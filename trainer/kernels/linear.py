"""Linear layers with a ReLU, differentiable. Import this only where Triton is installed; see `choice`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from trainer.kernels import linear_kernels as kernels
from trainer.kernels.launch import launch

_BLOCK_ROWS = 128
_BLOCK_COLUMNS = 16


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, relu: bool) -> torch.Tensor:
    """Computes `operations.linear` for tensors of one type."""
    result: torch.Tensor = _Linear.apply(x, weight, bias, relu)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, relu: bool) -> torch.Tensor:
        z: torch.Tensor = torch._addmm_activation(bias, x, weight.t()) if relu else F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, z if relu else None)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[Any, ...]:
        x, weight, z = ctx.saved_tensors
        dz = dz.contiguous()
        rows, columns = dz.shape
        dy = dz if z is None else torch.empty_like(dz)
        dbias = torch.empty(columns, dtype=dz.dtype, device=dz.device)
        launch(
            kernels.gradient,
            (-(-columns // _BLOCK_COLUMNS),),
            dz,
            dz if z is None else z,
            dy,
            dbias,
            rows,
            columns,
            RELU=z is not None,
            BM=_BLOCK_ROWS,
            BC=_BLOCK_COLUMNS,
        )
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            dy @ weight if needs_x else None,
            dy.t() @ x if needs_weight else None,
            dbias if needs_bias else None,
            None,
        )
