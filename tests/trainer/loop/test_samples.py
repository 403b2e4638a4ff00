"""The ranks' shares of a batch add up to the batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.loop.runs import SHORT, make_run
from trainer.data import Dataset
from trainer.loop.samples import EpochSamples, share_of_step
from trainer.loop.shards import sum_in_tree
from trainer.loop.step import StepKind
from trainer.ranks.world import World
from trainer.recipes import Augment, Recipe


class IsolatedRank(World):
    """A rank that waits for no other and records the sums that it would have reduced."""

    recorded: list[torch.Tensor]

    def broadcast_object(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        return

    def broadcast(self, tensors: list[torch.Tensor]) -> None:
        return

    def all_reduce(self, sums: torch.Tensor) -> torch.Tensor:
        self.recorded.append(sums.clone())
        return sums


def sums_on_ranks(size: int, recipe: Recipe, dataset: Dataset, folder: Path, kind: StepKind) -> torch.Tensor:
    """Returns the sums of a step of 22 images under four virtual shards, which so many ranks compute."""
    recipe = replace(recipe, global_batch_size=22)
    recorded: list[torch.Tensor] = []
    for rank in range(size):
        world = IsolatedRank(
            rank=rank, size=size, local_rank=rank, device=torch.device("cpu"), num_threads=1, virtual_shards=4
        )
        object.__setattr__(world, "recorded", recorded)
        run = make_run(recipe, dataset, folder / f"{size}", world=world)
        samples = EpochSamples.draw(run, epoch=1)
        share = share_of_step(run, 2)
        run.learner.step(samples.batch(dataset.train.images, share, torch.tensor(1.0), kind))
    return sum_in_tree(lambda rank: recorded[rank], size)


@pytest.mark.parametrize("num_images", [1, 2, 7, 100])
def test_ranks_that_share_a_batch_add_up_to_it(num_images: int, mini: Dataset, tmp_path: Path) -> None:
    """The gradient of the batch is the sum of the ranks' gradients, also if a rank has no image."""
    totals = []
    for size in (1, 3):
        sums: list[torch.Tensor] = []
        for rank in range(size):
            world = IsolatedRank(rank=rank, size=size, local_rank=rank, device=torch.device("cpu"), num_threads=2)
            object.__setattr__(world, "recorded", sums)  # the base class is frozen
            run = make_run(replace(SHORT, global_batch_size=num_images), mini, tmp_path / f"{size}", world=world)
            samples = EpochSamples(
                indices=run.train_indices[:num_images],
                labels=mini.train.labels[run.train_indices[:num_images]],
                augment_params=torch.zeros(num_images, 6),
                dropout_seeds=torch.zeros(num_images),
            )
            share = share_of_step(run, 0)
            run.learner.step(samples.batch(mini.train.images, share, torch.tensor(1.0), StepKind()))
        totals.append(torch.stack(sums).sum(dim=0))
    assert torch.allclose(totals[0], totals[1], atol=1e-5)


def test_augmented_and_mixed_batches_have_the_same_bits_on_any_number_of_ranks(mini: Dataset, tmp_path: Path) -> None:
    """Under virtual shards. The shards are uneven: 22 images in 4 parts."""
    augment = Augment(
        crop_area=0.5,
        flip="random",
        rotate_degrees=5,
        policy="trivial",
        brightness=0.4,
        erase=0.5,
        mixup=0.2,
        cutmix=1.0,
    )
    recipe = replace(SHORT, augment=augment, label_smoothing=0.1)

    def sums_of(size: int) -> torch.Tensor:
        return sums_on_ranks(size, recipe, mini, tmp_path, StepKind())

    alone = sums_of(1)
    assert alone[-2] > 22  # the sum of the losses
    for size in (2, 4):
        assert torch.equal(sums_of(size), alone)
