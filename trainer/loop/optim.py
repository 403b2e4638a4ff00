"""SGD, Muon and AdamW as a few multi-tensor operations, with the learning rate as an argument of each step.

torch.optim is not used, for three reasons: the rate is an argument here (a device tensor inside a CUDA graph), Muon
takes convolution filters (torch.optim.Muon takes matrices only), and the first torch.optim object imports
torch._dynamo, which takes as long as importing torch itself.
"""

from dataclasses import dataclass
from itertools import compress, zip_longest
from typing import Any

import torch
from torch import nn

from trainer.kernels.updates import SgdTensor, cast, sgd
from trainer.loop.muon import BatchedMuon, muon_step
from trainer.recipes import ParamGroup


@dataclass(frozen=True, slots=True)
class _Tensors:
    """Parameters, and those tensors for each of them that their optimizer needs; the other lists are empty."""

    weights: list[torch.Tensor]
    momenta: list[torch.Tensor]
    squares: list[torch.Tensor]

    def with_gradients(self) -> "_Tensors":
        """Returns the parameters that have a gradient, and what belongs to them."""
        known = [weight.grad is not None for weight in self.weights]
        return _Tensors(*(list(compress(each, known)) for each in (self.weights, self.momenta, self.squares)))


class Optimizer:
    """The optimizer of each group of parameters: SGD or Muon with Nesterov momentum, or AdamW.

    The momentum is PyTorch's: v ← m·v + g, update g + m·v. AdamW keeps its mean of gradients in the momentum's place.

    Args:
        groups: settings and parameters of each group; groups without parameters are ignored.
        clip_norm: largest norm of all gradients together, 0 for no limit.
    """

    def __init__(self, groups: list[tuple[ParamGroup, list[nn.Parameter]]], *, clip_norm: float = 0.0) -> None:
        groups = [(group, parameters) for group, parameters in groups if parameters]
        self._clip_norm = clip_norm
        self._momenta = [_zeros(parameters, if_needed=_has_momentum(group)) for group, parameters in groups]
        self._squares = [_zeros(parameters, if_needed=group.optimizer == "adamw") for group, parameters in groups]
        # Groups with equal settings are updated together, in as few operations as there are different settings.
        self._work: dict[ParamGroup, _Tensors] = {}
        for (group, parameters), momenta, squares in zip(groups, self._momenta, self._squares, strict=True):
            mine = self._work.setdefault(group, _Tensors([], [], []))
            mine.weights.extend(parameters)
            mine.momenta.extend(momenta)
            mine.squares.extend(squares)
        self._sgd = [
            SgdTensor(weight, momentum, float(group.lr), float(group.weight_decay), float(group.momentum))
            for group, mine in self._work.items()
            if group.optimizer == "sgd"
            for weight, momentum in zip_longest(mine.weights, mine.momenta)
        ]
        self._muon = {
            group: BatchedMuon(mine.weights) for group, mine in self._work.items() if group.optimizer == "muon"
        }
        # On the device, so that a CUDA graph can count; float64, as 1 - beta2^t has few digits left in float32.
        self._num_steps: torch.Tensor | None = None
        if any(self._squares):
            device = next(mine.squares[0].device for mine in self._work.values() if mine.squares)
            self._num_steps = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def step(self, lr_factor: torch.Tensor) -> None:
        """Updates the parameters from their gradients, which it may overwrite; those without one stay as they are.

        Args:
            lr_factor: float32 scalar tensor on the parameters' device.
        """
        if self._clip_norm:
            self._clip()
        if self._num_steps is not None:
            self._num_steps += 1
        is_done = sgd(self._sgd, lr_factor)
        for group in self._work:
            if group.optimizer == "sgd" and is_done:
                continue
            if group.optimizer != "muon" or not self._muon_by_kernels(group, lr_factor):
                self._step_by_torch(group, lr_factor)

    def _muon_by_kernels(self, group: ParamGroup, lr_factor: torch.Tensor) -> bool:
        """Updates a group by Muon's kernels; returns whether there are some for it."""
        mine, momentum, lr = self._work[group], float(group.momentum), float(group.lr)
        gradients = [weight.grad for weight in mine.weights if weight.grad is not None]
        if len(gradients) < len(mine.weights):
            return False
        return self._muon[group].step_by_kernels(gradients, mine.momenta, momentum, lr, lr_factor)

    def _step_by_torch(self, group: ParamGroup, lr_factor: torch.Tensor) -> None:
        mine = self._work[group].with_gradients()
        updates, lr = _gradients(mine.weights), lr_factor * group.lr
        if not updates:
            return
        if mine.squares:
            assert self._num_steps is not None
            updates = _adamw_updates(group, updates, mine, self._num_steps)
        elif mine.momenta:
            torch._foreach_mul_(mine.momenta, group.momentum)
            torch._foreach_add_(mine.momenta, updates)
            updates = list(torch._foreach_add(updates, mine.momenta, alpha=group.momentum))
        if group.optimizer == "muon":
            self._muon_step(group, mine.weights, updates, lr)
            return
        if group.weight_decay:
            torch._foreach_mul_(mine.weights, 1 - lr * group.weight_decay)
        torch._foreach_sub_(mine.weights, list(torch._foreach_mul(updates, lr)))

    def _muon_step(
        self, group: ParamGroup, weights: list[torch.Tensor], updates: list[torch.Tensor], lr: torch.Tensor
    ) -> None:
        if weights[0].is_cuda and len(weights) == len(self._work[group].weights):
            self._muon[group].step(updates, lr)
        else:
            muon_step(weights, updates, lr)

    def zero_grad(self) -> None:
        """Sets the gradients to None, so that the next backward pass writes them instead of adding to them."""
        for mine in self._work.values():
            for weight in mine.weights:
                weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        adamw = {} if self._num_steps is None else {"squares": self._squares, "num_steps": self._num_steps}
        return {"momenta": self._momenta, **adamw}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            _load(self._momenta, state["momenta"])
            if self._num_steps is not None:
                _load(self._squares, state["squares"])
                self._num_steps.copy_(state["num_steps"])

    def _clip(self) -> None:
        """Scales the gradients down so that their norm is at most the limit, as `torch.nn.utils.clip_grad_norm_` does.

        A norm that is not finite makes all gradients NaN: the run must end, not go on without moving.
        """
        weights = [weight for mine in self._work.values() for weight in mine.weights if weight.grad is not None]
        known = _gradients(weights)
        for weight, gradient in zip(weights, known, strict=True):
            weight.grad = gradient
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(known)))
        scale = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(known, torch.where(norm.isfinite(), scale, torch.nan))


def _gradients(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the gradients of weights that have one, in the weights' types."""
    found = [(weight.grad, weight.dtype) for weight in weights if weight.grad is not None]
    others = [gradient for gradient, dtype in found if gradient.dtype != dtype]
    converted = [torch.empty_like(gradient, dtype=dtype) for gradient, dtype in found if gradient.dtype != dtype]
    cast(others, converted)
    remaining = iter(converted)
    return [gradient if gradient.dtype == dtype else next(remaining) for gradient, dtype in found]


def _has_momentum(group: ParamGroup) -> bool:
    return group.optimizer == "adamw" or group.momentum > 0


def _zeros(parameters: list[nn.Parameter], *, if_needed: bool) -> list[torch.Tensor]:
    return [torch.zeros_like(parameter) for parameter in parameters] if if_needed else []


def _load(groups: list[list[torch.Tensor]], saved: list[list[torch.Tensor]]) -> None:
    for mine, theirs in zip(groups, saved, strict=True):
        for to, source in zip(mine, theirs, strict=True):
            to.copy_(source)


def _adamw_updates(
    group: ParamGroup, gradients: list[torch.Tensor], mine: _Tensors, num_steps: torch.Tensor
) -> list[torch.Tensor]:
    """Updates the means of gradients and of their squares; returns AdamW's updates for a learning rate of 1.

    Args:
        num_steps: float64 scalar, with this step.
    """
    means, squares = mine.momenta, mine.squares
    torch._foreach_lerp_(means, gradients, 1 - group.beta1)
    torch._foreach_mul_(squares, group.beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - group.beta2)
    correction = 1 - torch.pow(group.beta1, num_steps)
    correction_of_squares = 1 - torch.pow(group.beta2, num_steps)
    divisors = list(torch._foreach_sqrt(squares))
    torch._foreach_div_(divisors, correction_of_squares.sqrt().float())
    torch._foreach_add_(divisors, group.epsilon)
    torch._foreach_mul_(divisors, correction.float())
    return list(torch._foreach_div(means, divisors))
