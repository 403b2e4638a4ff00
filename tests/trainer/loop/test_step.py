"""The training step, eager, and replayed as a CUDA graph where there is a GPU."""

import math
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F

from tests.trainer.loop.runs import ALONE, SHORT, make_run
from tests.trainer.single_device import SingleDeviceMode
from trainer.data import Dataset, ImageSet
from trainer.data.augment import draw_params
from trainer.errors import ConfigError
from trainer.loop.ema import WeightAverage
from trainer.loop.graphed_step import GraphedStep
from trainer.loop.learner import initial_model, parameter_groups
from trainer.loop.loss import TrainingLoss
from trainer.loop.optim import Optimizer
from trainer.loop.step import Batch, StepKind, TrainStep
from trainer.network_files import with_files
from trainer.ranks.world import World
from trainer.recipes import RECIPES, Augment, ParamGroup
from trainer.recipes.hyperparameters import OptimizerName, Schedule
from trainer.records.checkpoint import weights_sha256

BLANK = ImageSet(torch.zeros(11, 1, 28, 28, dtype=torch.uint8), torch.zeros(11, dtype=torch.int64))


def batch_of(train: ImageSet, indices: torch.Tensor, device: torch.device, sizes: tuple[int, ...] = ()) -> Batch:
    """A global batch on one rank, in one shard or in shards of the given sizes."""
    return Batch(
        images=train.images.to(device),
        indices=indices.to(device),
        labels=train.labels[indices].to(device),
        augment_params=torch.zeros(len(indices), 6, device=device),
        dropout_seeds=indices.to(device),
        lr_factor=torch.tensor(1.0, device=device),
        sizes=sizes or (len(indices),),
        num_images=len(indices),
    )


def test_a_step_equals_a_plain_torch_loop(mini: Dataset, tmp_path: Path) -> None:
    run = make_run(SHORT, mini, tmp_path / "run")
    reference = make_run(SHORT, mini, tmp_path / "run").learner.model
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    run.learner.model.train()
    for start in range(0, 300, 100):
        indices = torch.arange(start, start + 100)
        loss_sum, correct = run.learner.step(batch_of(mini.train, indices, torch.device("cpu"))).tolist()
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


SMOOTH_NETWORK = """
from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(144, num_classes))
"""


@pytest.mark.parametrize(
    ("optimizer", "lr", "sizes"),
    [("sgd", 0.02, (40,)), ("sgd", 0.02, (13, 0, 7, 20)), ("adamw", 0.002, (13, 0, 7, 20))],
)
def test_steps_with_all_settings_equal_a_loop_in_float64(
    optimizer: OptimizerName, lr: float, sizes: tuple[int, ...], mini: Dataset, tmp_path: Path
) -> None:
    """Smoothed labels, clipped gradients, decoupled weight decay and a cosine with warm-up; one shard and several.

    The network is smooth, as roundings that change the larger of two values have other gradients.
    """
    num_steps, momentum, weight_decay, clip_norm = 8, 0.9, 0.3, 1.1
    network = tmp_path / "smooth.py"
    network.write_text(SMOOTH_NETWORK)
    group = ParamGroup(lr=lr, momentum=momentum, weight_decay=weight_decay, optimizer=optimizer, epsilon=1e-4)
    groups = dict.fromkeys(SHORT.param_groups, group)
    recipe = with_files(
        replace(SHORT, network=f"{network}:net", param_groups=groups, clip_norm=clip_norm, label_smoothing=0.1)
    )
    schedule = Schedule(kind="cosine", warmup=0.25, final=0.1)
    learner = make_run(recipe, mini, tmp_path / "run").learner
    learner.model.train()
    reference = deepcopy(learner.model).double()
    weights = list(reference.parameters())
    theirs: torch.optim.Optimizer = torch.optim.SGD(weights, lr=lr, momentum=momentum, nesterov=True)
    if optimizer == "adamw":
        theirs = torch.optim.AdamW(weights, lr=lr, eps=1e-4, weight_decay=weight_decay)
    norms = []
    for step in range(num_steps):
        indices = torch.arange(40 * step, 40 * step + 40)
        factor = torch.tensor(schedule.factor(step, num_steps))
        batch = batch_of(mini.train, indices, torch.device("cpu"), sizes)
        loss_sum = learner.step(replace(batch, lr_factor=factor))[0].item()

        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 5)) / 2
        rate = theirs.param_groups[0]["lr"] = lr * ((step + 1) / 3 if step < 2 else cosine)
        loss = F.cross_entropy(reference(mini.train.images[indices]), mini.train.labels[indices], label_smoothing=0.1)
        theirs.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights, clip_norm)))
        if optimizer == "sgd":  # torch's own decay is not decoupled
            torch._foreach_mul_([weight.data for weight in weights], 1 - rate * weight_decay)
        theirs.step()
        assert loss_sum / 40 == pytest.approx(loss.item(), rel=1e-5)
        for mine, expected in zip(learner.model.parameters(), weights, strict=True):
            torch.testing.assert_close(mine.double(), expected, rtol=0, atol=3e-7)
    assert min(norms) < clip_norm < max(norms), norms


def test_a_sharded_step_equals_the_step_of_the_whole_batch(mini: Dataset, tmp_path: Path) -> None:
    """Up to rounding, without batch norm; also with an empty shard and uneven ones."""
    whole, cut = (make_run(SHORT, mini, tmp_path / "run").learner for _ in range(2))
    for learner, sizes in ((whole, (100,)), (cut, (33, 0, 17, 50))):
        learner.model.train()
        result = learner.step(batch_of(mini.train, torch.arange(100), torch.device("cpu"), sizes))
        assert result[0].item() == pytest.approx(230, abs=15)
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_step_of_one_shard_has_nothing_to_add_up(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs leave out the vector of sums, and norms update their statistics themselves."""
    recipe = replace(SHORT, network="compact", widths=(4, 4, 4, 4))
    learners = []
    for is_only in (True, False):
        monkeypatch.setattr(TrainStep, "_has_one_shard", lambda self, batch, is_only=is_only: is_only)
        learner = make_run(recipe, mini, tmp_path / "run").learner
        learner.model.train()
        for start in (0, 30):
            result = learner.step(batch_of(mini.train, torch.arange(start, start + 30), torch.device("cpu")))
        assert all(parameter.grad is None for parameter in learner.model.parameters())
        learners.append({"result": result, **learner.model.state_dict()})
    for name, mine in learners[0].items():
        torch.testing.assert_close(mine, learners[1][name], rtol=1e-5, atol=1e-5, msg=name)


def test_a_failed_step_does_not_change_the_next_one(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed capture of a CUDA graph computes nothing; the step is then run eagerly."""
    undisturbed, disturbed = (make_run(SHORT, mini, tmp_path / "run").learner for _ in range(2))
    batch = batch_of(mini.train, torch.arange(100), torch.device("cpu"))

    def fail(self: Optimizer, lr_factor: torch.Tensor) -> None:
        raise RuntimeError("not permitted when stream is capturing")

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", fail)
        with pytest.raises(RuntimeError, match="not permitted"):
            disturbed.step(batch)
    for learner in (undisturbed, disturbed):
        learner.step(batch)
    assert weights_sha256(disturbed.model) == weights_sha256(undisturbed.model)


def test_dropout_depends_on_the_sample_alone(mini: Dataset, tmp_path: Path) -> None:
    """The same units are dropped however the batch is cut, and whatever else draws random numbers."""
    recipe = replace(SHORT, network="alexnet")

    def loss(sizes: tuple[int, ...], first_seed: int) -> float:
        learner = make_run(recipe, mini, tmp_path / "run").learner
        learner.model.train()
        batch = batch_of(mini.train, torch.arange(10), torch.device("cpu"), sizes)
        return float(learner.step(replace(batch, dropout_seeds=batch.dropout_seeds + first_seed))[0])

    whole = loss((10,), 0)
    torch.rand(3)
    assert loss((3, 0, 7), 0) == pytest.approx(whole, rel=1e-6)
    assert loss((10,), 1) != pytest.approx(whole, rel=1e-3)


WITH_EVERYTHING = replace(
    RECIPES["mnist-fast"],
    param_groups={
        **RECIPES["mnist-fast"].param_groups,
        "vectors": ParamGroup(lr=0.001, weight_decay=0.1, optimizer="adamw"),
    },
    clip_norm=1.0,
    ema_decay=0.99,
    augment=Augment(policy="trivial", mixup=0.2, cutmix=1.0),
)


# One of each kind of block and of each kind of augmentation.
@pytest.mark.parametrize(
    "name",
    [
        "mnist",
        "mnist-fast",
        "everything",
        "cifar10",
        "fashion-mnist",
        "mnist-alexnet",
        "mnist-googlenet",
        "mnist-resnet18",
    ],
)
def test_a_cuda_graph_can_hold_a_step(name: str, mini: Dataset) -> None:
    """Runs the step on a device whose tensors have no values, to find without a GPU what forbids a capture.

    A step must not wait for a value, choose a shape by one, or touch another device.
    """
    device = torch.device("meta")
    recipe = WITH_EVERYTHING if name == "everything" else RECIPES[name]
    model = initial_model(recipe, mini, torch.arange(500), seed=0).to(memory_format=torch.channels_last).to(device)
    model.train()
    step = TrainStep(
        model=model,
        optimizer=Optimizer(parameter_groups(model, recipe), clip_norm=recipe.clip_norm),
        augment=recipe.augment,
        loss=TrainingLoss(recipe.label_smoothing, torch.ones(10, device=device) if recipe is WITH_EVERYTHING else None),
        autocast=nullcontext,  # type: ignore[arg-type] # there is none for this device
        world=ALONE,
        average=WeightAverage(model, recipe.ema_decay, warmup=True) if recipe.ema_decay else None,
    )
    for sizes, kind in (((20,), StepKind()), ((10, 10), StepKind(trains_whitening_bias=False))):
        batch = replace(batch_of(mini.train, torch.arange(20), device, sizes), kind=kind)
        batch = replace(batch, augment_params=draw_params(recipe.augment, 20, 0, 0).to(device))
        step(batch)  # the steps before the capture may
        with SingleDeviceMode(device) as watch:
            result = step(batch)
        assert result.device == device
        assert watch.num_operations > 20


def test_operations_that_forbid_a_capture_are_found() -> None:
    """The test above would fail for these."""
    values = torch.ones(4, device="meta")
    with SingleDeviceMode(values.device):
        for bad in (
            lambda: bool(values.sum() > 0),
            lambda: values[values > 0],
            lambda: values[torch.tensor([1])],
            lambda: values + torch.ones(4),
            lambda: values * torch.tensor(2.0),
            lambda: values.cpu(),
        ):
            with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
                bad()


class FakeGraphedStep(GraphedStep):
    """Records which steps would be captured, replayed and run eagerly, without a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, can_capture: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "Stream", object)
        super().__init__(cast(TrainStep, self), print, ALONE)
        self.can_capture = can_capture
        self.calls: list[str] = []

    def _eager(self, batch: Batch) -> torch.Tensor:
        self.calls.append(f"eager {batch.num_images}")
        return torch.zeros(2)

    def _record(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        self.calls.append(f"capture {batch.num_images}")
        if not self.can_capture:
            raise RuntimeError("not permitted when stream is capturing")
        return cast(torch.cuda.CUDAGraph, self), torch.zeros(2)

    def disconnect(self) -> None:
        """As of the `TrainStep`."""

    def replay(self) -> None:
        self.calls.append("replay")

    def reset(self) -> None:
        self.calls.append("reset")


def run_steps(step: GraphedStep, sizes: list[int]) -> None:
    for size in sizes:
        step(batch_of(BLANK, torch.arange(size), torch.device("cpu")))


@pytest.mark.parametrize("sizes", [[10, 10, 10, 4, 10, 4, 10], [4, 10, 10, 4, 10, 4, 10]])
def test_the_full_batch_is_captured(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoch's last, smaller batch is not, even if it is due for the capture or is the first of a continued run."""
    step = FakeGraphedStep(monkeypatch)
    run_steps(step, sizes)
    assert step.calls == [*(f"eager {size}" for size in sizes[:4]), "capture 10", "replay", "eager 4", "replay"]


def test_a_replayed_graph_gets_the_images_of_its_batch_and_leaves_a_resident_set_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = FakeGraphedStep(monkeypatch)
    for shade in range(6):
        pool = ImageSet(torch.full_like(BLANK.images, shade), BLANK.labels)
        step(batch_of(pool, torch.arange(11), torch.device("cpu")))
    assert step._batch is not None
    assert step._batch.images.unique().tolist() == [5]
    resident = FakeGraphedStep(monkeypatch)
    run_steps(resident, [10] * 6)
    assert resident._batch is not None
    assert resident._batch.images.data_ptr() == BLANK.images.data_ptr()


def test_a_released_graph_is_neither_used_nor_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    step = FakeGraphedStep(monkeypatch)
    run_steps(step, [10] * 5)
    step.release()
    step.release()
    run_steps(step, [10])
    assert step.calls[-4:] == ["replay", "replay", "reset", "eager 10"]


def test_a_failed_capture_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    step = FakeGraphedStep(monkeypatch, can_capture=False)
    run_steps(step, [10] * 6)
    assert step.calls == ["eager 10"] * 3 + ["capture 10"] + ["eager 10"] * 3


def test_a_failed_capture_prints_its_first_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two more errors follow: that of our own clean-up, and that of the end of the capture."""

    class FailingStep:
        def __call__(self, batch: Batch) -> torch.Tensor:
            try:
                raise RuntimeError("operation not permitted: aten::nonzero")
            finally:
                raise RuntimeError("previous error during capture")

        def disconnect(self) -> None:
            """As of the `TrainStep`."""

    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())
    step = GraphedStep(cast(TrainStep, FailingStep()), print, ALONE)
    step._capture(batch_of(BLANK, torch.arange(3), torch.device("cpu")))
    assert capsys.readouterr().out.endswith("one kernel at a time: operation not permitted: aten::nonzero\n")
    assert step._graph is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_graph_equals_the_eager_step(mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as in `World.join` on a GPU
    device = torch.device("cuda", 0)
    world = World(rank=0, size=1, local_rank=0, device=device, num_threads=1)
    resident = ImageSet(mini.train.images.to(device), mini.train.labels)
    digests, is_captured = [], []
    for graphed in (False, True):
        run = make_run(SHORT, mini, tmp_path / "run", world=world)
        step = run.learner.step
        assert isinstance(step, GraphedStep)
        chosen = step if graphed else step._step
        assert isinstance(chosen, GraphedStep | TrainStep)
        run.learner.model.train()
        for number in range(30):
            size = 60 if number % 10 == 9 else 100  # the odd size runs eagerly in between
            chosen(batch_of(resident, torch.arange(number * 100, number * 100 + size), device))
        is_captured.append(getattr(step, "_graph", None) is not None)
        step.release()
        chosen(batch_of(resident, torch.arange(100), device))
        digests.append(weights_sha256(run.learner.model))
    assert is_captured == [False, True]
    assert digests[0] == digests[1]


def random_dataset(mini: Dataset, size: int, num_channels: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (40, num_channels, size, size), generator=generator, dtype=torch.uint8)
    std = (70.0,) * num_channels
    train = ImageSet(pixels, torch.arange(40) % len(mini.classes))
    return replace(mini, train=train, mean=(128.0,) * num_channels, std=std)


@pytest.mark.parametrize("name", sorted(name for name in RECIPES if not name.startswith(("mnist-", "finetune-"))))
def test_every_recipe_trains_on_shards_of_one_image(mini: Dataset, tmp_path: Path, name: str) -> None:
    """At a small image size, where some norms get one value per channel."""
    recipe = replace(RECIPES[name], augment=Augment(), global_batch_size=3, precision="float32")
    for size in (16, 32, 40):
        dataset = random_dataset(mini, size, num_channels=3)
        with suppress(ConfigError):
            learner = make_run(recipe, dataset, tmp_path / str(size)).learner
            break
    learner.model.train()
    for sizes in ((2, 1), (1,), (1, 0)):
        batch = batch_of(dataset.train, torch.arange(sum(sizes)), torch.device("cpu"), sizes)
        learner.step(replace(batch, lr_factor=torch.tensor(1e-3)))
    assert all(bool(tensor.isfinite().all()) for tensor in learner.model.state_dict().values())


def test_a_batch_of_shards_of_one_image_is_refused_where_norms_need_more(mini: Dataset, tmp_path: Path) -> None:
    recipe = replace(RECIPES["cifar10-bn-alexnet"], augment=Augment(), global_batch_size=1, precision="float32")
    with pytest.raises(ConfigError, match="one value per channel"):
        make_run(recipe, random_dataset(mini, 32, num_channels=3), tmp_path)
