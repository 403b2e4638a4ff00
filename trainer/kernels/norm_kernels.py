"""Triton kernels: max-pool, batch norm with the batch's statistics, activation, and their gradients.

Tensors are channels-last: a matrix of rows (pixels of all images) times channels. A program computes blocks of `BM`
rows times `BC` channels. Kernels that sum have a fixed number of programs: program p takes the blocks p, p + PROGRAMS,
…, keeps sums for each place of its block, adds these up at its end, and writes one row of partial sums, which a merging
kernel adds up. There are no atomic additions: the order of each sum depends on the shape alone, and so do its bits.
They load the next two blocks while they compute one (`num_stages`).

All kernels compute in float32, whatever the tensors' type. `units * UNIT` is the number of channels: where it is a
multiple of 8, the compiler knows that from `UNIT`, and loads 16 bytes at a time. `WHOLE` says that it is a multiple of
`BC`: the kernels are bound by arithmetic as much as by memory, and then no channel needs a comparison of its own.

NaN is treated as torch treats it: a maximum over values with a NaN is NaN, and ReLU passes NaN on in both directions.
"""
# mypy: ignore-errors
# ruff: noqa: PLR0913

import triton
import triton.language as tl

OFF = 255
"""The index of a window whose maximum ReLU sets to 0: none of its pixels gets a gradient."""


@triton.jit
def _bell(u):
    """Returns exp(-u² / 2)."""
    return tl.exp2(-0.7213475204444817 * u * u)


@triton.jit
def _upper_tail(u):
    """Returns the normal distribution's upper tail at |u| over exp(-u² / 2), within 7.5e-8 after the product.

    Abramowitz and Stegun, 26.2.17. It shares the exponential with the density; erf would need one of its own. A GPU has
    an instruction for the reciprocal root, and takes several for a quotient.
    """
    line = 1.0 + 0.2316419 * tl.abs(u)
    t = tl.rsqrt(line * line)
    poly = 0.5307027143 * t - 0.7265760131
    poly = poly * t + 0.7107068707
    poly = poly * t - 0.1422483683
    poly = poly * t + 0.1274147959
    return poly * t


@triton.jit
def _activation(u, ACT: tl.constexpr):
    if ACT == "gelu":
        tail = _upper_tail(u) * _bell(u)
        u = u * tl.where(u < 0, tail, 1.0 - tail)
    if ACT == "relu":
        u = tl.where(u <= 0, 0.0, u)
    return u


@triton.jit
def _through_activation(gradient, u, ACT: tl.constexpr):
    """Returns the gradient before the activation of `u` from that after it."""
    if ACT == "gelu":  # its slopes at u and -u add up to 1
        slope = (_upper_tail(u) - 0.3989422804014327 * tl.abs(u)) * _bell(u)
        gradient = gradient * tl.where(u < 0, slope, 1.0 - slope)
    if ACT == "relu":
        gradient = tl.where(u <= 0, 0.0, gradient)
    return gradient


@triton.jit
def _mask(m, c, rows, channels, WHOLE: tl.constexpr):
    """Returns which rows and channels there are, to be broadcast to the block."""
    mask = (m < rows)[:, None]
    if not WHOLE:
        mask = mask & (c < channels)[None, :]
    return mask


@triton.jit
def _first_pixel(m, height, width, out_height, out_width, POOL: tl.constexpr):
    """Returns the row of a window's first pixel; `m` are rows of the pooled image."""
    line = m // out_width
    column = m - line * out_width
    image = line // out_height
    return (image * height + POOL * (line - image * out_height)) * width + POOL * column


@triton.jit
def _window_maximum(x, first, c, mask, width, channels, POOL: tl.constexpr):
    """Returns the maximum of each window and its index, as torch: the first maximum, or the last NaN."""
    at = first[:, None] * channels + c[None, :]
    best = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    index = tl.zeros_like(best).to(tl.int32)
    for k in tl.static_range(1, POOL * POOL):
        step = ((k // POOL) * width + k % POOL) * channels
        value = tl.load(x + at + step, mask=mask, other=0.0).to(tl.float32)
        is_better = (value > best) | (value != value)
        best = tl.where(is_better, value, best)
        index = tl.where(is_better, k, index)
    return best, index


@triton.jit
def _scatter(dx, gradient, index, m, c, mask, height, width, out_height, out_width, channels,
             POOL: tl.constexpr, LEFT_Y: tl.constexpr, LEFT_X: tl.constexpr):  # fmt: skip
    """Writes each window's gradient to the pixel of its maximum, and 0 to all others.

    The last windows also write the `LEFT_Y` lines and `LEFT_X` columns that no window covers.
    """
    line = m // out_width
    column = m - line * out_width
    row = line % out_height
    at = _first_pixel(m, height, width, out_height, out_width, POOL)[:, None] * channels + c[None, :]
    for y in tl.static_range(POOL + LEFT_Y):
        for x in tl.static_range(POOL + LEFT_X):
            to = dx + at + (y * width + x) * channels
            if y < POOL and x < POOL:
                tl.store(to, tl.where(index == y * POOL + x, gradient, 0.0), mask=mask)
            else:
                is_last = (row == out_height - 1) | (y < POOL)
                is_last = is_last & ((column == out_width - 1) | (x < POOL))
                tl.store(to, tl.zeros_like(gradient), mask=mask & is_last[:, None])


@triton.jit
def statistics(x, pooled, index, counts, means, squares, rows, height, width, out_height, out_width, units, blocks,
               POOL: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
               PROGRAMS: tl.constexpr):  # fmt: skip
    """Pools, and computes each program's partial statistics by Welford's method; grid (PROGRAMS, channel blocks).

    Writes `pooled` and `index` (uint8) where POOL > 1, and for each program: `counts` [PROGRAMS], the rows that it saw,
    `means` and `squares` [PROGRAMS, channels], their mean and their sum of squared differences to it.
    """
    program = tl.program_id(0)
    channels = units * UNIT
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    seen = tl.zeros((BM,), tl.float32)
    mean = tl.zeros((BM, BC), tl.float32)
    square = tl.zeros((BM, BC), tl.float32)
    turn = 0.0
    for block in tl.range(program, blocks, PROGRAMS, num_stages=1 if POOL > 1 else 3):  # pooling loads enough at once
        m = block * BM + tl.arange(0, BM)
        mask = _mask(m, c, rows, channels, WHOLE)
        at = m[:, None] * channels + c[None, :]
        if POOL > 1:
            first = _first_pixel(m, height, width, out_height, out_width, POOL)
            value, best = _window_maximum(x, first, c, mask, width, channels, POOL)
            tl.store(pooled + at, value, mask=mask)
            tl.store(index + at, best.to(tl.uint8), mask=mask)
        else:
            value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        turn += 1.0  # values at each place; only the program's last block may have places without one
        seen += (m < rows).to(tl.float32)  # if counted afterwards, a window's pixels are loaded one after another
        value = tl.where(mask, value, mean)
        difference = value - mean
        mean += difference * (1.0 / turn)
        square += difference * (value - mean)
    last = program + (tl.cdiv(blocks - program, PROGRAMS) - 1) * PROGRAMS
    count = turn * BM - tl.maximum((last + 1) * BM - rows, 0)
    mean_of_all = tl.sum(mean * seen[:, None], 0) / count
    difference = mean - mean_of_all[None, :]
    tl.store(means + program * channels + c, mean_of_all, mask=c < channels)
    total = tl.sum(square + difference * difference * seen[:, None], 0)
    tl.store(squares + program * channels + c, total, mask=c < channels)
    if tl.program_id(1) == 0:
        tl.store(counts + program, count)


@triton.jit
def merge_statistics(counts, means, squares, mean, inverse_deviation, running_mean, running_variance, rows, units,
                     epsilon, momentum, UNIT: tl.constexpr, BC: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    """Merges the programs' statistics by Chan's formula, and updates the running ones; grid (channel blocks).

    It loads everything first: a load that waits for another one would take as long as the rest.
    """
    channels = units * UNIT
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    p = tl.arange(0, PROGRAMS)
    is_channel = c < channels
    mask = (p >= 0)[:, None] & is_channel[None, :]
    at = p[:, None] * channels + c[None, :]
    count = tl.load(counts + p)[:, None]
    of_programs = tl.load(means + at, mask=mask, other=0.0)
    squares_of_programs = tl.load(squares + at, mask=mask, other=0.0)
    old_mean = tl.load(running_mean + c, mask=is_channel, other=0.0)
    old_variance = tl.load(running_variance + c, mask=is_channel, other=0.0)
    new_mean = tl.sum(of_programs * count, 0) / rows
    difference = of_programs - new_mean[None, :]
    total = tl.sum(squares_of_programs + difference * difference * count, 0)
    tl.store(mean + c, new_mean, mask=is_channel)
    tl.store(inverse_deviation + c, 1.0 / tl.sqrt(total / rows + epsilon), mask=is_channel)
    tl.store(running_mean + c, (1.0 - momentum) * old_mean + momentum * new_mean, mask=is_channel)
    new_variance = (1.0 - momentum) * old_variance + momentum * (total / (rows - 1))
    tl.store(running_variance + c, new_variance, mask=is_channel)


@triton.jit
def _channel_values(mean, inverse_deviation, weight, bias, c, is_channel, NORM: tl.constexpr):
    """Returns for each channel what `(x - centre) * scale + shift` computes the value before the activation from."""
    shift = tl.load(bias + c, mask=is_channel, other=0.0)
    centre, deviation, scale = tl.zeros_like(shift), tl.zeros_like(shift) + 1.0, tl.zeros_like(shift) + 1.0
    if NORM:
        centre = tl.load(mean + c, mask=is_channel, other=0.0)
        deviation = tl.load(inverse_deviation + c, mask=is_channel, other=0.0)
        scale = deviation * tl.load(weight + c, mask=is_channel, other=0.0)
    return centre, deviation, scale, shift


@triton.jit
def _before_activation(x, centre, scale, shift, NORM: tl.constexpr):
    """Returns the differences of x to their mean, and the values before the activation."""
    difference = x.to(tl.float32)
    if NORM:
        difference -= centre[None, :]
        u = difference * scale[None, :] + shift[None, :]
    else:
        u = difference + shift[None, :]
    return difference, u


@triton.jit
def activate(x, z, residual, mean, inverse_deviation, weight, bias, rows, units, RESIDUAL: tl.constexpr,
             ACT: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr,
             BC: tl.constexpr):  # fmt: skip
    """Writes z = ACT(norm(x) + residual); grid (row blocks, channel blocks)."""
    channels = units * UNIT
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = _mask(m, c, rows, channels, WHOLE)
    at = m[:, None] * channels + c[None, :]
    value = tl.load(x + at, mask=mask, other=0.0)
    centre, _, scale, shift = _channel_values(mean, inverse_deviation, weight, bias, c, c < channels, True)
    _, u = _before_activation(value, centre, scale, shift, True)
    if RESIDUAL:
        u += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(z + at, _activation(u, ACT), mask=mask)


@triton.jit
def reduce_gradient(dz, x, other, du, mean, inverse_deviation, weight, bias, partial, rows, units, blocks,
                    NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr, UNIT: tl.constexpr,
                    WHOLE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    """Sums the gradient before the activation, and its product with the normalised values, for each channel.

    With RESIDUAL, `du` gets the gradient before the activation, which is that of the residual, and `other` is the
    residual, for ReLU the result. Grid (PROGRAMS, channel blocks); `partial` is [PROGRAMS, 2, channels]: sums, then
    products. Without NORM there are no products, and it is [PROGRAMS, 1, channels].
    """
    program = tl.program_id(0)
    channels = units * UNIT
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    is_channel = c < channels
    centre, deviation, scale, shift = _channel_values(mean, inverse_deviation, weight, bias, c, is_channel, NORM)
    total = tl.zeros((BM, BC), tl.float32)
    product = tl.zeros((BM, BC), tl.float32)
    for block in tl.range(program, blocks, PROGRAMS, num_stages=3):
        m = block * BM + tl.arange(0, BM)
        mask = _mask(m, c, rows, channels, WHOLE)
        at = m[:, None] * channels + c[None, :]
        gradient = tl.load(dz + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=mask, other=0.0)
        difference, u = _before_activation(value, centre, scale, shift, NORM)
        if RESIDUAL and ACT == "relu":
            u = tl.load(other + at, mask=mask, other=0.0)
        elif RESIDUAL:
            u += tl.load(other + at, mask=mask, other=0.0).to(tl.float32)
        gradient = _through_activation(gradient, u, ACT)
        if RESIDUAL:
            tl.store(du + at, gradient, mask=mask)
        total += gradient  # 0 where there is no row
        if NORM:
            product += gradient * difference
    if NORM:
        tl.store(partial + 2 * program * channels + c, tl.sum(total, 0), mask=is_channel)
        tl.store(partial + (2 * program + 1) * channels + c, tl.sum(product, 0) * deviation, mask=is_channel)
    else:
        tl.store(partial + program * channels + c, tl.sum(total, 0), mask=is_channel)


@triton.jit
def merge_sums(partial, total, columns, BC: tl.constexpr, PROGRAMS: tl.constexpr):
    """Adds up the rows of `partial` [PROGRAMS, columns]; grid (column blocks)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    p = tl.arange(0, PROGRAMS)
    mask = (p >= 0)[:, None] & (c < columns)[None, :]
    values = tl.load(partial + p[:, None] * columns + c[None, :], mask=mask, other=0.0)
    tl.store(total + c, tl.sum(values, 0), mask=c < columns)


@triton.jit
def apply_gradient(dz, x, index, dx, mean, inverse_deviation, weight, bias, sums, products, rows, height, width,
                   out_height, out_width, units, ACT: tl.constexpr, POOL: tl.constexpr, LEFT_Y: tl.constexpr,
                   LEFT_X: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr,
                   BC: tl.constexpr):  # fmt: skip
    """Writes the gradient of the input before pooling, norm and activation; grid (row blocks, channel blocks).

    `sums` and `products` are of `reduce_gradient`, over all rows.
    """
    channels = units * UNIT
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    is_channel = c < channels
    mask = _mask(m, c, rows, channels, WHOLE)
    at = m[:, None] * channels + c[None, :]
    gradient = tl.load(dz + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=mask, other=0.0)
    if POOL > 1:
        best = tl.load(index + at, mask=mask, other=0)
    centre, deviation, scale, shift = _channel_values(mean, inverse_deviation, weight, bias, c, is_channel, True)
    difference, u = _before_activation(value, centre, scale, shift, True)
    gradient = _through_activation(gradient, u, ACT)
    constant = tl.load(sums + c, mask=is_channel, other=0.0) / rows
    slope = deviation * (tl.load(products + c, mask=is_channel, other=0.0) / rows)
    gradient = scale[None, :] * (gradient - constant[None, :] - difference * slope[None, :])
    if POOL > 1:
        _scatter(dx, gradient, best, m, c, mask, height, width, out_height, out_width, channels, POOL, LEFT_Y, LEFT_X)
    else:
        tl.store(dx + at, gradient, mask=mask)


@triton.jit
def pool_bias_relu(x, z, index, bias, rows, height, width, out_height, out_width, units, POOL: tl.constexpr,
                   OFF: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr,
                   BC: tl.constexpr):  # fmt: skip
    """Writes z = ReLU(max-pool(x) + bias), and the index of each maximum or OFF; grid (row blocks, channel blocks)."""
    channels = units * UNIT
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    is_channel = c < channels
    mask = _mask(m, c, rows, channels, WHOLE)
    at = m[:, None] * channels + c[None, :]
    first = _first_pixel(m, height, width, out_height, out_width, POOL)
    value, best = _window_maximum(x, first, c, mask, width, channels, POOL)
    u = value + tl.load(bias + c, mask=is_channel, other=0.0)[None, :]
    tl.store(z + at, _activation(u, "relu"), mask=mask)
    tl.store(index + at, tl.where(u <= 0, OFF, best).to(tl.uint8), mask=mask)


@triton.jit
def pool_bias_relu_gradient(dz, index, dx, sums, rows, height, width, out_height, out_width, units, blocks,
                            POOL: tl.constexpr, LEFT_Y: tl.constexpr, LEFT_X: tl.constexpr, OFF: tl.constexpr,
                            UNIT: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
                            PROGRAMS: tl.constexpr):  # fmt: skip
    """Writes the gradient of x, and each program's sums, the bias's gradient; grid (PROGRAMS, channel blocks)."""
    program = tl.program_id(0)
    channels = units * UNIT
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    is_channel = c < channels
    total = tl.zeros((BM, BC), tl.float32)
    for block in range(program, blocks, PROGRAMS):
        m = block * BM + tl.arange(0, BM)
        mask = _mask(m, c, rows, channels, WHOLE)
        at = m[:, None] * channels + c[None, :]
        gradient = tl.load(dz + at, mask=mask, other=0.0).to(tl.float32)
        best = tl.load(index + at, mask=mask, other=0)
        _scatter(dx, gradient, best, m, c, mask, height, width, out_height, out_width, channels, POOL, LEFT_Y, LEFT_X)
        total += tl.where(best == OFF, 0.0, gradient)
    tl.store(sums + program * channels + c, tl.sum(total, 0), mask=is_channel)


@triton.jit
def global_maximum(x, z, images, size, units, UNIT: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr,
                   BC: tl.constexpr):  # fmt: skip
    """Writes the maximum over the `size` pixels of each image and channel; grid (image blocks, channel blocks)."""
    channels = units * UNIT
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = _mask(m, c, images, channels, WHOLE)
    best = tl.full((BM, BC), -float("inf"), tl.float32)
    for p in range(size):
        at = (m * size + p)[:, None] * channels + c[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        best = tl.where((value > best) | (value != value), value, best)
    tl.store(z + m[:, None] * channels + c[None, :], best, mask=mask)


@triton.jit
def global_maximum_gradient(dz, x, dx, images, size, units, UNIT: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr,
                            BC: tl.constexpr):  # fmt: skip
    """Shares the gradient evenly among equal maxima, as torch's `amax`; grid (image blocks, channel blocks)."""
    channels = units * UNIT
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = _mask(m, c, images, channels, WHOLE)
    gradient = tl.load(dz + m[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    best = tl.full((BM, BC), -float("inf"), tl.float32)
    count = tl.zeros((BM, BC), tl.float32)
    for p in range(size):
        at = (m * size + p)[:, None] * channels + c[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        count = tl.where(value > best, 0.0, count) + (value >= best).to(tl.float32)
        best = tl.where((value > best) | (value != value), value, best)
    share = gradient / tl.where(best == best, count, 0.0)
    for p in range(size):
        at = (m * size + p)[:, None] * channels + c[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, (value == best).to(tl.float32) * share, mask=mask)
