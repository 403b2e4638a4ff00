"""Triton kernels over the tensors of a network, several in one start: casts of weights, and updates of optimizers.

Lists of tensors are tuples here. Each tensor has programs of its own, one after the other; `firsts` are the numbers of
their first ones. A program computes `LOOPS` blocks, as it takes a while to find its tensor.
"""
# mypy: ignore-errors
# ruff: noqa: PLR0913

import triton
import triton.language as tl


@triton.jit
def _cast_block(x, y, at, mask):
    tl.store(y + at, tl.load(x + at, mask=mask).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["firsts", "sizes"])
def cast(sources, targets, firsts, sizes, LOOPS: tl.constexpr, BLOCK: tl.constexpr):
    """Copies each source to its target, of another type; grid (programs)."""
    program = tl.program_id(0)
    x, y, first, size = sources[0], targets[0], firsts[0], sizes[0]
    for i in tl.static_range(1, len(sources)):
        is_here = program >= firsts[i]
        x, y = tl.where(is_here, sources[i], x), tl.where(is_here, targets[i], y)
        first, size = tl.where(is_here, firsts[i], first), tl.where(is_here, sizes[i], size)
    for loop in range(LOOPS):
        block = (program - first) * LOOPS + loop
        at = block * BLOCK + tl.arange(0, BLOCK)
        if (block + 1) * BLOCK <= size:  # without a mask, which would keep loads from being wide
            _cast_block(x, y, at, None)
        else:
            _cast_block(x, y, at, at < size)


@triton.jit
def _sgd_block(w, v, g, at, mask, lr, keep, momentum):
    x = tl.load(w + at, mask=mask)
    gradient = tl.load(g + at, mask=mask).to(tl.float32)
    if momentum > 0:
        moved = momentum * tl.load(v + at, mask=mask) + gradient
        tl.store(v + at, moved, mask=mask)
        gradient += momentum * moved
    tl.store(w + at, keep * x - lr * gradient, mask=mask)


# The factor is an element of an epoch's: see `image_kernels`.
@triton.jit(do_not_specialize=["firsts", "sizes"], do_not_specialize_on_alignment=["factor"])
def sgd(weights, momenta, gradients, firsts, sizes, rates, decays, shares, factor, LOOPS: tl.constexpr,
        BLOCK: tl.constexpr):  # fmt: skip
    """Updates weights by SGD with Nesterov momentum and decoupled decay; grid (programs).

    `rates`, `decays` and `shares` (of the momentum that stays) are numbers of each tensor; one without momentum has any
    tensor for it. `factor` is the learning rate's.
    """
    program = tl.program_id(0)
    w, v, g, first, size = weights[0], momenta[0], gradients[0], firsts[0], sizes[0]
    rate, decay, momentum = rates[0], decays[0], shares[0]
    for i in tl.static_range(1, len(weights)):
        is_here = program >= firsts[i]
        w, v = tl.where(is_here, weights[i], w), tl.where(is_here, momenta[i], v)
        g = tl.where(is_here, gradients[i], g)
        first, size = tl.where(is_here, firsts[i], first), tl.where(is_here, sizes[i], size)
        rate, decay = tl.where(is_here, rates[i], rate), tl.where(is_here, decays[i], decay)
        momentum = tl.where(is_here, shares[i], momentum)
    lr = tl.load(factor) * rate
    keep = 1.0 - lr * decay
    for loop in range(LOOPS):
        block = (program - first) * LOOPS + loop
        at = block * BLOCK + tl.arange(0, BLOCK)
        if (block + 1) * BLOCK <= size:
            _sgd_block(w, v, g, at, None, lr, keep, momentum)
        else:
            _sgd_block(w, v, g, at, at < size, lr, keep, momentum)
