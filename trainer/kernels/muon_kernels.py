"""Triton kernels of Muon, over all filters of a batch: momentum and norms before Newton-Schulz, the update after it.

Lists of tensors are tuples here. A filter is a matrix of `lengths[i]` rows, in the order of its memory, and has a place
in a batch [filters, HEIGHT, WIDTH] that is padded with zeros; there it is transposed if it has more rows than columns.
"""
# mypy: ignore-errors
# ruff: noqa: PLR0913

import triton
import triton.language as tl


@triton.jit
def _place(at, size, length, WIDTH: tl.constexpr, PLAIN: tl.constexpr):
    """Returns where values of a filter are in its matrix; `PLAIN`: none is tall, and columns are multiples of 4."""
    columns = size // length
    row = at // columns
    if PLAIN:
        return tl.max_contiguous(tl.multiple_of(at + row * (WIDTH - columns), 4), 4)
    column = at - row * columns
    return tl.where(length > columns, column * WIDTH + row, row * WIDTH + column)


@triton.jit(do_not_specialize=["lengths"])
def collect(weights, momenta, gradients, updates, partial, sizes, lengths, share, HEIGHT: tl.constexpr,
            WIDTH: tl.constexpr, PLAIN: tl.constexpr, MOMENTUM: tl.constexpr, PROGRAMS: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """Moves the momenta, and writes updates to their batch, and sums of squares of updates and weights.

    Grid (PROGRAMS, filters). `share` of the momenta stays. `partial` is [filters, 2, PROGRAMS].
    """
    program, filter = tl.program_id(0), tl.program_id(1)
    w, v, g, size, length = weights[0], momenta[0], gradients[0], sizes[0], lengths[0]
    for i in tl.static_range(1, len(weights)):
        w, v = tl.where(filter == i, weights[i], w), tl.where(filter == i, momenta[i], v)
        g, size = tl.where(filter == i, gradients[i], g), tl.where(filter == i, sizes[i], size)
        length = tl.where(filter == i, lengths[i], length)
    of_updates = tl.zeros((BLOCK,), tl.float32)
    of_weights = tl.zeros((BLOCK,), tl.float32)
    for block in range(program, tl.cdiv(size, BLOCK), PROGRAMS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        mask = at < size
        x = tl.load(w + at, mask=mask, other=0.0)
        update = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
        if MOMENTUM:
            moved = share * tl.load(v + at, mask=mask, other=0.0) + update
            tl.store(v + at, moved, mask=mask)
            update += share * moved
        low = update.to(updates.dtype.element_ty)
        place = filter * (HEIGHT * WIDTH) + _place(at, size, length, WIDTH, PLAIN)
        tl.store(updates + place, low, mask=mask)
        update = low.to(tl.float32)
        of_updates += update * update
        of_weights += x * x
    tl.store(partial + (2 * filter) * PROGRAMS + program, tl.sum(of_updates, 0))
    tl.store(partial + (2 * filter + 1) * PROGRAMS + program, tl.sum(of_weights, 0))


@triton.jit
def polynomial(gram, result, partial, a, b, c, SIZE: tl.constexpr, FIRST: tl.constexpr, PROGRAMS: tl.constexpr,
               BM: tl.constexpr):  # fmt: skip
    """Writes a + b·G + c·G² of symmetric matrices [filters, SIZE, SIZE]; grid (filters, blocks of rows, of columns).

    In the first iteration matrices are not divided by their norms yet, the roots of the sums of `partial`: so G is
    divided by their squares, and the result by them. A matrix whose sum is infinite becomes 0, as by a division.
    """
    filter = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(2) * BM + tl.arange(0, BM)
    scale = 1.0
    if FIRST:
        total = tl.sum(tl.load(partial + 2 * filter * PROGRAMS + tl.arange(0, PROGRAMS)), 0)
        scale = 1.0 / (tl.sqrt(total) + 1e-7)
    square = scale * scale
    mine = gram + filter * (SIZE * SIZE)
    total = tl.zeros((BM, BM), tl.float32)
    for start in range(0, SIZE, BM):
        k = start + tl.arange(0, BM)
        x = tl.load(mine + m[:, None] * SIZE + k[None, :], mask=(m < SIZE)[:, None] & (k < SIZE)[None, :], other=0.0)
        y = tl.load(mine + k[:, None] * SIZE + n[None, :], mask=(k < SIZE)[:, None] & (n < SIZE)[None, :], other=0.0)
        if FIRST:
            x = tl.where(square > 0, x.to(tl.float32) * square, 0.0).to(x.dtype)
            y = tl.where(square > 0, y.to(tl.float32) * square, 0.0).to(y.dtype)
        total = tl.dot(x, y, total, input_precision="ieee")
    mask = (m < SIZE)[:, None] & (n < SIZE)[None, :]
    at = filter * (SIZE * SIZE) + m[:, None] * SIZE + n[None, :]
    g = tl.load(gram + at, mask=mask, other=0.0).to(tl.float32)
    if FIRST:
        g = tl.where(square > 0, g * square, 0.0)
    value = a * (m[:, None] == n[None, :]).to(tl.float32) + b * g + c * total
    tl.store(result + at, (scale * value).to(result.dtype.element_ty), mask=mask)


# The factor is an element of an epoch's: see `image_kernels`.
@triton.jit(do_not_specialize=["lengths"], do_not_specialize_on_alignment=["factor"])
def update(weights, orthogonal, partial, sizes, lengths, factor, rate, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
           PLAIN: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gives each weight the norm of a matrix with orthogonal rows, and subtracts its update; grid (PROGRAMS, filters).

    The learning rate is `factor` times `rate`.
    """
    program, filter = tl.program_id(0), tl.program_id(1)
    w, size, length = weights[0], sizes[0], lengths[0]
    for i in tl.static_range(1, len(weights)):
        w, size = tl.where(filter == i, weights[i], w), tl.where(filter == i, sizes[i], size)
        length = tl.where(filter == i, lengths[i], length)
    total = tl.sum(tl.load(partial + (2 * filter + 1) * PROGRAMS + tl.arange(0, PROGRAMS)), 0)
    keep = tl.sqrt(length.to(tl.float32)) / tl.sqrt(total)
    lr = tl.load(factor) * rate
    for block in range(program, tl.cdiv(size, BLOCK), PROGRAMS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        mask = at < size
        place = filter * (HEIGHT * WIDTH) + _place(at, size, length, WIDTH, PLAIN)
        change = tl.load(orthogonal + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(w + at, keep * tl.load(w + at, mask=mask) - lr * change, mask=mask)
