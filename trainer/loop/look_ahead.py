"""The number of steps that the training loop may queue on a GPU before their computation."""

from collections import deque

import torch

MAX_STEPS_AHEAD = 2
"""Enough to keep a GPU busy while Python prepares the next step. At least 2: with 1, a rank would wait on the GPU for a
rank that hangs, where the watchdog does not look, before it waits for it in the next step's collective."""


class LookAhead:
    """Keeps the loop at most `MAX_STEPS_AHEAD` steps ahead of a GPU; does nothing on a CPU.

    Without a bound the loop queues steps until it needs a value, up to 50 of them. Slow steps would then hide a signal
    for longer than the grace period, one rank's checkpoint would wait for the whole queue while the other ranks lose
    patience, and the loop would measure the time of queueing a step.

    The wait keeps a CPU busy, as all waits for a GPU do: the watchdog counts an idle process as hung.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_steps = MAX_STEPS_AHEAD if device.type == "cuda" else 0
        """Steps that may be queued."""
        self._queued: deque[torch.cuda.Event] = deque()

    @property
    def is_reached(self) -> bool:
        """Whether the time from one `wait` to the next is that of a step, and not that of queueing one."""
        return self.num_steps == 0 or len(self._queued) > self.num_steps

    def wait(self) -> None:
        """Returns when all but the last `num_steps` of the queued steps are computed; call it after each step."""
        if not self.num_steps:
            return
        # An event that was waited for marks a step that is over, so that it can mark another one.
        event = self._queued.popleft() if len(self._queued) > self.num_steps else torch.cuda.Event()
        event.record()
        self._queued.append(event)
        if len(self._queued) > self.num_steps:
            self._queued[0].synchronize()
