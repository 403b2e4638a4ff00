"""Triton kernel of the cross-entropy: losses, correct answers and the gradient of the logits in one pass."""
# mypy: ignore-errors
# ruff: noqa: PLR0913

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["labels"])  # a slice of an epoch's, see `image_kernels`
def cross_entropy(logits, labels, gradient, partial, rows, classes, smoothing, factor, BM: tl.constexpr,
                  BC: tl.constexpr):  # fmt: skip
    """Writes `factor` times the gradient of the summed loss, and each program's losses and correct answers, summed.

    Grid (programs). `logits` are [rows, classes], `partial` [programs, 2]; a program without rows writes zeros.
    """
    program = tl.program_id(0)
    m = program * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    is_row = m < rows
    mask = is_row[:, None] & (c < classes)[None, :]
    at = m[:, None] * classes + c[None, :]
    x = tl.load(logits + at, mask=mask, other=-float("inf")).to(tl.float32)
    label = tl.load(labels + m, mask=is_row, other=0)
    top = tl.where(is_row, tl.max(x, 1), 0.0)
    exponential = tl.exp(x - top[:, None])
    total = tl.where(is_row, tl.sum(exponential, 1), 1.0)
    surprise = tl.where(mask, tl.log(total)[:, None] + top[:, None] - x, 0.0)  # minus the logarithms of the shares
    target = (1.0 - smoothing) * (c[None, :] == label[:, None]).to(tl.float32) + smoothing / classes
    tl.store(gradient + at, (exponential / total[:, None] - target) * factor, mask=mask)
    # A class that is no target may be impossible: infinity times 0 is no number.
    loss = tl.sum(tl.sum(tl.where(target > 0, surprise * target, 0.0), 1), 0)
    answer = tl.min(tl.where(mask & (x == top[:, None]), c[None, :], BC), 1)
    correct = tl.sum(((answer == label) & is_row).to(tl.float32), 0)
    tl.store(partial + 2 * program, loss)
    tl.store(partial + 2 * program + 1, correct)
