"""The Triton kernels as differentiable functions. Import this only where Triton is installed; see `choice`."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trainer.kernels import norm_kernels as kernels
from trainer.kernels.launch import MERGE_BLOCK_CHANNELS, Pooling, Rows, Tiling, empty_floats, empty_images, launch
from trainer.kernels.operations import Activation

_STATISTICS = Tiling(2048, block_channels=32)
_POOLED_STATISTICS = Tiling(1024, block_channels=64, programs=1024)
_RESULTS = Tiling(4096, block_channels=128)
_MAXIMA = Tiling(1024, block_channels=64, warps=8)
_GRADIENT_SUMS = Tiling(2048, block_channels=64)
_GRADIENTS = Tiling(2048, block_channels=128)


def norm_activation(
    x: torch.Tensor,
    norm: torch.nn.BatchNorm2d,
    activation: Activation,
    *,
    pool: int,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Computes `operations.norm_activation`, and updates the norm's running statistics."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    result: torch.Tensor = _NormActivation.apply(x, norm.weight, norm.bias, residual, norm, activation, pool)
    return result


def bias_gelu_gradient(dz: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of the bias of GELU(x + bias), float32 `[C]`, from that of the result."""
    return _reduce(_channels_last(dz), x, (bias, bias, bias, bias), "gelu", norm=False)[0]


def pool_bias_relu(x: torch.Tensor, bias: torch.Tensor, pool: int) -> torch.Tensor:
    """Returns ReLU(max-pool(x) + bias) for channels `[C]`."""
    result: torch.Tensor = _PoolBiasRelu.apply(x, bias, pool)
    return result


def global_maximum(x: torch.Tensor) -> torch.Tensor:
    """Returns the maximum over each image's pixels, `[B, C]`, for images of at most some hundred pixels."""
    result: torch.Tensor = _GlobalMaximum.apply(x)
    return result


class _NormActivation(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 (the arguments of an autograd function are one list)
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor | None,
        norm: torch.nn.BatchNorm2d,
        activation: Activation,
        pool: int,
    ) -> torch.Tensor:
        x, residual = _channels_last(x), None if residual is None else _channels_last(residual)
        pooling = Pooling(pool, x.size(2), x.size(3))
        pooled, index, mean, inverse_deviation = _normalize(x, norm, pooling)
        z, work = torch.empty_like(pooled), _rows(pooled, _RESULTS)
        launch(
            kernels.activate,
            work.grid,
            pooled,
            z,
            z if residual is None else residual,
            mean,
            inverse_deviation,
            weight,
            bias,
            work.rows,
            work.units,
            RESIDUAL=residual is not None,
            ACT=activation,
            **work.constants,
        )
        # The sign of the result is all that ReLU's gradient needs, and the next layer keeps the result anyway.
        other = z if residual is not None and activation == "relu" else residual
        ctx.save_for_backward(pooled, index, mean, inverse_deviation, weight, bias, other)
        ctx.pooling, ctx.activation = pooling, activation
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[Any, ...]:
        pooled, index, mean, inverse_deviation, weight, bias, other = ctx.saved_tensors
        pooling, activation, dz = ctx.pooling, ctx.activation, _channels_last(dz)
        scales = (mean, inverse_deviation, weight, bias)
        dresidual = None if other is None else torch.empty_like(dz)
        sums, products = _reduce(dz, pooled, scales, activation, other=other, du=dresidual)
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        others = (
            products if needs_weight else None,
            sums if needs_bias else None,
            dresidual if needs_residual else None,
            None,
            None,
            None,
        )
        if not needs_x:
            return None, *others
        dx, work = empty_images(dz, pooling.height, pooling.width), _rows(pooled, _GRADIENTS)
        launch(
            kernels.apply_gradient,
            work.grid,
            dz if dresidual is None else dresidual,
            pooled,
            index,
            dx,
            *scales,
            sums,
            products,
            work.rows,
            *pooling.sizes,
            work.units,
            ACT=activation if dresidual is None else "none",
            POOL=pooling.size,
            LEFT_Y=pooling.left[0],
            LEFT_X=pooling.left[1],
            **work.constants,
        )
        return dx, *others


class _PoolBiasRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor, pool: int) -> torch.Tensor:
        x = _channels_last(x)
        pooling = Pooling(pool, x.size(2), x.size(3))
        z = empty_images(x, pooling.out_height, pooling.out_width)
        index, work = torch.empty_like(z, dtype=torch.uint8), _rows(z, _GRADIENTS)
        launch(
            kernels.pool_bias_relu,
            work.grid,
            x,
            z,
            index,
            bias,
            work.rows,
            *pooling.sizes,
            work.units,
            POOL=pool,
            OFF=kernels.OFF,
            **work.constants,
        )
        ctx.save_for_backward(index)
        ctx.pooling = pooling
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[Any, ...]:
        (index,) = ctx.saved_tensors
        pooling, dz = ctx.pooling, _channels_last(dz)
        work = _rows(dz, _GRADIENT_SUMS)
        dx = empty_images(dz, pooling.height, pooling.width)
        partial = empty_floats(dz, work.programs, work.channels)
        launch(
            kernels.pool_bias_relu_gradient,
            work.summing_grid,
            dz,
            index,
            dx,
            partial,
            work.rows,
            *pooling.sizes,
            work.units,
            work.blocks,
            POOL=pooling.size,
            LEFT_Y=pooling.left[0],
            LEFT_X=pooling.left[1],
            OFF=kernels.OFF,
            **work.constants,
            PROGRAMS=work.programs,
        )
        return dx, add_up(partial), None


class _GlobalMaximum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = _channels_last(x)
        z = torch.empty(x.shape[:2], dtype=x.dtype, device=x.device)
        size, work = x.size(2) * x.size(3), Rows.of(x.size(0), x.size(1), _MAXIMA)
        launch(kernels.global_maximum, work.grid, x, z, work.rows, size, work.units, **work.constants)
        ctx.save_for_backward(x)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        dz, dx = dz.contiguous(), torch.empty_like(x)
        size, work = x.size(2) * x.size(3), Rows.of(x.size(0), x.size(1), _MAXIMA)
        launch(kernels.global_maximum_gradient, work.grid, dz, x, dx, work.rows, size, work.units, **work.constants)
        return dx


def add_up(partial: torch.Tensor) -> torch.Tensor:
    """Returns the sum over the rows of `partial`, float32 `[P, N]`; P is a power of two."""
    programs, columns = partial.shape
    total = empty_floats(partial, columns)
    grid = (-(-columns // MERGE_BLOCK_CHANNELS),)
    launch(kernels.merge_sums, grid, partial, total, columns, BC=MERGE_BLOCK_CHANNELS, PROGRAMS=programs)
    return total


def _normalize(x: torch.Tensor, norm: torch.nn.BatchNorm2d, pooling: Pooling) -> tuple[torch.Tensor, ...]:
    """Pools x and updates the norm; returns pooled images, indices of maxima, means and inverse deviations."""
    pooled, index, tiling = x, x, _STATISTICS
    if pooling.size > 1:
        pooled = empty_images(x, pooling.out_height, pooling.out_width)
        index, tiling = torch.empty_like(pooled, dtype=torch.uint8), _POOLED_STATISTICS
    work = _rows(pooled, tiling)
    counts = empty_floats(x, work.programs)
    partial = empty_floats(x, 2, work.programs, work.channels)
    launch(
        kernels.statistics,
        work.summing_grid,
        x,
        pooled,
        index,
        counts,
        partial[0],
        partial[1],
        work.rows,
        *pooling.sizes,
        work.units,
        work.blocks,
        POOL=pooling.size,
        **work.constants,
        PROGRAMS=work.programs,
    )
    mean, inverse_deviation = empty_floats(x, work.channels), empty_floats(x, work.channels)
    launch(
        kernels.merge_statistics,
        (-(-work.channels // MERGE_BLOCK_CHANNELS),),
        counts,
        partial[0],
        partial[1],
        mean,
        inverse_deviation,
        norm.running_mean,
        norm.running_var,
        work.rows,
        work.units,
        norm.eps,
        norm.momentum,
        UNIT=work.unit,
        BC=MERGE_BLOCK_CHANNELS,
        PROGRAMS=work.programs,
    )
    return pooled, index, mean, inverse_deviation


def _reduce(  # noqa: PLR0913 (of one kernel)
    dz: torch.Tensor,
    x: torch.Tensor,
    scales: tuple[torch.Tensor, ...],
    activation: Activation,
    *,
    norm: bool = True,
    other: torch.Tensor | None = None,
    du: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sums of the gradient before the activation, and those of its products with normalised values."""
    work = _rows(dz, _GRADIENT_SUMS)
    partial = empty_floats(dz, work.programs, 2 if norm else 1, work.channels)
    launch(
        kernels.reduce_gradient,
        work.summing_grid,
        dz,
        x,
        dz if other is None else other,
        dz if du is None else du,
        *scales,
        partial,
        work.rows,
        work.units,
        work.blocks,
        NORM=norm,
        RESIDUAL=other is not None,
        ACT=activation,
        **work.constants,
        PROGRAMS=work.programs,
    )
    totals = add_up(partial.flatten(1)).view(-1, work.channels)
    return totals[0], totals[-1]


def _rows(images: torch.Tensor, tiling: Tiling) -> Rows:
    return Rows.of(images.numel() // images.size(1), images.size(1), tiling)


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)
