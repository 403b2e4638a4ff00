"""SGD and Muon as a few multi-tensor operations, with the learning rate as an argument of each step.

torch.optim is not used, for three reasons: the rate is an argument here (a device tensor inside a CUDA graph), Muon
takes convolution filters (torch.optim.Muon takes matrices only), and the first torch.optim object imports
torch._dynamo, which takes as long as importing torch itself.
"""

from typing import Any

import torch
from torch import nn

from trainer.recipes import ParamGroup

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""The polynomial's coefficients."""


class Optimizer:
    """SGD with Nesterov momentum, or Muon, for each group of parameters.

    The momentum is PyTorch's: v ← m·v + g, update g + m·v.

    Args:
        groups: settings and parameters of each group; groups without parameters are ignored.
    """

    def __init__(self, groups: list[tuple[ParamGroup, list[nn.Parameter]]]) -> None:
        groups = [(group, parameters) for group, parameters in groups if parameters]
        self._momenta = [
            [torch.zeros_like(p) for p in parameters] if group.momentum else [] for group, parameters in groups
        ]
        # Groups with equal settings are updated together, in as few operations as there are different settings.
        self._work: dict[ParamGroup, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for (group, parameters), momenta in zip(groups, self._momenta, strict=True):
            mine = self._work.setdefault(group, ([], []))
            mine[0].extend(parameters)
            mine[1].extend(momenta)

    @torch.no_grad()
    def step(self, lr_factor: torch.Tensor) -> None:
        """Updates the parameters from their gradients.

        Args:
            lr_factor: float32 scalar tensor on the parameters' device.
        """
        for group, (weights, momenta) in self._work.items():
            updates = [weight.grad for weight in weights if weight.grad is not None]
            if momenta:
                torch._foreach_mul_(momenta, group.momentum)
                torch._foreach_add_(momenta, updates)
                updates = list(torch._foreach_add(updates, momenta, alpha=group.momentum))
            lr = lr_factor * group.lr
            if group.muon:
                _muon_step(weights, updates, lr)
                continue
            if group.weight_decay:
                torch._foreach_mul_(weights, 1 - lr * group.weight_decay)
            torch._foreach_sub_(weights, list(torch._foreach_mul(updates, lr)))

    def zero_grad(self) -> None:
        """Sets the gradients to None, so that the next backward pass writes them instead of adding to them."""
        for weights, _ in self._work.values():
            for weight in weights:
                weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"momenta": self._momenta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for mine, saved in zip(self._momenta, state["momenta"], strict=True):
                for to, source in zip(mine, saved, strict=True):
                    to.copy_(source)


def _muon_step(parameters: list[torch.Tensor], updates: list[torch.Tensor], lr: torch.Tensor) -> None:
    for parameter, update in zip(parameters, updates, strict=True):
        parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
        parameter.sub_(newton_schulz(update.flatten(1)).view_as(parameter) * lr)


def newton_schulz(matrix: torch.Tensor, num_iterations: int = 3) -> torch.Tensor:
    """Returns about U·Vᵀ of the singular value decomposition U·S·Vᵀ of a matrix, float32 `[m, n]`.

    Keller Jordan's quintic Newton-Schulz iteration (https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(num_iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: torch.Tensor = x.T if tall else x
    return result.to(matrix.dtype)
