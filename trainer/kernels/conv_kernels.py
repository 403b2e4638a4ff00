"""Triton kernel of the weights' gradient of a convolution with few input channels, which cuDNN computes slowly."""
# mypy: ignore-errors
# ruff: noqa: PLR0913

import triton
import triton.language as tl


@triton.jit
def weight_gradient(x, dy, partial, rows, height, width, out_height, out_width, CHANNELS: tl.constexpr,
                    FILTERS: tl.constexpr, KERNEL_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
                    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    PROGRAMS: tl.constexpr):  # fmt: skip
    """Sums dyᵀ · patches(x) over the rows of each program; grid (PROGRAMS, blocks of K).

    `x` [images, height, width, CHANNELS] and `dy` [rows, FILTERS] are channels-last; a row is a pixel of the result.
    `partial` is [PROGRAMS, FILTERS, K], where K counts (kernel y, kernel x, channel). Stride and dilation are 1.
    """
    program = tl.program_id(0)
    n = tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    place, channel = k // CHANNELS, k % CHANNELS
    move_y, move_x = place // KERNEL_X - PAD_Y, place % KERNEL_X - PAD_X
    total = tl.zeros((BN, BK), tl.float32)
    for block in range(program, tl.cdiv(rows, BM), PROGRAMS):
        m = block * BM + tl.arange(0, BM)
        line = m // out_width
        from_x = (m - line * out_width)[:, None] + move_x[None, :]
        from_y = (line % out_height)[:, None] + move_y[None, :]
        image = (line // out_height)[:, None]
        is_inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
        mask = is_inside & (m < rows)[:, None] & (k < K)[None, :]
        patch = tl.load(x + ((image * height + from_y) * width + from_x) * CHANNELS + channel[None, :], mask, other=0.0)
        mask = (m < rows)[:, None] & (n < FILTERS)[None, :]
        gradient = tl.load(dy + m[:, None] * FILTERS + n[None, :], mask=mask, other=0.0)
        total = tl.dot(tl.trans(gradient), patch, total, input_precision="ieee")
    at = (program * FILTERS + n)[:, None] * K + k[None, :]
    tl.store(partial + at, total, mask=(n < FILTERS)[:, None] & (k < K)[None, :])
