"""Muon's update of a batch of filters. Import this only where Triton is installed; see `choice`."""

import math

import torch

from trainer.kernels import muon_kernels as kernels
from trainer.kernels.launch import empty_floats, launch, power_of_two
from trainer.kernels.updates import like

MATRIX_TYPE = torch.bfloat16
"""Of what Newton-Schulz iterates."""
_BLOCK = 1024
_MAX_PROGRAMS = 256
_TILE = 64


class MuonBatch:
    """Filters and matrices that are updated together, padded with zeros to matrices of one size.

    Args:
        weights: float32 on one device, at most some 32.
        polynomial: coefficients of the Newton-Schulz iteration.
    """

    def __init__(self, weights: list[torch.Tensor], polynomial: tuple[float, float, float]) -> None:
        self._weights = tuple(weights)
        self._polynomial = polynomial
        self._sizes = tuple(weight.numel() for weight in weights)
        self._lengths = tuple(len(weight) for weight in weights)
        shapes = [(length, size // length) for length, size in zip(self._lengths, self._sizes, strict=True)]
        height, width = (_multiple_of_16(max(map(pick, shapes))) for pick in (min, max))
        is_plain = all(rows <= columns and columns % 4 == 0 for rows, columns in shapes)
        self._shape = {"HEIGHT": height, "WIDTH": width, "PLAIN": is_plain}
        programs = min(_MAX_PROGRAMS, power_of_two(math.ceil(max(self._sizes) / _BLOCK)))
        self._programs = programs
        device = weights[0].device
        self._updates = torch.zeros(len(weights), height, width, dtype=MATRIX_TYPE, device=device)
        self._partial = empty_floats(self._updates, len(weights), 2, programs)

    def step(
        self,
        gradients: list[torch.Tensor],
        momenta: list[torch.Tensor],
        momentum: float,
        lr: float,
        lr_factor: torch.Tensor,
    ) -> None:
        """Updates the weights, and the momenta if there are any; the learning rate is `lr * lr_factor`."""
        weights, grid = self._weights, (self._programs, len(self._weights))
        constants = {**self._shape, "PROGRAMS": self._programs, "BLOCK": _BLOCK}
        launch(
            kernels.collect,
            grid,
            weights,
            tuple(momenta) or weights,
            tuple(like(gradient, weight) for gradient, weight in zip(gradients, weights, strict=True)),
            self._updates,
            self._partial,
            self._sizes,
            self._lengths,
            momentum,
            MOMENTUM=bool(momenta),
            **constants,
        )
        orthogonal = self._newton_schulz(num_iterations=3)
        launch(
            kernels.update,
            grid,
            weights,
            orthogonal,
            self._partial,
            self._sizes,
            self._lengths,
            lr_factor,
            lr,
            **constants,
        )

    def _newton_schulz(self, num_iterations: int) -> torch.Tensor:
        """Returns about the nearest semi-orthogonal matrices of the updates, as `loop.muon.newton_schulz` does.

        The polynomial has its first coefficient on the diagonal, so that no product adds to a copy.
        """
        x, size = self._updates, self._updates.size(1)
        tile = min(_TILE, power_of_two(size))
        blocks = -(-size // tile)
        for iteration in range(num_iterations):
            gram = torch.bmm(x, x.mT)
            factor = torch.empty_like(gram)
            launch(
                kernels.polynomial,
                (len(x), blocks, blocks),
                gram,
                factor,
                self._partial,
                *self._polynomial,
                SIZE=size,
                FIRST=iteration == 0,
                PROGRAMS=self._programs,
                BM=tile,
                num_stages=2,
            )
            x = torch.bmm(factor, x)
        return x


def _multiple_of_16(number: int) -> int:
    """Returns the size to which a dimension is padded: tensor cores take multiples of 8 or 16."""
    return -(-number // 16) * 16
