"""Operations of networks in training: fused kernels where `choice` says so, else torch's own.

Both compute the same function; they differ in rounding (the kernels keep float32 between pooling, norm and activation).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from trainer.kernels.choice import is_fused, is_fusible

Activation = Literal["none", "relu", "gelu"]

_MAX_CLASSES = 1024
_MAX_PIXELS_OF_GLOBAL_MAXIMUM = 64
_MAX_ROWS = 512
"""Vectors of which one program sums up gradients; torch has more programs for more of them."""
_PADDED_FILTERS = (17, 32)
"""Results of so many filters are padded to the larger number: the next convolution takes half of the time."""


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float, factor: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the losses of a batch and their gradient, or None where there are no kernels.

    Args:
        logits: `[B, classes]`.
        labels: int64 `[B]`.
        factor: of the loss in the gradient.

    Returns:
        float32 `[2]`, the sum of the losses and the number of correct answers; and the gradient of the logits.
    """
    if not is_fused(logits) or logits.size(1) > _MAX_CLASSES:
        return None
    from trainer.kernels import loss

    return loss.cross_entropy(logits.detach(), labels, label_smoothing, factor)


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
        residual: of the result's shape.
    """
    if isinstance(norm, nn.BatchNorm2d) and _has_kernels(x, norm, pool, residual):
        from trainer.kernels import fused

        return fused.norm_activation(x, norm, activation, pool=pool, residual=residual)
    if pool > 1:
        x = F.max_pool2d(x, kernel_size=pool)
    x = norm(x)
    return _activate(x if residual is None else x + residual, activation)


def normalize(pixels: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor | None:
    """Returns `(pixels - mean) / deviation`, in the type that autocast would give it; None where there are no kernels.

    Args:
        pixels: uint8 or float32 `[B, C, H, W]`.
        mean: float32 with C elements, as `deviation`.
    """
    is_known = pixels.dtype in (torch.uint8, torch.float32) and mean.numel() == pixels.size(1)
    if not is_known or not torch.is_grad_enabled() or not is_fusible(pixels):
        return None
    from trainer.kernels import batches

    device = pixels.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return batches.normalize(pixels, mean, deviation, dtype=dtype)


def global_maximum(x: torch.Tensor, *, is_training: bool) -> torch.Tensor:
    """Returns the maximum over the pixels of images `[B, C, H, W]`, `[B, C]`."""
    # The mode is asked first: torch.fx, which export uses, traces the rest without values.
    if not is_training or not is_fused(x) or x.size(2) * x.size(3) > _MAX_PIXELS_OF_GLOBAL_MAXIMUM:
        return x.amax(dim=(2, 3))
    from trainer.kernels import fused

    return fused.global_maximum(x)


def convolution(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """Returns conv(x); in training, x may have further channels of zeros, from `conv_bias_gelu`."""
    if not conv.training or not is_fused(x):
        y: torch.Tensor = conv(x)
        return y
    y = _without_bias(x, conv)
    return y if conv.bias is None else y + conv.bias.to(y.dtype)[:, None, None]


def conv_bias_gelu(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """Returns GELU(conv(x)); with kernels for frozen filters, which may add channels of zeros."""
    if conv.training and is_fused(x):
        from trainer.kernels import convolution as kernels

        fewest, most = _PADDED_FILTERS
        num_channels = most if fewest <= conv.out_channels <= most else conv.out_channels
        result = kernels.conv_bias_gelu(x, conv, num_channels)
        if result is not None:
            return result
    return F.gelu(convolution(x, conv))


def conv_pool_relu(x: torch.Tensor, conv: nn.Conv2d, pool: int, *, flat: bool = False) -> torch.Tensor:
    """Returns ReLU(max-pool(conv(x))) for windows of `pool` x `pool` pixels; with `flat`, `[B, C * H * W]`."""
    if conv.bias is None or not conv.training or not is_fused(x):
        x = F.max_pool2d(convolution(x, conv), kernel_size=pool)
        # Flatten before the ReLU: its backward pass takes six times as long where the strides of its tensors differ.
        return F.relu(x.flatten(1) if flat else x)
    from trainer.kernels import fused

    result = fused.pool_bias_relu(_without_bias(x, conv), conv.bias, pool)
    return result.flatten(1) if flat else result


def linear(x: torch.Tensor, layer: nn.Linear, *, relu: bool = False) -> torch.Tensor:
    """Returns layer(x), or with `relu` ReLU(layer(x)), for vectors `[B, N]`."""
    if layer.training and is_fused(x) and len(x) <= _MAX_ROWS and _is_of_one_type(x, layer.weight, layer.bias):
        from trainer.kernels import linear as kernels

        return kernels.linear(x, layer.weight, layer.bias, relu=relu)
    y: torch.Tensor = layer(x)
    return F.relu(y) if relu else y


def _is_of_one_type(*tensors: torch.Tensor | None) -> bool:
    return len({None if each is None else each.dtype for each in tensors}) == 1


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
    """Returns conv(x) without the bias, for x that uses the kernels."""
    from trainer.kernels import convolution as kernels

    return kernels.convolution(x, conv)
