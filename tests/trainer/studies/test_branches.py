"""Tests of runs that are trained side by side: each gets the bits that it gets alone."""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.loop.runs import ALONE, make_run
from trainer.data import Dataset
from trainer.loop.fit import fit
from trainer.loop.run import Run, restore
from trainer.loop.step import Batch
from trainer.recipes import RECIPES, Augment, Recipe
from trainer.recipes.hyperparameters import ParamGroup
from trainer.records.checkpoint import Checkpoints, weights_sha256
from trainer.signals import StopRequest
from trainer.studies.branches import Branches, _GraphedBranches, branch_key, train_side_by_side
from trainer.studies.trials import Trial, _next_group

MUON = replace(
    RECIPES["mnist-fast"],
    dataset="mnist-mini",
    widths=(4, 4, 4, 8),
    epochs=2,
    global_batch_size=900,
    precision="float32",
    ema_decay=0.9,
    clip_norm=1.0,
)
"""Muon, batch norm, augmentation, an average of the weights: 5 steps an epoch."""
DROPOUT = replace(
    RECIPES["mnist-lenet5"],
    dataset="mnist-mini",
    epochs=2,
    global_batch_size=1000,
    precision="float32",
    augment=Augment(shift=2, mixup=0.2),
    class_weights="balanced",
)
"""An epoch's last batch is half as large."""


def lone_digest(recipe: Recipe, mini: Dataset, folder: Path, seed: int) -> str:
    run = make_run(recipe, mini, folder / "alone", seed=seed)
    with StopRequest() as stop:
        fit(run, stop)
    return weights_sha256(run.learner.model)


def make_runs(recipes: dict[int, Recipe], mini: Dataset, folder: Path) -> list[Run]:
    return [make_run(recipe, mini, folder / f"seed-{seed}", seed=seed) for seed, recipe in recipes.items()]


@pytest.mark.parametrize("recipe", [MUON, DROPOUT], ids=["muon", "mixed"])
def test_each_seed_gets_the_bits_of_its_lone_run(recipe: Recipe, mini: Dataset, tmp_path: Path) -> None:
    runs = make_runs(dict.fromkeys((3, 5), recipe), mini, tmp_path)
    lines: list[str] = []
    assert train_side_by_side(runs, Checkpoints(tmp_path / "all", print), lines.append) == [None, None]
    assert len(lines) == recipe.epochs
    digests = [weights_sha256(run.learner.model) for run in runs]
    assert digests[1] == lone_digest(recipe, mini, tmp_path, seed=5)
    assert digests[0] != digests[1]
    again = make_run(recipe, mini, tmp_path / "seed-5", seed=5)  # its own checkpoint is there, for evaluate and export
    assert restore(again)
    assert again.is_trained
    again.use_final_weights()
    assert weights_sha256(again.learner.model) == digests[1]


def test_all_runs_share_one_copy_of_the_images(mini: Dataset, tmp_path: Path) -> None:
    branches = Branches(make_runs({0: MUON, 1: MUON}, mini, tmp_path), print)
    assert len({source.images.data_ptr() for source in branches._sources}) == 1


def test_candidates_of_a_sweep_differ_in_their_recipes_and_one_that_diverges_disturbs_no_other(
    mini: Dataset, tmp_path: Path
) -> None:
    wild = replace(MUON, param_groups=dict.fromkeys(MUON.param_groups, ParamGroup(lr=1e30)))
    other = replace(MUON, label_smoothing=0.0, augment=Augment())
    assert branch_key(wild) == branch_key(other) == branch_key(MUON) != branch_key(replace(MUON, epochs=3))
    runs = make_runs({0: wild, 1: other}, mini, tmp_path)
    errors = train_side_by_side(runs, Checkpoints(tmp_path / "all", print), lambda _: None)
    assert "training diverged" in str(errors[0])
    assert errors[1] is None
    assert weights_sha256(runs[1].learner.model) == lone_digest(other, mini, tmp_path, seed=1)


def test_runs_that_were_stopped_continue_to_the_same_bits(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.studies.branches.SAVE_EVERY_S", -1.0)

    class Stopped(Exception):
        pass

    def stop(line: str) -> None:
        if "epoch 2/" in line:
            raise Stopped

    kept = Checkpoints(tmp_path / "all", print)
    with pytest.raises(Stopped):
        train_side_by_side(make_runs({0: MUON, 1: MUON}, mini, tmp_path), kept, stop)
    lines: list[str] = []
    runs = make_runs({0: MUON, 1: MUON}, mini, tmp_path)
    train_side_by_side(runs, Checkpoints(tmp_path / "all", print), lines.append)
    assert [line.partition(":")[0] for line in lines] == ["2 runs side by side, epoch 2/2"]
    assert weights_sha256(runs[1].learner.model) == lone_digest(MUON, mini, tmp_path, seed=1)


def test_groups_are_of_runs_alike_and_of_about_the_same_size(tmp_path: Path) -> None:
    def sizes(recipes: list[Recipe], most: int) -> list[int]:
        waiting, found = [Trial(recipe, 0, tmp_path) for recipe in recipes], []
        while waiting:
            found.append(len(_next_group(waiting, most)))
            waiting = waiting[found[-1] :]
        return found

    stopping = replace(MUON, patience=2)
    assert sizes([MUON] * 100, 64) == [50, 50]
    assert sizes([MUON] * 3, 1) == [1, 1, 1]
    assert sizes([MUON, MUON, DROPOUT, stopping, stopping, MUON], 64) == [2, 1, 1, 1, 1]
    assert branch_key(stopping) is branch_key(replace(MUON, keep_best=True)) is None


class FakeStream:
    """A CUDA stream on a machine without a GPU: work is done at once."""

    def record_event(self) -> None: ...
    def wait_event(self, event: None) -> None: ...
    def wait_stream(self, stream: "FakeStream") -> None: ...


class FakeGraph:
    """A graph whose replays compute the steps of the batches that it was captured with."""

    def __init__(self, branches: _GraphedBranches, batches: list[Batch]) -> None:
        self._branches, self._batches = branches, batches
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        self._branches._fork(self._batches)

    def reset(self) -> None: ...


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("recipe", [replace(MUON, resolutions=((0.5, 20),)), DROPOUT], ids=["muon", "mixed"])
def test_replays_get_their_own_inputs(
    recipe: Recipe, mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each run, step and size of images; an epoch's last, smaller batch is not replayed."""
    graphs: list[FakeGraph] = []

    def record(branches: _GraphedBranches, batches: list[Batch]) -> FakeGraph:
        graphs.append(FakeGraph(branches, batches))
        return graphs[-1]

    monkeypatch.setattr(_GraphedBranches, "_record", record)
    runs = make_runs({0: recipe, 1: recipe}, mini, tmp_path)
    branches = Branches(runs, print)
    branches._compute = _GraphedBranches([run.learner.train_step for run in runs], branches._totals, print)
    for epoch in range(recipe.epochs):
        assert all(map(math.isfinite, branches.train_epoch(epoch)))
    assert [graph.num_replays for graph in graphs] == ([2, 2] if recipe.resolutions else [5])
    for run in runs:
        run.use_final_weights()
    assert weights_sha256(runs[1].learner.model) == lone_digest(recipe, mini, tmp_path, seed=1)


@pytest.mark.usefixtures("streams")
def test_a_capture_that_fails_leaves_the_steps_eager_and_tells_its_first_cause(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(branches: _GraphedBranches, batches: list[Batch]) -> FakeGraph:
        try:
            raise RuntimeError  # some of torch's say nothing
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(_GraphedBranches, "_record", record)
    [run] = make_runs({0: replace(MUON, epochs=1)}, mini, tmp_path)
    branches, lines = Branches([run], print), list[str]()
    branches._compute = _GraphedBranches([run.learner.train_step], branches._totals, lines.append)
    assert math.isfinite(branches.train_epoch(0)[0])
    assert lines == ["warning: no CUDA graph, the steps run one kernel at a time: RuntimeError"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["mnist", "mnist-fast", "cifar10", "cifar10-resnet18"])
def test_branches_of_a_graph_give_the_bits_of_lone_runs(
    recipe: str, mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as in `World.join` on a GPU
    world = replace(ALONE, device=torch.device("cuda", 0))
    # At cifar10's own rates, made for photographs, digits with their even background diverge in bfloat16.
    slow = {kind: replace(group, lr=0.01 * group.lr) for kind, group in RECIPES[recipe].param_groups.items()}
    short = replace(RECIPES[recipe], dataset="mnist-mini", epochs=2, global_batch_size=250, param_groups=slow)
    digests = []
    for seeds in ((0, 1, 2), (2,)):
        runs = [make_run(short, mini, tmp_path / f"{len(seeds)}-{seed}", world=world, seed=seed) for seed in seeds]
        if len(runs) > 1:
            lines: list[str] = []
            train_side_by_side(runs, Checkpoints(tmp_path / "all", print), lines.append)
            assert not any("no CUDA graph" in line for line in lines)
        else:
            with StopRequest() as stop:
                fit(runs[0], stop)
        digests.append(weights_sha256(runs[-1].learner.model))
    assert digests[0] == digests[1]
