"""Triton kernel of a linear layer's gradient before its bias and activation."""
# mypy: ignore-errors
# ruff: noqa: PLR0913

import triton
import triton.language as tl


@triton.jit
def gradient(dz, z, dy, dbias, rows, columns, RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Writes the gradient before a ReLU, if there is one, and its sums over the rows; grid (blocks of columns)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros((BM, BC), tl.float32)
    for start in range(0, rows, BM):
        m = start + tl.arange(0, BM)
        mask = (m < rows)[:, None] & (c < columns)[None, :]
        at = m[:, None] * columns + c[None, :]
        value = tl.load(dz + at, mask=mask, other=0.0)
        if RELU:
            value = tl.where(tl.load(z + at, mask=mask, other=0.0).to(tl.float32) <= 0, 0.0, value.to(tl.float32))
            tl.store(dy + at, value.to(dy.dtype.element_ty), mask=mask)
        total += value.to(tl.float32)
    tl.store(dbias + c, tl.sum(total, 0).to(dbias.dtype.element_ty), mask=c < columns)
