"""Casts and updates of all weights of a network: a few kernels where `choice` says so, else torch's operations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from trainer.kernels.choice import is_fusible
from trainer.kernels.launch import launch

_MAX_TENSORS = 32
"""Tensors of one start: their addresses are arguments, and have to fit into 4 KB."""
_BLOCK = 1024
_LARGE = 1 << 21
"""Values from which a program computes several blocks: there are enough for all multiprocessors."""
_LOOPS = 4


def cast(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Copies tensors to others of their sizes and strides, which are of one other type."""
    if not sources:
        return
    if not all(is_fusible(each) and _is_dense(each) for each in sources):
        torch._foreach_copy_(list(targets), list(sources))
        return
    from trainer.kernels import update_kernels as kernels

    for part in _parts([each.numel() for each in sources]):
        mine, theirs = tuple(sources[part.tensors]), tuple(targets[part.tensors])
        launch(kernels.cast, (part.programs,), mine, theirs, part.firsts, part.sizes, LOOPS=part.loops, BLOCK=_BLOCK)


@dataclass(frozen=True, slots=True)
class SgdTensor:
    """A weight that SGD updates, with its settings.

    Args:
        momenta: of its strides; None without momentum.
        momentum: share of them that each step keeps.
    """

    weight: torch.Tensor
    momenta: torch.Tensor | None
    lr: float
    weight_decay: float
    momentum: float


def sgd(tensors: Sequence[SgdTensor], lr_factor: torch.Tensor) -> bool:
    """Updates weights and momenta by SGD with Nesterov momentum and decoupled decay, from the weights' gradients.

    A weight without a gradient stays as it is.

    Args:
        lr_factor: float32 scalar.

    Returns:
        Whether it has; else there are no kernels for these weights.
    """
    if not tensors or not all(is_updated(each.weight) for each in tensors):
        return False
    from trainer.kernels import update_kernels as kernels

    # A weight without a gradient is one of size 0, so that all steps have the same kernels.
    gradients = [each.weight if each.weight.grad is None else like(each.weight.grad, each.weight) for each in tensors]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        pairs = zip(tensors, gradients, strict=True)
        chosen = [(each, gradient) for each, gradient in pairs if gradient.dtype == dtype]
        for part in _parts([0 if each.weight.grad is None else each.weight.numel() for each, _ in chosen]):
            mine = chosen[part.tensors]
            launch(
                kernels.sgd,
                (part.programs,),
                tuple(each.weight for each, _ in mine),
                tuple(each.weight if each.momenta is None else each.momenta for each, _ in mine),
                tuple(gradient for _, gradient in mine),
                part.firsts,
                part.sizes,
                tuple(each.lr for each, _ in mine),
                tuple(each.weight_decay for each, _ in mine),
                tuple(0.0 if each.momenta is None else each.momentum for each, _ in mine),
                lr_factor,
                LOOPS=part.loops,
                BLOCK=_BLOCK,
            )
    return True


def is_updated(weight: torch.Tensor) -> bool:
    """Returns whether kernels can update a weight."""
    return is_fusible(weight) and weight.dtype == torch.float32 and _is_dense(weight)


def like(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns a gradient with the strides of its weight, in bfloat16 or float32."""
    dtype = gradient.dtype if gradient.dtype == torch.bfloat16 else torch.float32
    if gradient.stride() != weight.stride() or gradient.dtype != dtype:
        gradient = torch.empty_like(weight, dtype=dtype).copy_(gradient)
    return gradient


@dataclass(frozen=True, slots=True)
class _Part:
    """Tensors of one start of a kernel, with the numbers of their first programs and their sizes."""

    tensors: slice
    firsts: tuple[int, ...]
    sizes: tuple[int, ...]
    programs: int
    loops: int


def _parts(sizes: list[int]) -> Iterator[_Part]:
    loops = _LOOPS if sum(sizes) > _LARGE else 1
    for start in range(0, len(sizes), _MAX_TENSORS):
        tensors = slice(start, start + _MAX_TENSORS)
        firsts, programs = [], 0
        for size in sizes[tensors]:
            firsts.append(programs)
            programs += -(-size // (loops * _BLOCK))
        if programs:
            yield _Part(tensors, tuple(firsts), tuple(sizes[tensors]), programs, loops)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor's values are the first ones of its memory, without gaps."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1 == tensor.numel()
