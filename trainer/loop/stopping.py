"""The best epoch by validation: keeps its weights, and ends a training that no longer improves.

Knows the validation images' results alone; no test image has a part in any of this.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch

from trainer.evaluation.evaluate import Evaluation
from trainer.evaluation.recall import balanced_accuracy
from trainer.recipes.hyperparameters import BestBy


@dataclass(frozen=True, slots=True, kw_only=True)
class BestEpoch:
    """The epoch with the best validation result so far.

    Args:
        epoch: counted from 1.
        score: from `score_of`.
        weights: the state dict that was validated, copied; None unless the recipe keeps the best weights.
    """

    epoch: int
    score: tuple[float, float]
    weights: dict[str, torch.Tensor] | None

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "score": list(self.score), "weights": self.weights}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        first, second = state["score"]
        return cls(epoch=state["epoch"], score=(first, second), weights=state["weights"])


def score_of(validation: Evaluation, best_by: BestBy, classes: tuple[str, ...]) -> tuple[float, float]:
    """Returns a validation's score: the lower of two is the better one. The loss decides between equal accuracies."""
    match best_by:
        case "accuracy":
            return float(validation.num_errors), validation.loss
        case "balanced-accuracy":
            return -balanced_accuracy(validation.recall_by_class(classes)), validation.loss
        case "loss":
            return validation.loss, 0.0
