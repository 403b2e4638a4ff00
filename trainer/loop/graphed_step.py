"""Training steps that are replayed as CUDA graphs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from trainer.loop.step import Batch, StepKind, TrainStep
from trainer.ranks.waiting import name_numbers
from trainer.ranks.world import World

NUM_EAGER_STEPS = 3
"""Steps before the capture, in which libraries choose their algorithms and NCCL connects the ranks."""


class GraphedStep:
    """A `TrainStep` as a single CUDA graph: one launch per step instead of some hundred.

    The first steps run eagerly on a side stream. Then a step is captured, which computes nothing, and from then on
    batches of the same size are replayed. A batch of another size (an epoch's last one) runs eagerly. If the capture
    fails on any rank, all steps of all ranks stay eager, and `log` prints why.
    """

    def __init__(
        self,
        step: TrainStep,
        log: Callable[[str], None],
        world: World,
        *,
        stream: torch.cuda.Stream | None = None,
        num_eager_steps: int = NUM_EAGER_STEPS,
    ) -> None:
        self._step = step
        self._log = log
        self._world = world
        self._stream = stream or torch.cuda.Stream()
        self._num_eager_left = num_eager_steps
        self._largest = 0
        self._may_capture = True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._result: torch.Tensor | None = None

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Runs the step as `TrainStep.__call__` does; the next call overwrites the result."""
        self._largest = max(self._largest, batch.num_images)
        if self._may_capture and self._num_eager_left == 0 and batch.num_images == self._largest:
            self._may_capture = False
            self._capture(batch)
        if self._graph is None or self._batch is None or not _same_shape(batch, self._batch):
            self._num_eager_left = max(0, self._num_eager_left - 1)
            return self._eager(batch)
        overwrite([self._batch], [batch])
        self._graph.replay()
        assert self._result is not None
        return self._result

    def rehearse(self, batch: Batch) -> None:
        """Does `TrainStep.rehearse` where the steps will be: memory belongs to a stream."""
        with self._on_stream():
            self._step.rehearse(batch)

    def release(self) -> None:
        """Frees the graph; further steps are eager. NCCL's communicator cannot close while a graph uses it."""
        if self._graph is not None:
            self._graph.reset()
        self._graph = self._batch = self._result = None
        self._may_capture = False
        self._step.disconnect()

    def _eager(self, batch: Batch) -> torch.Tensor:
        with self._on_stream():
            return self._step(batch)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self, batch: Batch) -> None:
        static = own_copy(batch)
        activity, captured, reason = self._world.activity, None, ""
        with activity.slow_phase(), activity.capturing():
            try:
                captured = self._record(static)
            except RuntimeError as error:
                reason = reason_of(error)
        reasons = self._world.all_gather_object(reason)
        if captured is not None and not any(reasons):
            (self._graph, self._result), self._batch = captured, static
            return
        if captured is not None:
            captured[0].reset()
        self._step.disconnect()
        self._log(f"warning: no CUDA graph, the steps run one kernel at a time: {_describe_failures(reasons)}")

    def _record(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Returns the graph of a step on this batch, and the tensor that will hold its result.

        Raises:
            RuntimeError: a part of the step cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            result = self._step(batch)
        return graph, result


class GraphedStepByKind:
    """One CUDA graph for each kind of a run's steps.

    Args:
        make: returns a new graphed step; all are of the same `TrainStep`.
    """

    def __init__(self, make: Callable[[], GraphedStep]) -> None:
        self._make = make
        self._steps: dict[StepKind, GraphedStep] = {}

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Runs the step as `GraphedStep.__call__` does."""
        return self._step_of(batch.kind)(batch)

    def rehearse(self, batch: Batch) -> None:
        """Does `GraphedStep.rehearse`."""
        self._step_of(batch.kind).rehearse(batch)

    def _step_of(self, kind: StepKind) -> GraphedStep:
        if kind not in self._steps:
            self._steps[kind] = self._make()
        return self._steps[kind]

    def release(self) -> None:
        """Frees the graphs; further steps are eager."""
        for step in self._steps.values():
            step.release()


def own_copy(batch: Batch) -> Batch:
    """Returns a batch with memory of its own, which a graph can read: all but the images that other batches share."""
    return replace(
        batch,
        images=batch.images.clone() if batch.owns_images else batch.images,
        indices=batch.indices.clone(),
        labels=batch.labels.clone(),
        augment_params=batch.augment_params.clone(),
        dropout_seeds=batch.dropout_seeds.clone(),
        lr_factor=batch.lr_factor.clone(),
    )


def overwrite(targets: Sequence[Batch], sources: Sequence[Batch]) -> None:
    """Copies batches into those of `own_copy`, besides the images by two kernels: one for each type of numbers."""
    for target, source in zip(targets, sources, strict=True):
        if target.owns_images:
            target.images.copy_(source.images)
    for numbers in (_whole_numbers, _fractions):
        to, of = ([tensor for batch in batches for tensor in numbers(batch)] for batches in (targets, sources))
        torch._foreach_copy_(to, of)


def reason_of(error: BaseException) -> str:
    """Returns why a capture failed, in one line: when it fails, each clean-up on the way out raises another error."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


def _describe_failures(reasons: list[str]) -> str:
    """Returns the first rank's reason, and the ranks on which the capture failed if there are several ranks."""
    ranks = [rank for rank, reason in enumerate(reasons) if reason]
    first = reasons[ranks[0]]
    if len(reasons) == 1:
        return first
    return f"the capture failed on {name_numbers('rank', ranks)} of {len(reasons)}: {first}"


def _whole_numbers(batch: Batch) -> list[torch.Tensor]:
    return [batch.indices, batch.labels, batch.dropout_seeds]


def _fractions(batch: Batch) -> list[torch.Tensor]:
    return [batch.augment_params, batch.lr_factor]


def _same_shape(a: Batch, b: Batch) -> bool:
    return a.sizes == b.sizes and a.num_images == b.num_images and a.images.shape == b.images.shape
