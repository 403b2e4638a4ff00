"""The cross-entropy as a differentiable function. Import this only where Triton is installed; see `choice`."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trainer.kernels import loss_kernels as kernels
from trainer.kernels.fused import add_up
from trainer.kernels.launch import empty_floats, launch, power_of_two

_BLOCK_SIZE = 1024


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sum of the losses and the number of correct answers, float32 scalars.

    Args:
        logits: `[B, classes]`, at most some thousand classes.
        labels: int64 `[B]`.
    """
    sums: torch.Tensor = _CrossEntropy.apply(logits, labels, label_smoothing)
    return sums[0], sums[1].detach()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        logits = logits.contiguous()
        rows, classes = logits.shape
        columns = power_of_two(classes)
        block_rows = max(1, _BLOCK_SIZE // columns)
        programs = power_of_two(-(-rows // block_rows))
        gradient, partial = empty_floats(logits, rows, classes), empty_floats(logits, programs, 2)
        launch(
            kernels.cross_entropy,
            (programs,),
            logits,
            labels,
            gradient,
            partial,
            rows,
            classes,
            smoothing,
            BM=block_rows,
            BC=columns,
        )
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return add_up(partial)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_of_sums: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        result = torch.empty_like(gradient, dtype=ctx.dtype)
        return torch.mul(gradient, gradient_of_sums[0], out=result), None, None
