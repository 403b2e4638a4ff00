"""The training time of a run, without validation and saving."""

import time

import torch


class Stopwatch:
    """Seconds of training, including work that is queued on a GPU.

    Args:
        seconds: training time of the run's earlier sessions.
    """

    def __init__(self, seconds: float, device: torch.device) -> None:
        self._seconds = seconds
        self._device = device
        self._started_at: float | None = None

    def start(self) -> None:
        self._started_at = time.perf_counter()

    def read(self) -> float:
        """Returns the seconds so far, in all sessions."""
        return self._seconds + (time.perf_counter() - self._started_at if self._started_at is not None else 0.0)

    def stop(self) -> float:
        """Waits for the device, stops, and returns the seconds so far."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds, self._started_at = self.read(), None
        return self._seconds
