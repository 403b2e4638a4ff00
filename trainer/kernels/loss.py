"""The cross-entropy with its gradient. Import this only where Triton is installed; see `choice`."""

import torch

from trainer.kernels import loss_kernels as kernels
from trainer.kernels.fused import add_up
from trainer.kernels.launch import empty_floats, launch, power_of_two

_BLOCK_SIZE = 1024


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `operations.cross_entropy` for at most some thousand classes."""
    logits = logits.contiguous()
    rows, classes = logits.shape
    columns = power_of_two(classes)
    block_rows = max(1, _BLOCK_SIZE // columns)
    programs = power_of_two(-(-rows // block_rows))
    gradient, partial = torch.empty_like(logits), empty_floats(logits, programs, 2)
    launch(
        kernels.cross_entropy,
        (programs,),
        logits,
        labels,
        gradient,
        partial,
        rows,
        classes,
        label_smoothing,
        factor,
        BM=block_rows,
        BC=columns,
    )
    return add_up(partial), gradient
