"""Operations of networks in training: fused kernels where `choice` says so, else torch's own.

Both compute the same function; they differ in rounding (the kernels keep float32 between pooling, norm and activation).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from trainer.kernels.choice import is_fused

Activation = Literal["none", "relu", "gelu"]

_PADDED_CHANNELS = 8


def norm_activation(
    x: torch.Tensor,
    norm: nn.Module,
    activation: Activation,
    *,
    pool: int = 1,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns `activation(norm(max_pool(x)) + residual)`.

    Args:
        x: `[B, C, H, W]`.
        norm: a batch norm.
        pool: size and stride of the max-pool's windows; 1 for none.
        residual: of the result's shape; with ReLU only.
    """
    if isinstance(norm, nn.BatchNorm2d) and _has_kernels(x, norm, pool, residual):
        from trainer.kernels import fused

        return fused.norm_activation(x, norm, activation, pool=pool, residual=residual)
    if pool > 1:
        x = F.max_pool2d(x, kernel_size=pool)
    x = norm(x)
    return _activate(x if residual is None else x + residual, activation)


def conv_bias_gelu(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """Returns GELU(conv(x)).

    On GPUs images with fewer than 8 channels are padded with channels of zeros: cuDNN's kernels for tensor cores take
    channels in multiples of 8. Where the filters are frozen, only the bias gets a gradient.
    """
    if conv.bias is None or not conv.training or not is_fused(x):
        return F.gelu(conv(x))
    from trainer.kernels import fused

    return fused.bias_gelu(_without_bias(_pad_channels(x), conv), conv.bias)


def conv_pool_relu(x: torch.Tensor, conv: nn.Conv2d, pool: int, *, flat: bool = False) -> torch.Tensor:
    """Returns ReLU(max-pool(conv(x))) for windows of `pool` x `pool` pixels; with `flat`, `[B, C * H * W]`."""
    if conv.bias is None or not conv.training or not is_fused(x):
        x = F.max_pool2d(conv(x), kernel_size=pool)
        # Flatten before the ReLU: its backward pass takes six times as long where the strides of its tensors differ.
        return F.relu(x.flatten(1) if flat else x)
    from trainer.kernels import fused

    result = fused.pool_bias_relu(_without_bias(x, conv), conv.bias, pool)
    return result.flatten(1) if flat else result


def _has_kernels(x: torch.Tensor, norm: nn.BatchNorm2d, pool: int, residual: torch.Tensor | None) -> bool:
    """Returns whether the kernels compute what this norm would.

    A norm with hooks is called as a module: `BatchNormSums` and trials of a network hang theirs there. torch has an
    error of its own for a single value.
    """
    if not norm.training or norm._forward_pre_hooks or norm._forward_hooks or not is_fused(x):
        return False
    is_plain = norm.affine and norm.running_mean is not None and norm.momentum is not None
    is_alike = residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
    num_values = x.size(0) * (x.size(2) // pool) * (x.size(3) // pool)
    return is_plain and is_alike and num_values > 1 and norm.weight.dtype == torch.float32


def _activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    match activation:
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
    return x


def _without_bias(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    weight = conv.weight
    if x.size(1) > weight.size(1):
        weight = F.pad(weight, (0, 0, 0, 0, 0, x.size(1) - weight.size(1)))
    return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def _pad_channels(x: torch.Tensor) -> torch.Tensor:
    """Returns images with at least 8 channels, channels last."""
    if x.size(1) >= _PADDED_CHANNELS:
        return x
    return F.pad(x, (0, 0, 0, 0, 0, _PADDED_CHANNELS - x.size(1))).contiguous(memory_format=torch.channels_last)
