"""Ranks agree on the capture of a CUDA graph: it is used on all of them or on none. In real processes, over gloo."""

import re

import pytest

from tests.trainer.ranks import test_world
from tests.trainer.ranks.test_world import RunRanks, values_of

run_ranks = test_world.run_ranks  # the fixture

BODY = """
def body(world):
    from contextlib import suppress
    from trainer.loop.graphed_step import GraphedStep
    from trainer.loop.step import Batch
    torch.cuda.Stream = object

    class Step:
        \"\"\"Adds up over the ranks, as a training step does.\"\"\"

        def __call__(self, batch):
            return world.all_reduce(torch.tensor([1.0, float(world.rank)]))

        def disconnect(self):
            reset.append("step")

    class Graph:
        def replay(self):
            raise AssertionError("a graph is used that another rank lacks")

        def reset(self):
            reset.append("graph")

    class Graphed(GraphedStep):
        \"\"\"Rank FAILING fails in the middle of a capture, before it comes to the collective.\"\"\"

        def _record(self, batch):
            if world.rank == FAILING:
                raise RuntimeError("operation not permitted when stream is capturing\\nand more")
            with world.activity.collective():
                return Graph(), torch.zeros(2)

        def _eager(self, batch):
            return self._step(batch)

    reset, lines = [], []
    step = Graphed(Step(), lines.append, world, num_eager_steps=2)
    rows = torch.zeros(4, dtype=torch.int64)
    batch = Batch(images=torch.zeros(9, 1, 2, 2), indices=rows, labels=rows, augment_params=torch.zeros(4, 6),
                  dropout_seeds=rows, lr_factor=torch.ones(()), sizes=(4,), num_images=8)
    with suppress(AssertionError):
        results = []
        for _ in range(5):
            results.append(step(batch).tolist())
    show([world.rank, results, lines, reset, world.activity.num_collectives])
"""


def run(failing: int, run_ranks: RunRanks) -> list[list[object]]:
    done = run_ranks(BODY.replace("FAILING", str(failing)), 2)
    assert done.returncode == 0, done.stderr
    values = sorted(values_of(done), key=str)
    assert all(isinstance(value, list) for value in values)
    return values  # type: ignore[return-value]


@pytest.mark.slow
def test_a_capture_that_fails_on_one_rank_is_used_on_none(run_ranks: RunRanks) -> None:
    (_, results, lines, reset, count), (_, others, their_lines, theirs_reset, their_count) = run(1, run_ranks)
    assert results == others == [[2.0, 1.0]] * 5, "all steps are eager, and add up the same numbers"
    assert isinstance(lines, list)
    assert lines == their_lines
    assert re.fullmatch(
        r"warning: no CUDA graph, .* at a time: the capture failed on rank 1 of 2: operation not permitted when .*",
        lines[0],
    )
    assert (len(lines), "more" in lines[0]) == (1, False)
    assert (reset, theirs_reset) == (["graph", "step"], ["step"])
    assert count == their_count, "or the watchdog would blame the wrong rank for a hang"
