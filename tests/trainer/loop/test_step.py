"""One step, eager; and the same steps replayed as a CUDA graph, where there is a GPU."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.trainer.loop.test_fit import SHORT, make_run
from trainer.data import Dataset, ImageSet
from trainer.loop.learner import initial_model, parameter_groups
from trainer.loop.optim import Optimizer
from trainer.loop.step import Batch, GraphedStep, TrainStep
from trainer.ranks.world import World
from trainer.recipes import RECIPES
from trainer.records.checkpoint import weights_sha256


def batch_of(indices: torch.Tensor, device: torch.device, sizes: tuple[int, ...] = ()) -> Batch:
    """A whole global batch, on one rank; one shard unless `sizes` cuts it."""
    return Batch(
        indices=indices.to(device),
        augment_params=torch.zeros(len(indices), 6, device=device),
        dropout_seeds=indices.to(device),
        lr_factor=torch.tensor(1.0, device=device),
        sizes=sizes or (len(indices),),
        num_images=len(indices),
    )


def test_a_step_is_what_a_user_would_write(mini: Dataset, tmp_path: Path) -> None:
    run = make_run(SHORT, mini, tmp_path / "run")
    reference = make_run(SHORT, mini, tmp_path / "run").learner.model
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    run.learner.model.train()
    for start in range(0, 300, 100):
        indices = torch.arange(start, start + 100)
        loss_sum, correct = run.learner.step(batch_of(indices, torch.device("cpu"))).tolist()
        logits = reference(mini.train.images[indices])
        labels = mini.train.labels[indices]
        loss = F.cross_entropy(logits, labels)
        assert loss_sum / 100 == pytest.approx(loss.item(), rel=1e-5)
        assert correct == int((logits.argmax(dim=1) == labels).sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for mine, theirs in zip(run.learner.model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_shards_of_a_batch_make_the_same_step_as_the_batch(mini: Dataset, tmp_path: Path) -> None:
    """Up to rounding, where there is no batch norm; also with an empty shard and uneven ones."""
    whole, cut = (make_run(SHORT, mini, tmp_path / "run").learner for _ in range(2))
    for learner, sizes in ((whole, (100,)), (cut, (33, 0, 17, 50))):
        learner.model.train()
        result = learner.step(batch_of(torch.arange(100), torch.device("cpu"), sizes))
        assert result[0].item() == pytest.approx(230, abs=15)
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_step_that_failed_leaves_nothing_to_the_next(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a CUDA graph cannot be captured, which computes nothing, and the step is taken eagerly instead."""
    calm, disturbed = (make_run(SHORT, mini, tmp_path / "run").learner for _ in range(2))
    batch = batch_of(torch.arange(100), torch.device("cpu"))

    def fail(self: Optimizer, lr_factor: torch.Tensor) -> None:
        raise RuntimeError("not permitted when stream is capturing")

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", fail)
        with pytest.raises(RuntimeError, match="not permitted"):
            disturbed.step(batch)
    for learner in (calm, disturbed):
        learner.step(batch)
    assert weights_sha256(disturbed.model) == weights_sha256(calm.model)


def test_dropout_belongs_to_the_sample(mini: Dataset, tmp_path: Path) -> None:
    """However the batch is cut, and whatever else draws random numbers, the same units are dropped."""
    recipe = replace(SHORT, network="alexnet")

    def loss(sizes: tuple[int, ...], first_seed: int) -> float:
        learner = make_run(recipe, mini, tmp_path / "run").learner
        learner.model.train()
        batch = batch_of(torch.arange(10), torch.device("cpu"), sizes)
        return float(learner.step(replace(batch, dropout_seeds=batch.dropout_seeds + first_seed))[0])

    whole = loss((10,), 0)
    torch.rand(3)
    assert loss((3, 0, 7), 0) == pytest.approx(whole, rel=1e-6)
    assert loss((10,), 1) != pytest.approx(whole, rel=1e-3)


class StaysOn(TorchDispatchMode):
    """Fails on an operation that takes a tensor from another device, or makes one there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, results)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device == self.device for tensor in tensors), func
        self.num_operations += 1
        return results


# One of each kind of block and of each kind of augmentation.
@pytest.mark.parametrize(
    "name", ["mnist", "mnist-fast", "cifar10", "fashion-mnist", "mnist-alexnet", "mnist-googlenet", "mnist-resnet18"]
)
def test_a_cuda_graph_can_hold_a_step(name: str, mini: Dataset) -> None:
    """What forbids a capture is found without a GPU, on a device whose tensors have no values.

    Nothing in a step may wait for a value, nor choose shapes by one, nor touch another device.
    """
    device = torch.device("meta")
    recipe = RECIPES[name]
    model = initial_model(recipe, mini, torch.arange(500), seed=0).to(memory_format=torch.channels_last).to(device)
    model.train()
    step = TrainStep(
        model=model,
        optimizer=Optimizer(parameter_groups(model, recipe)),
        data=ImageSet(mini.train.images.to(device), mini.train.labels.to(device)),
        augment=recipe.augment,
        label_smoothing=recipe.label_smoothing,
        autocast=nullcontext,  # type: ignore[arg-type] # there is none for this device
        all_reduce=lambda sums: sums,
    )
    for sizes in ((20,), (10, 10)):
        batch = batch_of(torch.arange(20), device, sizes)
        step(batch)  # the first ones may, before the capture
        with StaysOn(device) as watch:
            result = step(batch)
        assert result.device == device
        assert watch.num_operations > 20


def test_what_a_cuda_graph_cannot_hold_is_found() -> None:
    """Of the test above: it would fail for these."""
    there = torch.ones(4, device="meta")
    with StaysOn(there.device):
        for bad in (
            lambda: bool(there.sum() > 0),
            lambda: there[there > 0],
            lambda: there[torch.tensor([1])],
            lambda: there + torch.ones(4),
            lambda: there * torch.tensor(2.0),
            lambda: there.cpu(),
        ):
            with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
                bad()


class Rehearsal(GraphedStep):
    """Which steps would be captured, replayed and computed eagerly, without a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, can_capture: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "Stream", object)
        super().__init__(cast(TrainStep, None), print)
        self.can_capture = can_capture
        self.seen: list[str] = []

    def _eager(self, batch: Batch) -> torch.Tensor:
        self.seen.append(f"eager {batch.num_images}")
        return torch.zeros(2)

    def _capture(self, batch: Batch) -> None:
        self.seen.append(f"capture {batch.num_images}")
        if self.can_capture:
            self._graph, self._batch, self._result = cast(torch.cuda.CUDAGraph, self), batch, torch.zeros(2)

    def replay(self) -> None:
        self.seen.append("replay")

    def reset(self) -> None:
        self.seen.append("reset")


def take(step: GraphedStep, sizes: list[int]) -> None:
    for size in sizes:
        step(batch_of(torch.arange(size), torch.device("cpu")))


@pytest.mark.parametrize("sizes", [[10, 10, 10, 4, 10, 4, 10], [4, 10, 10, 4, 10, 4, 10]])
def test_it_is_the_full_batch_that_is_captured(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an epoch's last, smaller one comes when it is time, or first in a run that goes on."""
    step = Rehearsal(monkeypatch)
    take(step, sizes)
    assert step.seen == [*(f"eager {size}" for size in sizes[:4]), "capture 10", "replay", "eager 4", "replay"]


def test_a_released_graph_is_not_used_or_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Rehearsal(monkeypatch)
    take(step, [10] * 5)
    step.release()
    step.release()
    take(step, [10])
    assert step.seen[-4:] == ["replay", "replay", "reset", "eager 10"]


def test_what_cannot_be_captured_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Rehearsal(monkeypatch, can_capture=False)
    take(step, [10] * 6)
    assert step.seen == ["eager 10"] * 3 + ["capture 10"] + ["eager 10"] * 3


def test_the_first_error_of_a_capture_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the way out, first our own cleaning up fails, and then the end of the capture."""

    def fail(batch: Batch) -> torch.Tensor:
        try:
            raise RuntimeError("operation not permitted: aten::nonzero")
        finally:
            raise RuntimeError("previous error during capture")

    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())
    step = GraphedStep(cast(TrainStep, fail), print)
    step._capture(batch_of(torch.arange(3), torch.device("cpu")))
    assert capsys.readouterr().out.endswith("one kernel at a time: operation not permitted: aten::nonzero\n")
    assert step._graph is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_computes_what_the_eager_step_does(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as `World.join` has it on a GPU
    device = torch.device("cuda", 0)
    world = World(rank=0, size=1, local_rank=0, device=device, num_threads=1)
    digests, said = [], []
    for graphed in (False, True):
        run = make_run(SHORT, mini, tmp_path / "run", world=world)
        step = run.learner.step
        assert isinstance(step, GraphedStep)
        chosen = step if graphed else step._step
        assert isinstance(chosen, GraphedStep | TrainStep)
        run.learner.model.train()
        for number in range(30):
            size = 60 if number % 10 == 9 else 100  # the odd size runs eagerly in between
            chosen(batch_of(torch.arange(number * 100, number * 100 + size), device))
        said.append(getattr(step, "_graph", None) is not None)
        step.release()
        chosen(batch_of(torch.arange(100), device))
        digests.append(weights_sha256(run.learner.model))
    assert said == [False, True]
    assert digests[0] == digests[1]
