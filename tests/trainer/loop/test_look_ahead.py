"""The loop queues only a few steps on a GPU, and none on a CPU."""

import itertools
import time

import pytest
import torch

from trainer.loop.look_ahead import MAX_STEPS_AHEAD, LookAhead


class FakeGpu:
    """Computes queued steps in order, and only when somebody waits for one of them."""

    def __init__(self) -> None:
        self.num_queued = self.num_computed = self.num_events = 0

    def event(self) -> "FakeEvent":
        self.num_events += 1
        return FakeEvent(self)


class FakeEvent:
    """Marks the work that was queued when it was last recorded."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self._marked: int | None = None

    def record(self) -> None:
        self._marked = self._gpu.num_queued

    def synchronize(self) -> None:
        assert self._marked is not None, "waits for an event that marks nothing"
        self._gpu.num_computed = max(self._gpu.num_computed, self._marked)


def test_the_loop_is_never_more_than_two_steps_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    look_ahead = LookAhead(torch.device("cuda"))
    ahead, reached = [], []
    for _ in range(20):
        gpu.num_queued += 1
        look_ahead.wait()
        ahead.append(gpu.num_queued - gpu.num_computed)
        reached.append(look_ahead.is_reached)
    assert ahead == [1, *[MAX_STEPS_AHEAD] * 19]
    assert reached == [False] * MAX_STEPS_AHEAD + [True] * (20 - MAX_STEPS_AHEAD)
    assert gpu.num_events == MAX_STEPS_AHEAD + 1, "events are used again"


def test_a_cpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda: pytest.fail("an event on a CPU"))
    look_ahead = LookAhead(torch.device("cpu"))
    for _ in range(5):
        assert look_ahead.is_reached
        look_ahead.wait()
    assert look_ahead.num_steps == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_loop_waits_for_a_slow_gpu() -> None:
    """After the first steps, queueing a step takes as long as computing one, and little is left at the end."""
    device = torch.device("cuda", 0)
    look_ahead = LookAhead(device)
    matrix = torch.ones(4096, 4096, device=device)

    def step() -> None:
        for _ in range(20):
            torch.mm(matrix, matrix)

    step()
    torch.cuda.synchronize(device)
    times = [time.perf_counter()]
    for _ in range(20):
        step()
        look_ahead.wait()
        times.append(time.perf_counter())
    torch.cuda.synchronize(device)
    left_s = time.perf_counter() - times[-1]
    mean_s = (times[-1] - times[0]) / 20
    later = [after - before for before, after in itertools.pairwise(times)][MAX_STEPS_AHEAD:]
    assert min(later) > mean_s / 2
    assert left_s < 2 * MAX_STEPS_AHEAD * mean_s
