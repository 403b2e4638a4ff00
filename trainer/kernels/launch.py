"""Starts kernels, and cuts tensors in blocks for those of `norm_kernels`."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch

_MIN_BLOCKS = 128
"""Blocks are smaller where there would be fewer of them: one for each of some 130 multiprocessors."""
_MIN_BLOCK_SIZE = 1024
MERGE_BLOCK_CHANNELS = 8

Start = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""A kernel, its grid, its arguments and its constants."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel cuts a tensor in blocks, on every GPU: the order of sums, and so a run's bits, depends on it.

    Args:
        block_size: values in a block, as many as its registers allow.
        block_channels: channels in a block, at most. More are longer pieces of memory, fewer make fewer partial sums.
        programs: programs that sum, over all blocks of channels, at most: 4 for each of some 130 multiprocessors all
            run at once, and each pays once for adding up its threads' sums.
        warps: threads of a program, in 32.
    """

    block_size: int
    block_channels: int
    programs: int = 512
    warps: int = 4


@dataclass(frozen=True, slots=True)
class Rows:
    """A channels-last tensor as a matrix of rows times channels, in blocks.

    Args:
        rows: pixels of all images.
        units: `units * unit` is the number of channels.
        unit: 8 if that divides the channels, else 1.
        block_rows: rows of a block, a power of two.
        block_channels: channels of a block, a power of two.
        blocks: blocks of rows.
        channel_blocks: blocks of channels.
        programs: programs that sum over the rows of a block of channels, a power of two; they have two blocks or more.
        warps: threads of a program, in 32.
    """

    rows: int
    units: int
    unit: int
    block_rows: int
    block_channels: int
    blocks: int
    channel_blocks: int
    programs: int
    warps: int

    @classmethod
    def of(cls, rows: int, channels: int, tiling: Tiling) -> Self:
        unit = 8 if channels % 8 == 0 else 1
        block_channels = min(tiling.block_channels, power_of_two(channels))
        channel_blocks = math.ceil(channels / block_channels)
        block_size = tiling.block_size
        while block_size > _MIN_BLOCK_SIZE and rows * channels < _MIN_BLOCKS * block_size:
            block_size //= 2
        block_rows = block_size // block_channels
        blocks = math.ceil(rows / block_rows)
        programs = min(power_of_two(math.ceil(blocks / 2)), max(1, tiling.programs // power_of_two(channel_blocks)))
        units = channels // unit
        return cls(rows, units, unit, block_rows, block_channels, blocks, channel_blocks, programs, tiling.warps)

    @property
    def grid(self) -> tuple[int, int]:
        """One program for each block."""
        return self.blocks, self.channel_blocks

    @property
    def summing_grid(self) -> tuple[int, int]:
        return self.programs, self.channel_blocks

    @property
    def constants(self) -> dict[str, Any]:
        """What all kernels of blocks are compiled for."""
        is_whole = self.channels % self.block_channels == 0
        sizes = {"UNIT": self.unit, "WHOLE": is_whole, "BM": self.block_rows, "BC": self.block_channels}
        return {**sizes, "num_warps": self.warps}

    @property
    def channels(self) -> int:
        return self.units * self.unit


@dataclass(frozen=True, slots=True)
class Pooling:
    """Windows of `size` x `size` pixels that do not overlap, as `max_pool2d` has them; 1 is no pooling."""

    size: int
    height: int
    width: int

    @property
    def out_height(self) -> int:
        return self.height // self.size

    @property
    def out_width(self) -> int:
        return self.width // self.size

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.height, self.width, self.out_height, self.out_width

    @property
    def left(self) -> tuple[int, int]:
        """Lines and columns that no window covers."""
        return self.height % self.size, self.width % self.size


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Starts one of our Triton kernels with fused multiply-adds, whatever this version of Triton does unless told."""
    _start((kernel, grid, arguments, {**constants, "enable_fp_fusion": True}))


def _start_now(start: Start) -> None:
    kernel, grid, arguments, constants = start
    kernel[grid](*arguments, **constants)


_start: Callable[[Start], None] = _start_now


@contextmanager
def started_by(function: Callable[[Start], None]) -> Iterator[None]:
    """Context in which a function gets the kernels, and the GPU none: in all threads, as autograd has its own."""
    global _start
    before, _start = _start, function
    try:
        yield
    finally:
        _start = before


def power_of_two(number: int) -> int:
    """Returns the smallest power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def empty_images(
    like: torch.Tensor, height: int, width: int, dtype: torch.dtype | None = None, *, channels: int | None = None
) -> torch.Tensor:
    """Returns an uninitialised channels-last tensor, with the images and, where none are given, channels of another."""
    size = (like.size(0), channels or like.size(1), height, width)
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def empty_floats(like: torch.Tensor, *size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)
