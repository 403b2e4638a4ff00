"""Muon: the update of a filter or matrix is its momentum, made orthogonal by Newton-Schulz iterations.

Keller Jordan, https://kellerjordan.github.io/posts/muon/. On CPUs one filter comes after the other. On GPUs, where each
product of small matrices is hardly more than its launch, all filters are padded with zeros into one batch of matrices:
zeros change no norm and no product.
"""

import math
from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from trainer.kernels.choice import MAX_NUMEL
from trainer.kernels.updates import is_updated

if TYPE_CHECKING:
    from trainer.kernels.muon import MuonBatch

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""The polynomial's coefficients."""
_MAX_BATCH = 32
_MAX_PADDING = 4
"""Matrices are padded into one batch if that has at most this many times their own elements; else by shape."""


def muon_step(parameters: list[torch.Tensor], updates: list[torch.Tensor], lr: torch.Tensor) -> None:
    """Updates the parameters, one after the other; each keeps the norm of a matrix with orthogonal rows."""
    for parameter, update in zip(parameters, updates, strict=True):
        parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
        parameter.sub_(newton_schulz(update.flatten(1)).view_as(parameter) * lr)


def newton_schulz(matrices: torch.Tensor, num_iterations: int = 3) -> torch.Tensor:
    """Returns about U·Vᵀ of the singular value decomposition U·S·Vᵀ of a matrix, or of each of a batch.

    Args:
        matrices: float32 `[m, n]`, or `[B, m, n]` with m ≤ n.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    if x.ndim == 3:
        x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(num_iterations):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.to(matrices.dtype)
    x = x / (x.norm() + 1e-7)
    is_tall = x.size(0) > x.size(1)
    if is_tall:
        x = x.T
    for _ in range(num_iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: torch.Tensor = x.T if is_tall else x
    return result.to(matrices.dtype)


class BatchedMuon:
    """`muon_step` for several parameters at once, in few operations, for GPUs: by kernels of our own, or torch's.

    Args:
        parameters: float32 on one device; filters or matrices, whose first dimension is that of their rows.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        wide = [_wide_shape(parameter) for parameter in parameters]
        largest = max(rows for rows, _ in wide) * max(columns for _, columns in wide)
        is_one_batch = largest * len(wide) <= _MAX_PADDING * sum(rows * columns for rows, columns in wide)
        batches: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, shape in enumerate(wide):
            batches[(0, 0) if is_one_batch else shape].append(number)
        starts = [(numbers, start) for numbers in batches.values() for start in range(0, len(numbers), _MAX_BATCH)]
        self._numbers = [numbers[start : start + _MAX_BATCH] for numbers, start in starts]
        self._parameters = parameters
        self._has_kernels = largest * _MAX_BATCH < MAX_NUMEL

    def step_by_kernels(
        self,
        gradients: list[torch.Tensor],
        momenta: list[torch.Tensor],
        momentum: float,
        lr: float,
        lr_factor: torch.Tensor,
    ) -> bool:
        """Updates the parameters by Muon with Nesterov momentum, and the momenta, if there are kernels for it.

        Args:
            gradients: of all parameters.
            momenta: of their strides; none without momentum.
            momentum: share of the momenta that each step keeps.
            lr: the learning rate, without its factor.
            lr_factor: float32 scalar.

        Returns:
            Whether there are kernels.
        """
        if not self._has_kernels or not all(is_updated(parameter) for parameter in self._parameters):
            return False
        for numbers, batch in zip(self._numbers, self._batches_of_kernels, strict=True):
            mine = [momenta[number] for number in numbers] if momenta else []
            batch.step([gradients[number] for number in numbers], mine, momentum, lr, lr_factor)
        return True

    @cached_property
    def _batches(self) -> "list[_Batch]":
        return [_Batch([self._parameters[number] for number in numbers]) for numbers in self._numbers]

    @cached_property
    def _batches_of_kernels(self) -> "list[MuonBatch]":
        from trainer.kernels.muon import MuonBatch

        return [
            MuonBatch([self._parameters[number] for number in numbers], _NEWTON_SCHULZ) for numbers in self._numbers
        ]

    def step(self, updates: list[torch.Tensor], lr: torch.Tensor) -> None:
        """Updates the parameters; `updates` have their shapes."""
        for numbers, batch in zip(self._numbers, self._batches, strict=True):
            batch.step([updates[number] for number in numbers], lr)


class _Batch:
    """Matrices of one batch. All tensors here are flat, in the order of the parameters' memory.

    The order of a matrix's columns does not matter, so that channels-last filters need not be rearranged.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        device = parameters[0].device
        self._parameters = parameters
        self._sizes = [parameter.numel() for parameter in parameters]
        lengths = torch.tensor([len(parameter) for parameter in parameters], dtype=torch.float32)
        self._norms = lengths.sqrt().to(device)
        self._owner = torch.arange(len(parameters)).repeat_interleave(torch.tensor(self._sizes)).to(device)
        shapes = [_wide_shape(parameter) for parameter in parameters]
        rows, columns = max(rows for rows, _ in shapes), max(columns for _, columns in shapes)
        total = sum(self._sizes)
        places = torch.full((len(parameters), rows, columns), total)  # behind the last element: the padding's zero
        begin = 0
        for place, parameter, (height, width) in zip(places, parameters, shapes, strict=True):
            matrix = torch.arange(begin, begin + parameter.numel()).view(len(parameter), -1)
            place[:height, :width] = matrix if matrix.shape == (height, width) else matrix.T
            begin += parameter.numel()
        where = places.flatten()
        inside = (where < total).nonzero()[:, 0]
        back = torch.empty(total, dtype=torch.int64)
        back[where[inside]] = inside
        self._places, self._shape, self._back = where.to(device), places.shape, back.to(device)
        self._zero = torch.zeros(1, device=device)

    def step(self, updates: list[torch.Tensor], lr: torch.Tensor) -> None:
        like = self._parameters
        flat = torch.cat([*(_flat(update, each) for update, each in zip(updates, like, strict=True)), self._zero])
        orthogonal = newton_schulz(flat.index_select(0, self._places).view(self._shape))
        change = orthogonal.flatten().index_select(0, self._back).mul_(lr)
        weights = [_flat(parameter, parameter) for parameter in like]
        scales = self._norms / torch.stack(torch._foreach_norm(weights))
        new = torch.cat(weights).mul_(scales.index_select(0, self._owner)).sub_(change)
        torch._foreach_copy_(weights, list(new.split(self._sizes)))


def _wide_shape(parameter: torch.Tensor) -> tuple[int, int]:
    """Returns rows and columns of a parameter as a matrix, transposed if it is tall."""
    rows, columns = len(parameter), math.prod(parameter.shape[1:])
    return min(rows, columns), max(rows, columns)


def _flat(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns a tensor as a vector, in the order of the memory of `like`, a dense tensor of the same shape."""
    if tensor.stride() != like.stride():
        tensor = torch.empty_like(like).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))
