"""Trains small runs by DDP on several ranks, which are forks of one process: `python -m … DATA_DIR FOLDER PORT`.

Writes the weights and results of each case to FOLDER, for `test_data_parallel`, which also trains them on one rank.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tests.trainer.loop.runs import SHORT, make_run
from trainer.config import GradientReduction
from trainer.data import Dataset, load_dataset
from trainer.loop.run import Run
from trainer.loop.sources import ResidentSource
from trainer.ranks.world import World
from trainer.recipes import RECIPES, Augment, ParamGroup, Recipe

NUM_IMAGES = 122
"""Training images: batches of 60, 60 and 2, of which the last one leaves some ranks or shards without images."""
WITH_EVERYTHING = replace(
    RECIPES["mnist-fast"],
    precision="float32",
    param_groups={
        **RECIPES["mnist-fast"].param_groups,
        "vectors": ParamGroup(lr=0.001, weight_decay=0.1, optimizer="adamw"),
    },
    network="airbench",
    widths=(8, 8, 16),
    whitening_bias_until=0.5,
    clip_norm=1.0,
    ema_decay=0.9,
    augment=Augment(shift=1, mixup=0.2),
)
OWN_NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.first = nn.Conv2d(1, 4, 5, stride=4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 6 * 6, num_classes)

    def forward(self, images):
        return self.head(self.dropout(self.first(images).relu().flatten(1)))
"""


@dataclass(frozen=True)
class Case:
    """A run of a few steps.

    Args:
        recipe: None for the network above.
        num_ranks: worlds that train it.
    """

    recipe: Recipe | None = SHORT
    num_parts: int = 1
    num_ranks: tuple[int, ...] = (2,)
    reduction: GradientReduction = "ddp"


CASES = {
    "plain": Case(num_ranks=(2, 3)),
    "norms, clipping, average": Case(WITH_EVERYTHING, num_parts=2),
    "norms, ranks without images": Case(WITH_EVERYTHING, num_ranks=(3,)),
    "frozen": Case(replace(SHORT, freeze_until="fc1")),
    "unused weights, dropout": Case(None, num_parts=2),
    "bfloat16": Case(reduction="ddp-bfloat16"),
}


def train(case: Case, mini: Dataset, folder: Path, world: World, *, stop_after: int | None = None) -> dict[str, Any]:
    """Trains two epochs; with `stop_after`, loads the state after that many steps into a new learner.

    Returns:
        The final state and the results of the steps.
    """
    world = replace(world, grad_accumulation=case.num_parts, gradient_reduction=case.reduction)
    run = _make(case, mini, folder, world)
    results = []
    for step in range(2 * run.steps_per_epoch):
        if step == stop_after:
            state = run.learner.state_dict()
            run = _make(case, mini, folder, world)
            run.learner.load_state_dict(state)
        results.append(run.learner.step(ResidentSource(run).batch(step)).clone())
    return {"state": run.learner.state_dict(), "results": torch.stack(results)}


def _make(case: Case, mini: Dataset, folder: Path, world: World) -> Run:
    recipe = case.recipe
    if recipe is None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "net.py").write_text(OWN_NETWORK)
        recipe = replace(SHORT, network=f"{folder / 'net.py'}:Net")
    run = make_run(replace(recipe, global_batch_size=60), mini, folder / f"rank-{world.rank}", world=world)
    run.train_indices = run.train_indices[:NUM_IMAGES]
    run.learner.model.train()
    return run


def _rank(rank: int, size: int, data_dir: Path, folder: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    mini = load_dataset("mnist-mini", data_dir, log=lambda line: None)
    found = {}
    with World.join("cpu") as joined:
        world = replace(joined, shared_memory=None, num_threads=1)
        for name, case in CASES.items():
            if size in case.num_ranks:
                found[name] = train(case, mini, folder / name, world)
        if size == 3:
            # After the step with two images, as sums of two numbers do not depend on their order.
            found["continued"] = train(CASES["plain"], mini, folder / "continued", world, stop_after=3)
    torch.save(found, folder / f"{rank}.pt")


def main(arguments: Sequence[str]) -> None:
    """Runs three ranks, and then two."""
    data_dir, folder, port = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    import torch._dynamo  # noqa: F401 (DDP imports it: once, before the forks)

    context = get_context("fork")
    for size in (3, 2):
        own = folder / str(size)
        own.mkdir(parents=True)
        ranks = [context.Process(target=_rank, args=(rank, size, data_dir, own, port)) for rank in range(size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
