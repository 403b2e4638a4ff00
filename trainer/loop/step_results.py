"""The results of the steps since the last log line."""

import math

import torch

LOG_EVERY_STEPS = 50


class StepResults:
    """Losses and correct answers of up to `LOG_EVERY_STEPS` steps.

    They stay on the device, so that the loop need not wait for a GPU at each step.

    Args:
        seconds: training time at the first step.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self._results = torch.zeros(LOG_EVERY_STEPS, 2, device=device)
        self._num_images = 0
        self._since = seconds

    def add(self, step: int, result: torch.Tensor, num_images: int) -> None:
        """Adds a step's result, float32 `[2]`: sum of losses, number of correct answers; `step` counts from 0."""
        self._results[step % LOG_EVERY_STEPS] = result
        self._num_images += num_images

    def find_not_finite(self, step: int) -> tuple[int, float] | None:
        """Returns the first step whose loss is not finite, counted from 1, and its loss; None if all are finite.

        Args:
            step: the last step that was added.
        """
        if bool(self._results.isfinite().all()):
            return None
        losses = self._results[:, 0].tolist()
        bad = next(position for position, loss in enumerate(losses) if not math.isfinite(loss))
        return step - step % LOG_EVERY_STEPS + bad + 1, losses[bad]

    def means(self, seconds: float) -> tuple[float, float, float]:
        """Returns loss and accuracy per image, and images per second, since the last log line.

        Args:
            seconds: training time by now.
        """
        loss, accuracy = (self._results.double().sum(dim=0) / self._num_images).tolist()
        return loss, accuracy, self._num_images / (seconds - self._since)

    def clear(self, seconds: float) -> None:
        """Begins the next log line."""
        self._results.zero_()
        self._num_images, self._since = 0, seconds
