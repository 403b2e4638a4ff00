"""Saves a run while it trains: intervals, the content of a checkpoint, and a thread that writes it."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from trainer.errors import CheckpointError
from trainer.loop.run import Run
from trainer.records.checkpoint import copy_to_cpu

FIRST_SAVE_S = 2.0
"""Age of a session at its first checkpoint; the next ones follow after twice, four times as long, and so on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveInterval:
    """The interval between checkpoints: in seconds, and also in steps if that is not None."""

    seconds: float = 20.0
    steps: int | None = None

    def is_due(self, step: int, since_s: float, num_saved: int) -> bool:
        """Returns whether to save after `step`, `since_s` after the last of this session's `num_saved` checkpoints."""
        if self.steps is not None and step % self.steps == 0:
            return True
        return since_s >= min(self.seconds, FIRST_SAVE_S * float(2**num_saved))


def save(run: Run) -> None:
    """Saves a checkpoint, unless this step has one, and waits until it is written. Only the main rank does anything.

    Raises:
        CheckpointError: it cannot be written.
        DivergenceError: the weights are not finite.
    """
    if run.world.is_main and run.checkpoints.newest_good_step != run.state.step:
        run.checkpoints.save(run.state.step, _checkpoint_content(run))


class BackgroundSaver:
    """Saves a run in a thread while it trains. A checkpoint that cannot be written is a warning; the next one follows.

    For the main rank; on others it does nothing. The training waits for the copy of the state only.

    Args:
        check: raises DivergenceError with the step whose loss is not finite; the weights do not tell the step.
    """

    def __init__(self, run: Run, save_every: SaveInterval, check: Callable[[], None]) -> None:
        self._run = run
        self._check = check
        self._save_every = save_every
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None
        self._num_saved = 0
        self._last_save_at: float | None = None

    def start_clock(self) -> None:
        """Starts the time to the first checkpoint; later calls do nothing."""
        self._last_save_at = self._last_save_at or time.monotonic()

    def save_if_due(self) -> None:
        """Begins a checkpoint if one is due and none is being written. Never waits for one."""
        run = self._run
        if not run.world.is_main or (self._writing is not None and not self._writing.done()):
            return
        self._finish()
        since_s = time.monotonic() - (self._last_save_at or 0.0)
        if self._save_every.is_due(run.state.step, since_s, self._num_saved):
            self._check()
            state = copy_to_cpu(_checkpoint_content(run))
            self._writing = self._pool.submit(run.checkpoints.save, run.state.step, state)
            self._last_save_at, self._num_saved = time.monotonic(), self._num_saved + 1

    def save_and_wait(self) -> None:
        """Saves the run's last state, after a checkpoint that is being written.

        Raises:
            CheckpointError: it cannot be written.
            DivergenceError: the weights are not finite.
        """
        self._finish()
        save(self._run)

    def close(self) -> None:
        self._pool.shutdown()

    def _finish(self) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except CheckpointError as error:
            self._run.progress.log(f"warning: {error}; the training continues, and the next save tries again")


def _checkpoint_content(run: Run) -> dict[str, Any]:
    """Returns all that a checkpoint holds, not copied."""
    if not all(bool(tensor.isfinite().all()) for tensor in run.learner.model.state_dict().values()):
        raise run.diverged("the weights are not finite")
    progress = {"step": run.state.step, "seconds": run.state.seconds, "totals": run.state.totals}
    best = {} if run.state.best is None else {"best": run.state.best.state_dict()}
    return {**progress, **best, **run.learner.state_dict()}
