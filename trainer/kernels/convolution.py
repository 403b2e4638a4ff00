"""Convolutions of our own as differentiable functions. Import this only where Triton is installed; see `choice`.

Which of a convolution's three products are ours was measured on an H200 (decision 0033): cuDNN keeps the large ones.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from trainer.kernels import conv_kernels as kernels
from trainer.kernels.choice import MAX_NUMEL
from trainer.kernels.fused import add_up, bias_gelu_gradient
from trainer.kernels.launch import empty_floats, empty_images, launch, power_of_two

_IMAGE_CHANNELS = 4
"""Up to here x is images, of which cuDNN, whose kernels for tensor cores take channels in multiples of 8, is slow."""
_MAX_CHANNELS = 128
_MAX_SMALL_WORK = 2**32
"""Up to here, in multiplications, our own product takes no longer than cuDNN's, whose tiles are few and large."""
_MAX_CHANNELS_OF_GRADIENT = 32
"""Up to here cuDNN is slow in the gradient of the filters, however many pixels there are."""
_ROW_BLOCKS = 128
"""About the number of multiprocessors: with fewer rows, blocks become smaller."""
_GRADIENT_BLOCK_ROWS = 64
_GRADIENT_STAGES = 2
"""Of loads ahead of products: with three there is shared memory for fewer programs at a time."""
_GRADIENT_PROGRAMS = 512


@dataclass(frozen=True, slots=True)
class _Product:
    """A convolution's sizes.

    Args:
        size: height and width of the images.
        out_size: height and width of the result.
    """

    images: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    channels: int
    filters: int
    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]

    @classmethod
    def of(cls, x: torch.Tensor, conv: nn.Conv2d) -> Self | None:
        """Returns the sizes of conv(x), or None if the kernels do not know such a convolution."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        is_plain = conv.dilation == (1, 1) and conv.groups == 1 and conv.stride[0] == conv.stride[1]
        if not is_plain or isinstance(conv.padding, str) or conv.padding_mode != "zeros" or x.dtype != dtype:
            return None
        (height, width), (kernel_y, kernel_x), (pad_y, pad_x) = x.shape[2:], conv.kernel_size, conv.padding
        stride = conv.stride[0]
        out_size = (height + 2 * pad_y - kernel_y) // stride + 1, (width + 2 * pad_x - kernel_x) // stride + 1
        sizes = conv.in_channels, conv.out_channels, (kernel_y, kernel_x), stride, (pad_y, pad_x)
        found = cls(len(x), (height, width), out_size, *sizes)
        return found if min(out_size) > 0 and found.rows * max(32, conv.out_channels) < MAX_NUMEL else None

    @property
    def rows(self) -> int:
        return self.images * self.out_size[0] * self.out_size[1]

    @property
    def columns(self) -> int:
        return self.kernel[0] * self.kernel[1] * self.channels

    @property
    def is_of_images(self) -> bool:
        return self.channels <= _IMAGE_CHANNELS

    @property
    def is_small(self) -> bool:
        is_narrow = max(self.channels, self.filters) <= _MAX_CHANNELS
        return is_narrow and self.rows * self.columns * self.filters <= _MAX_SMALL_WORK

    @property
    def has_own_result(self) -> bool:
        return self.is_of_images or self.is_small

    @property
    def has_own_filter_gradient(self) -> bool:
        return self.channels <= _MAX_CHANNELS_OF_GRADIENT


def convolution(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """Returns conv(x) without the bias: torch's where none of its products is ours.

    Args:
        x: `[B, C, H, W]`, with further channels of zeros or without.
    """
    product = _Product.of(x, conv)
    if product is None or not (product.has_own_result or product.has_own_filter_gradient):
        weight = conv.weight if x.size(1) == conv.in_channels else _with_channels(conv.weight, x.size(1))
        y: torch.Tensor = conv._conv_forward(x, weight, None)  # which knows `padding_mode`
        return y
    result: torch.Tensor = _Convolution.apply(x, conv.weight, product)
    return result


def conv_bias_gelu(x: torch.Tensor, conv: nn.Conv2d, num_channels: int) -> torch.Tensor | None:
    """Returns GELU(conv(x)) of images, for filters that are frozen, or None for other convolutions.

    Args:
        x: `[B, C, H, W]`, which needs no gradient.
        num_channels: of the result; those from the number of filters on are zeros.
    """
    product = _Product.of(x, conv)
    if product is None or not product.is_of_images or conv.bias is None or conv.weight.requires_grad or x.requires_grad:
        return None
    added = num_channels - conv.out_channels
    bias = F.pad(conv.bias, (0, added)) if added else conv.bias
    result: torch.Tensor = _ConvolutionBiasGelu.apply(x, conv.weight, bias, product)
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, product: _Product) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        cast = weight.to(x.dtype).contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, cast)
        ctx.product, ctx.dtype = product, weight.dtype
        if not product.has_own_result:
            return F.conv2d(x, _with_channels(cast, x.size(1)), None, product.stride, product.padding)
        y = empty_images(x, *product.out_size, channels=product.filters)
        _convolve(x, cast, y, product)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        product = ctx.product
        dy = dy.contiguous(memory_format=torch.channels_last)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = _input_gradient(x, dy, weight, product) if needs_x else None
        if not needs_weight:
            return dx, None, None
        if product.has_own_filter_gradient:
            return dx, _filter_gradient(x, dy, product).to(ctx.dtype), None
        gradient = _cudnn_gradient(x, dy, _with_channels(weight, x.size(1)), product, of_filters=True)
        return dx, gradient[:, : product.channels].to(ctx.dtype), None


class _ConvolutionBiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, product: _Product) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        cast = weight.to(x.dtype).contiguous(memory_format=torch.channels_last)
        z = empty_images(x, *product.out_size, channels=len(bias))
        y = torch.empty_like(z) if ctx.needs_input_grad[2] else None
        _convolve(x, cast, y, product, bias=bias, z=z)
        if y is not None:
            ctx.save_for_backward(y, bias)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[Any, ...]:
        y, bias = ctx.saved_tensors
        return None, None, bias_gelu_gradient(dz, y, bias), None


def _with_channels(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Returns filters with zeros for further channels."""
    return weight if weight.size(1) == channels else F.pad(weight, (0, 0, 0, 0, 0, channels - weight.size(1)))


def _convolve(  # noqa: PLR0913 (of one kernel)
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor | None,
    product: _Product,
    *,
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    is_flipped: bool = False,
) -> None:
    """Writes the results of `convolve`; at least one of y and z is given, z with a bias."""
    result = z if y is None else y
    assert result is not None
    block_rows = max(16, min(128, power_of_two(product.rows // _ROW_BLOCKS)))
    block_columns = 64 if block_rows < 128 else 32
    block_filters = max(16, min(64, power_of_two(result.size(1))))
    launch(
        kernels.convolve,
        (-(-product.rows // block_rows), -(-result.size(1) // block_filters)),
        x,
        weight,
        result if bias is None else bias,
        result if y is None else y,
        result if z is None else z,
        product.rows,
        *product.size,
        *product.out_size,
        CHANNELS=product.channels,
        X_CHANNELS=x.size(1),
        FILTERS=product.filters,
        Y_CHANNELS=result.size(1),
        KERNEL_Y=product.kernel[0],
        KERNEL_X=product.kernel[1],
        STRIDE=product.stride,
        PAD_Y=product.padding[0],
        PAD_X=product.padding[1],
        FLIPPED=is_flipped,
        WRITES_Y=y is not None,
        WRITES_GELU=z is not None,
        BM=block_rows,
        BN=block_filters,
        BK=max(16, min(block_columns, power_of_two(product.columns))),
    )


def _input_gradient(x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, product: _Product) -> torch.Tensor:
    pad_y, pad_x = product.kernel[0] - 1 - product.padding[0], product.kernel[1] - 1 - product.padding[1]
    if product.stride > 1 or min(pad_y, pad_x) < 0 or not product.is_small:
        return _cudnn_gradient(x, dy, _with_channels(weight, x.size(1)), product, of_filters=False)
    sizes = product.images, product.out_size, product.size, product.filters, product.channels, product.kernel
    dx = torch.empty_like(x)
    _convolve(dy, weight, dx, _Product(*sizes, stride=1, padding=(pad_y, pad_x)), is_flipped=True)
    return dx


def _cudnn_gradient(
    x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, product: _Product, *, of_filters: bool
) -> torch.Tensor:
    strides, wanted = [product.stride, product.stride], [not of_filters, of_filters, False]
    arguments = (dy, x, weight, None, strides, list(product.padding), [1, 1], False, [0, 0], 1, wanted)
    gradient: torch.Tensor = torch.ops.aten.convolution_backward(*arguments)[1 if of_filters else 0]
    return gradient


def _filter_gradient(x: torch.Tensor, dy: torch.Tensor, product: _Product) -> torch.Tensor:
    """Returns the gradient of the filters, float32, channels last."""
    (kernel_y, kernel_x), columns = product.kernel, product.columns
    most_columns = 256 // x.element_size()  # three stages of blocks fit the 99 KB of shared memory of small GPUs
    block_columns = max(16, min(most_columns, power_of_two(columns)))
    block_filters = max(16, min(64, power_of_two(product.filters)))
    blocks = -(-columns // block_columns), -(-product.filters // block_filters)
    most = max(1, _GRADIENT_PROGRAMS // power_of_two(blocks[0] * blocks[1]))
    programs = min(most, power_of_two(-(-product.rows // _GRADIENT_BLOCK_ROWS)))
    partial = empty_floats(x, programs, product.filters * columns)
    launch(
        kernels.weight_gradient,
        (programs, *blocks),
        x,
        dy,
        partial,
        product.rows,
        *product.size,
        *product.out_size,
        CHANNELS=product.channels,
        X_CHANNELS=x.size(1),
        FILTERS=product.filters,
        KERNEL_Y=kernel_y,
        KERNEL_X=kernel_x,
        STRIDE=product.stride,
        PAD_Y=product.padding[0],
        PAD_X=product.padding[1],
        BM=_GRADIENT_BLOCK_ROWS,
        BN=block_filters,
        BK=block_columns,
        PROGRAMS=programs,
        num_stages=_GRADIENT_STAGES,
    )
    return add_up(partial).view(product.filters, kernel_y, kernel_x, product.channels).permute(0, 3, 1, 2)
