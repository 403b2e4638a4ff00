"""The cross-entropy with its gradient. Import this only where Triton is installed; see `choice`."""

import torch

from trainer.kernels import loss_kernels as kernels
from trainer.kernels.fused import add_up
from trainer.kernels.launch import empty_floats, launch, power_of_two

_BLOCK_SIZE = 1024
_ONE_BLOCK = 4096
"""Up to so many logits one program is faster than several, whose sums a second kernel adds up."""


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `operations.cross_entropy` for at most some thousand classes."""
    logits = logits.contiguous()
    rows, classes = logits.shape
    columns = power_of_two(classes)
    is_one = power_of_two(rows) * columns <= _ONE_BLOCK
    block_rows = power_of_two(rows) if is_one else max(1, _BLOCK_SIZE // columns)
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
        num_warps=8 if is_one else 4,
    )
    return partial[0] if programs == 1 else add_up(partial), gradient
