"""The mistakes of an evaluation that tell the most about a network."""

import torch

from trainer.evaluation.evaluate import Evaluation


def worst_mistakes(evaluation: Evaluation, number: int) -> torch.Tensor:
    """Returns the positions of the mistakes with the highest confidence in the evaluated images, highest first.

    Args:
        number: of mistakes at most.
    """
    wrong = torch.nonzero(evaluation.predicted != evaluation.labels)[:, 0]
    order = torch.argsort(evaluation.confidence[wrong], descending=True, stable=True)
    return wrong[order[:number]]
