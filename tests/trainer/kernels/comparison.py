"""Computes one operation of the kernels with its gradients, for comparisons of the kernels with torch's operations."""

import torch
from torch import nn

from trainer.kernels.operations import Activation, conv_bias_gelu, conv_pool_relu, norm_activation

Tensors = dict[str, torch.Tensor]


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Returns normal values, channels last, with a mean far from 0 and ties within windows."""
    values = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 12).round() / 4
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def norm_step(
    x: torch.Tensor, activation: Activation, pool: int, *, residual: torch.Tensor | None = None, frozen: bool = False
) -> Tensors:
    """Computes a norm's forward and backward pass on the device of x; returns all results."""
    random = torch.Generator().manual_seed(1)
    norm = nn.BatchNorm2d(x.size(1), momentum=0.3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=random)
        norm.bias.normal_(generator=random)
    norm.weight.requires_grad_(not frozen)
    norm.to(x.device)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    z = norm_activation(x, norm, activation, pool=pool, residual=residual)
    z.backward(torch.randn(z.shape, generator=random).to(z))
    results = {"z": z, "dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad, **dict(norm.named_buffers())}
    results["dresidual"] = None if residual is None else residual.grad
    return {name: value.detach() for name, value in results.items() if value is not None}


def assert_close(ours: Tensors, theirs: Tensors, *, rounding: float = 1e-6) -> None:
    """Asserts equality up to `rounding`, relative to the largest value of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        scale = max(1.0, float(expected.double().nan_to_num().abs().max()))
        torch.testing.assert_close(
            ours[name].double(), expected.double(), atol=rounding * scale, rtol=rounding, equal_nan=True, msg=name
        )


def conv_step(x: torch.Tensor, kind: str, *, frozen: bool = False, pool: int = 2) -> Tensors:
    """Computes a convolution with what follows it, forward and backward; returns all results."""
    torch.manual_seed(0)
    conv = nn.Conv2d(x.size(1), 12, 3)
    conv.weight.requires_grad_(not frozen)
    conv.to(x.device, memory_format=torch.channels_last)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(not frozen)
    z = conv_bias_gelu(x, conv) if kind == "gelu" else conv_pool_relu(x, conv, pool)
    z.backward(torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z))
    results = {"z": z, "dx": x.grad, "dweight": conv.weight.grad, "dbias": conv.bias.grad}
    return {name: value.detach() for name, value in results.items() if value is not None}
