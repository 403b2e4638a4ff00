"""An exponential moving average of a model's weights, updated on the device after each step.

The average is what is validated, exported and served. Its update is a few multi-tensor operations on tensors of the
device, so that a CUDA graph can hold it, and every rank computes it from the same weights to the same bits.
"""

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class WeightAverage(Generic[Model]):
    """The moving average of a model's weights, and of its floating-point buffers.

    With the running statistics of batch norms averaged like the weights, they fit the averaged network well enough for
    evaluation, as in timm's ModelEma; torch's `swa_utils.update_bn` would need a pass over the training images before
    each validation. Buffers of whole numbers are copied.

    Args:
        model: the model that is trained, in its place on the device.
        decay: share of the average that each step keeps.
        warmup: the decay after t steps is at most (1 + t) / (10 + t), as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: Model, decay: float, *, warmup: bool) -> None:
        self.model: Model = copy.deepcopy(model).requires_grad_(False)
        """The network with the averaged weights."""
        self._decay = decay
        self._warmup = warmup
        trained, averaged = list(_tensors(model)), list(_tensors(self.model))
        self._trained = [tensor for tensor in trained if tensor.is_floating_point()]
        self._averaged = [tensor for tensor in averaged if tensor.is_floating_point()]
        self._numbers = [tensor for tensor in trained if not tensor.is_floating_point()]
        self._copied_numbers = [tensor for tensor in averaged if not tensor.is_floating_point()]
        self._num_steps = torch.zeros((), dtype=torch.float64, device=trained[0].device)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights, after a step."""
        decay = torch.full_like(self._num_steps, self._decay)
        if self._warmup:
            decay = decay.minimum((1 + self._num_steps) / (10 + self._num_steps))
        change = list(torch._foreach_sub(self._trained, self._averaged))
        torch._foreach_mul_(change, (1 - decay).float())
        torch._foreach_add_(self._averaged, change)
        if self._numbers:
            torch._foreach_copy_(self._copied_numbers, self._numbers)
        self._num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.model.state_dict(), "num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["weights"])
        self._num_steps.copy_(state["num_steps"])


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
