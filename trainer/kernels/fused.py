"""The Triton kernels as differentiable functions. Import this only where Triton is installed; see `choice`."""

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from trainer.kernels import norm_kernels as kernels
from trainer.kernels.launch import MERGE_BLOCK_CHANNELS, Pooling, Rows, empty_floats, empty_images, launch, power_of_two

Activation = Literal["none", "relu", "gelu"]


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


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns GELU(x + bias) for channels `[C]`."""
    result: torch.Tensor = _BiasGelu.apply(x, bias)
    return result


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
        work = Rows.of(x.size(0) * pooling.out_height * pooling.out_width, x.size(1))
        pooled, index, mean, inverse_deviation = _normalize(x, norm, pooling, work)
        z = torch.empty_like(pooled)
        launch(
            kernels.activate,
            (work.blocks, work.channel_blocks),
            pooled,
            z,
            z if residual is None else residual,
            mean,
            inverse_deviation,
            weight,
            bias,
            work.rows,
            work.units,
            NORM=True,
            RESIDUAL=residual is not None,
            ACT=activation,
            UNIT=work.unit,
            BM=work.block_rows,
            BC=work.block_channels,
        )
        ctx.save_for_backward(pooled, index, mean, inverse_deviation, weight, bias, residual)
        ctx.work, ctx.pooling, ctx.activation = work, pooling, activation
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[Any, ...]:
        pooled, index, mean, inverse_deviation, weight, bias, residual = ctx.saved_tensors
        work, pooling, activation, dz = ctx.work, ctx.pooling, ctx.activation, _channels_last(dz)
        scales = (mean, inverse_deviation, weight, bias)
        dresidual = None if residual is None else torch.empty_like(dz)
        sums, products = _reduce(dz, pooled, scales, work, activation, residual=residual, du=dresidual)
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
        dx = empty_images(dz, pooling.height, pooling.width)
        launch(
            kernels.apply_gradient,
            (work.blocks, work.channel_blocks),
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
            NORM=True,
            ACT=activation if dresidual is None else "none",
            POOL=pooling.size,
            LEFT_Y=pooling.left[0],
            LEFT_X=pooling.left[1],
            UNIT=work.unit,
            BM=work.block_rows,
            BC=work.block_channels,
        )
        return dx, *others


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = _channels_last(x)
        work = Rows.of(x.numel() // x.size(1), x.size(1))
        z = torch.empty_like(x)
        launch(
            kernels.activate,
            (work.blocks, work.channel_blocks),
            x,
            z,
            x,
            bias,
            bias,
            bias,
            bias,
            work.rows,
            work.units,
            NORM=False,
            RESIDUAL=False,
            ACT="gelu",
            UNIT=work.unit,
            BM=work.block_rows,
            BC=work.block_channels,
        )
        ctx.save_for_backward(x, bias)
        ctx.work = work
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[Any, ...]:
        x, bias = ctx.saved_tensors
        work, dz = ctx.work, _channels_last(dz)
        needs_x, needs_bias = ctx.needs_input_grad
        scales = (bias, bias, bias, bias)
        dbias = _reduce(dz, x, scales, work, "gelu", norm=False)[0] if needs_bias else None
        if not needs_x:  # the convolution before it is frozen
            return None, dbias
        dx = torch.empty_like(x)
        launch(
            kernels.apply_gradient,
            (work.blocks, work.channel_blocks),
            dz,
            x,
            x,
            dx,
            *scales,
            bias,
            bias,
            work.rows,
            *Pooling(1, x.size(2), x.size(3)).sizes,
            work.units,
            NORM=False,
            ACT="gelu",
            POOL=1,
            LEFT_Y=0,
            LEFT_X=0,
            UNIT=work.unit,
            BM=work.block_rows,
            BC=work.block_channels,
        )
        return dx, dbias


class _PoolBiasRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor, pool: int) -> torch.Tensor:
        x = _channels_last(x)
        pooling = Pooling(pool, x.size(2), x.size(3))
        work = Rows.of(x.size(0) * pooling.out_height * pooling.out_width, x.size(1))
        z = empty_images(x, pooling.out_height, pooling.out_width)
        index = torch.empty_like(z, dtype=torch.uint8)
        launch(
            kernels.pool_bias_relu,
            (work.blocks, work.channel_blocks),
            x,
            z,
            index,
            bias,
            work.rows,
            *pooling.sizes,
            work.units,
            POOL=pool,
            OFF=kernels.OFF,
            UNIT=work.unit,
            BM=work.block_rows,
            BC=work.block_channels,
        )
        ctx.save_for_backward(index)
        ctx.work, ctx.pooling = work, pooling
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[Any, ...]:
        (index,) = ctx.saved_tensors
        work, pooling, dz = ctx.work, ctx.pooling, _channels_last(dz)
        dx = empty_images(dz, pooling.height, pooling.width)
        partial = empty_floats(dz, work.programs, work.channels)
        launch(
            kernels.pool_bias_relu_gradient,
            (work.programs, work.channel_blocks),
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
            UNIT=work.unit,
            BM=work.block_rows,
            BC=work.block_channels,
            PROGRAMS=work.programs,
        )
        return dx, add_up(partial), None


class _GlobalMaximum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = _channels_last(x)
        z = torch.empty(x.shape[:2], dtype=x.dtype, device=x.device)
        size = x.size(2) * x.size(3)
        work, block = Rows.of(size, x.size(1)), power_of_two(size)
        grid = (len(x), work.channel_blocks)
        launch(kernels.global_maximum, grid, x, z, size, work.units, UNIT=work.unit, BP=block, BC=work.block_channels)
        ctx.save_for_backward(x)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        size = x.size(2) * x.size(3)
        work, block = Rows.of(size, x.size(1)), power_of_two(size)
        launch(
            kernels.global_maximum_gradient,
            (len(x), work.channel_blocks),
            dz.contiguous(),
            x,
            dx,
            size,
            work.units,
            UNIT=work.unit,
            BP=block,
            BC=work.block_channels,
        )
        return dx


def add_up(partial: torch.Tensor) -> torch.Tensor:
    """Returns the sum over the rows of `partial`, float32 `[P, N]`; P is a power of two."""
    programs, columns = partial.shape
    total = empty_floats(partial, columns)
    grid = (-(-columns // MERGE_BLOCK_CHANNELS),)
    launch(kernels.merge_sums, grid, partial, total, columns, BC=MERGE_BLOCK_CHANNELS, PROGRAMS=programs)
    return total


def _normalize(x: torch.Tensor, norm: torch.nn.BatchNorm2d, pooling: Pooling, work: Rows) -> tuple[torch.Tensor, ...]:
    """Pools x and updates the norm; returns pooled images, indices of maxima, means and inverse deviations."""
    pooled, index = x, x
    if pooling.size > 1:
        pooled = empty_images(x, pooling.out_height, pooling.out_width)
        index = torch.empty_like(pooled, dtype=torch.uint8)
    counts = empty_floats(x, work.programs)
    partial = empty_floats(x, 2, work.programs, work.channels)
    launch(
        kernels.statistics,
        (work.programs, work.channel_blocks),
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
        UNIT=work.unit,
        BM=work.block_rows,
        BC=work.block_channels,
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
    work: Rows,
    activation: Activation,
    *,
    norm: bool = True,
    residual: torch.Tensor | None = None,
    du: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sums of the gradient before the activation, and those of its products with normalised values."""
    partial = empty_floats(dz, work.programs, 2 if norm else 1, work.channels)
    launch(
        kernels.reduce_gradient,
        (work.programs, work.channel_blocks),
        dz,
        x,
        dz if residual is None else residual,
        dz if du is None else du,
        *scales,
        partial,
        work.rows,
        work.units,
        work.blocks,
        NORM=norm,
        RESIDUAL=residual is not None,
        ACT=activation,
        UNIT=work.unit,
        BM=work.block_rows,
        BC=work.block_channels,
        PROGRAMS=work.programs,
    )
    totals = add_up(partial.flatten(1)).view(-1, work.channels)
    return totals[0], totals[-1]


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)
