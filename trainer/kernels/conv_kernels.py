"""Triton kernels of convolutions with few channels or few pixels, for which cuDNN's tiles are too large.

A convolution is a product of matrices: patches `[rows, K]`, where a row is a pixel of the result and K counts (kernel
y, kernel x, channel), and filters `[FILTERS, K]`. Patches are read from the images as they are needed. Dilation is 1.
Pixels are channels-last, and may have more channels than are used.
"""
# mypy: ignore-errors
# ruff: noqa: PLR0913

import triton
import triton.language as tl

from trainer.kernels.norm_kernels import _activation


@triton.jit
def _patches(x, m, k, rows, height, width, out_height, out_width, CHANNELS: tl.constexpr, X_CHANNELS: tl.constexpr,
             KERNEL_X: tl.constexpr, STRIDE: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
             K: tl.constexpr):  # fmt: skip
    """Returns the columns `k` of the rows `m`, with zeros outside of the images."""
    line = m // out_width
    image = line // out_height
    place, channel = k // CHANNELS, k % CHANNELS
    from_y = ((line - image * out_height) * STRIDE)[:, None] + (place // KERNEL_X - PAD_Y)[None, :]
    from_x = ((m - line * out_width) * STRIDE)[:, None] + (place % KERNEL_X - PAD_X)[None, :]
    is_inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    mask = is_inside & (m < rows)[:, None] & (k < K)[None, :]
    at = ((image[:, None] * height + from_y) * width + from_x) * X_CHANNELS + channel[None, :]
    return tl.load(x + at, mask=mask, other=0.0)


@triton.jit
def convolve(x, weight, bias, y, z, rows, height, width, out_height, out_width, CHANNELS: tl.constexpr,
             X_CHANNELS: tl.constexpr, FILTERS: tl.constexpr, Y_CHANNELS: tl.constexpr, KERNEL_Y: tl.constexpr,
             KERNEL_X: tl.constexpr, STRIDE: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
             FLIPPED: tl.constexpr, WRITES_Y: tl.constexpr, WRITES_GELU: tl.constexpr, BM: tl.constexpr,
             BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Writes y = conv(x), or z = GELU(conv(x) + bias), or both; grid (blocks of rows, blocks of Y_CHANNELS).

    `weight` is [FILTERS, KERNEL_Y, KERNEL_X, CHANNELS]. FLIPPED computes the gradient of a convolution's input from
    that of its result, with the filters of that convolution: [CHANNELS, KERNEL_Y, KERNEL_X, FILTERS], read backwards.
    Channels of the results from FILTERS on are zeros; `bias` has Y_CHANNELS elements.
    """
    K: tl.constexpr = KERNEL_Y * KERNEL_X * CHANNELS
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        patches = _patches(x, m, k, rows, height, width, out_height, out_width, CHANNELS, X_CHANNELS, KERNEL_X, STRIDE,
                           PAD_Y, PAD_X, K)  # fmt: skip
        if FLIPPED:
            place = KERNEL_Y * KERNEL_X - 1 - k // CHANNELS
            at = ((k % CHANNELS) * (KERNEL_Y * KERNEL_X) + place)[:, None] * FILTERS + n[None, :]
        else:
            at = n[None, :] * K + k[:, None]
        filters = tl.load(weight + at, mask=(n < FILTERS)[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(patches, filters, total, input_precision="ieee")
    at = m[:, None] * Y_CHANNELS + n[None, :]
    mask = (m < rows)[:, None] & (n < Y_CHANNELS)[None, :]
    if WRITES_Y:
        tl.store(y + at, total, mask=mask)
    if WRITES_GELU:
        total += tl.load(bias + n, mask=n < Y_CHANNELS, other=0.0)[None, :]
        tl.store(z + at, _activation(total, "gelu"), mask=mask)


@triton.jit
def weight_gradient(x, dy, partial, rows, height, width, out_height, out_width, CHANNELS: tl.constexpr,
                    X_CHANNELS: tl.constexpr, FILTERS: tl.constexpr, KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr,
                    STRIDE: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                    BK: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    """Sums dyᵀ · patches(x) over the rows of each program; grid (PROGRAMS, blocks of K, blocks of FILTERS).

    `dy` is [rows, FILTERS], `partial` [PROGRAMS, FILTERS, K].
    """
    K: tl.constexpr = KERNEL_Y * KERNEL_X * CHANNELS
    program = tl.program_id(0)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    total = tl.zeros((BN, BK), tl.float32)
    for block in range(program, tl.cdiv(rows, BM), PROGRAMS):
        m = block * BM + tl.arange(0, BM)
        patches = _patches(x, m, k, rows, height, width, out_height, out_width, CHANNELS, X_CHANNELS, KERNEL_X, STRIDE,
                           PAD_Y, PAD_X, K)  # fmt: skip
        mask = (m < rows)[:, None] & (n < FILTERS)[None, :]
        gradient = tl.load(dy + m[:, None] * FILTERS + n[None, :], mask=mask, other=0.0)
        total = tl.dot(tl.trans(gradient), patches, total, input_precision="ieee")
    at = (program * FILTERS + n)[:, None] * K + k[None, :]
    tl.store(partial + at, total, mask=(n < FILTERS)[:, None] & (k < K)[None, :])
