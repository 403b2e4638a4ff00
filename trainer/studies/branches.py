"""Trains several runs side by side: a step of each, in turn on a CPU, and as branches of one CUDA graph on a GPU.

A small network leaves most of a GPU idle. Here each run's own step, unchanged, is captured on a stream of its own, and
all of them are forked from and joined to one stream, so that one launch computes a step of every run. Nothing is shared
but the images, which no step writes: each run gets the bits that it would get alone.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trainer.errors import DivergenceError
from trainer.loop.graphed_step import NUM_EAGER_STEPS, overwrite, own_copy, reason_of
from trainer.loop.look_ahead import LookAhead
from trainer.loop.rehearsal import compile_now
from trainer.loop.run import Run
from trainer.loop.saving import save
from trainer.loop.sources import ResidentSource
from trainer.loop.step import Batch, StepKind, TrainStep
from trainer.recipes import Recipe
from trainer.records.checkpoint import Checkpoints

SAVE_EVERY_S = 20.0

Kinds = tuple[StepKind, ...]
"""Of a step of each run."""


def branch_key(recipe: Recipe) -> tuple[Any, ...] | None:
    """Returns what recipes must have in common so that their runs train side by side; None if a run must train alone.

    A run that ends early or keeps its best epoch is validated after each epoch, which these runs do without.
    """
    if recipe.patience or recipe.keep_best:
        return None
    return (
        recipe.dataset,
        recipe.num_validation,
        recipe.global_batch_size,
        recipe.epochs,
        recipe.resolutions,
        recipe.whitening_bias_until,
    )


class Branches:
    """Steps of several runs, one of each at a time.

    Args:
        runs: all at the same step, with recipes of one `branch_key`. Their images are those of the first run.
        log: prints one line for the user.
    """

    def __init__(self, runs: Sequence[Run], log: Callable[[str], None]) -> None:
        self._runs = list(runs)
        first = ResidentSource(self._runs[0])
        self._sources = [first, *(ResidentSource(run, images=first.images) for run in self._runs[1:])]
        steps = [run.learner.train_step for run in self._runs]
        self._totals = torch.zeros(len(steps), 2, dtype=torch.float64, device=first.images.device)
        self._compute = (
            _GraphedBranches(steps, self._totals, log) if first.images.is_cuda else _in_turn(steps, self._totals)
        )

    def train_epoch(self, epoch: int) -> list[float]:
        """Trains an epoch of every run, and returns the mean loss of each; one that diverged disturbs no other."""
        num_steps = self._runs[0].steps_per_epoch
        for run in self._runs:
            run.learner.model.train()
        self._totals.zero_()
        look_ahead = LookAhead(self._totals.device)
        for step in range(epoch * num_steps, (epoch + 1) * num_steps):
            self._compute([source.batch(step) for source in self._sources])
            look_ahead.wait()
            for run in self._runs:
                run.state.step = step + 1
        return [loss / len(self._runs[0].train_indices) for loss, _ in self._totals.tolist()]

    def release(self) -> None:
        """Frees the graphs and the images."""
        if isinstance(self._compute, _GraphedBranches):
            self._compute.release()
        for source in self._sources:
            source.close()


def _in_turn(steps: list[TrainStep], totals: torch.Tensor) -> Callable[[list[Batch]], None]:
    def compute(batches: list[Batch]) -> None:
        for total, step, batch in zip(totals, steps, batches, strict=True):
            total += step(batch)

    return compute


class _GraphedBranches:
    """A step of each run as one CUDA graph; one graph for each combination of kinds.

    As `GraphedStep`: the first steps are eager, and batches of another number of images stay so.
    """

    def __init__(self, steps: list[TrainStep], totals: torch.Tensor, log: Callable[[str], None]) -> None:
        self._steps, self._totals, self._log = steps, totals, log
        self._stream = torch.cuda.Stream()
        self._streams = [torch.cuda.Stream() for _ in steps]  # torch has 32: some branches may follow each other
        self._graphs: dict[Kinds, tuple[torch.cuda.CUDAGraph, list[Batch]]] = {}
        self._num_eager: dict[Kinds, int] = {}
        self._largest = 0
        self._may_capture = True

    def __call__(self, batches: list[Batch]) -> None:
        kinds, num_images = _kinds_of(batches), batches[0].num_images
        self._largest = max(self._largest, num_images)
        num_eager = self._num_eager.get(kinds, 0)
        is_usual = num_images == self._largest
        if self._may_capture and is_usual and num_eager >= NUM_EAGER_STEPS and kinds not in self._graphs:
            self._capture(batches)
        if kinds not in self._graphs or not is_usual:
            self._num_eager[kinds] = num_eager + 1
            self._eager(batches)
            return
        graph, static = self._graphs[kinds]
        overwrite(static, batches)
        graph.replay()

    def release(self) -> None:
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def _eager(self, batches: list[Batch]) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._fork(batches)
        current.wait_stream(self._stream)

    def _capture(self, batches: list[Batch]) -> None:
        static = [own_copy(batch) for batch in batches]
        try:
            graph = self._record(static)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._may_capture = False
            self._log(f"warning: no CUDA graph, the steps run one kernel at a time: {reason_of(error)}")
            return
        self._graphs[_kinds_of(batches)] = graph, static

    def _record(self, batches: list[Batch]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._fork(batches)
        return graph

    def _fork(self, batches: list[Batch]) -> None:
        """Computes a step of each run on its own stream; the current stream waits for all of them."""
        current = torch.cuda.current_stream()
        begin = current.record_event()
        results = []
        for step, stream, batch in zip(self._steps, self._streams, batches, strict=True):
            stream.wait_event(begin)
            with torch.cuda.stream(stream):
                results.append(step(batch))
        for stream in self._streams:
            current.wait_stream(stream)
        self._totals += torch.stack(results)


def _kinds_of(batches: list[Batch]) -> Kinds:
    return tuple(batch.kind for batch in batches)


def train_side_by_side(
    runs: Sequence[Run], checkpoints: Checkpoints, log: Callable[[str], None]
) -> list[DivergenceError | None]:
    """Trains runs to the end and saves each; `checkpoints` gets the state of all of them every `SAVE_EVERY_S`.

    Each run gets its trained weights, and its share of the training time.

    Returns:
        The error of each run that diverged, None for the others.

    Raises:
        OutOfMemoryError: they do not fit in the GPU's memory together.
    """
    first, what = runs[0], f"{len(runs)} runs side by side"
    losses, seconds = _restore(runs, checkpoints)
    branches = Branches(runs, log)
    compile_now(first)  # all runs have the same kernels
    saved_at = time.monotonic()
    try:
        for epoch in range(first.num_epochs_done, first.recipe.epochs):
            began = time.perf_counter()
            found = branches.train_epoch(epoch)
            losses = [new if math.isfinite(old) else old for old, new in zip(losses, found, strict=True)]
            seconds += time.perf_counter() - began
            log(f"{what}, epoch {epoch + 1}/{first.recipe.epochs}: {seconds:.1f} s")
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                checkpoints.save(first.state.step, _state_of(runs, losses, seconds))
                saved_at = time.monotonic()
    finally:
        branches.release()
    return [_finish(run, loss, seconds / len(runs)) for run, loss in zip(runs, losses, strict=True)]


def _finish(run: Run, loss: float, seconds: float) -> DivergenceError | None:
    run.state.seconds = seconds
    if not math.isfinite(loss):
        return run.diverged(f"the mean loss of an epoch is {loss}")
    try:
        save(run)  # for `evaluate` and `export`
    except DivergenceError as error:  # the last step made the weights infinite
        return error
    run.use_final_weights()
    return None


def _state_of(runs: Sequence[Run], losses: list[float], seconds: float) -> dict[str, Any]:
    states = [run.learner.state_dict() for run in runs]
    return {"step": runs[0].state.step, "seconds": seconds, "losses": losses, "runs": states}


def _restore(runs: Sequence[Run], checkpoints: Checkpoints) -> tuple[list[float], float]:
    """Restores the runs from the newest checkpoint of all of them; returns their losses, and the training time."""
    state = checkpoints.load_newest()
    if state is None:
        return [0.0] * len(runs), 0.0
    for run, learned in zip(runs, state["runs"], strict=True):
        run.learner.load_state_dict(learned)
        run.state.step = state["step"]
    return state["losses"], state["seconds"]
