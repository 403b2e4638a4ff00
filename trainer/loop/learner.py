"""The learner of a run: model, optimizer and training step, built for a recipe."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from trainer.data import Dataset, Images
from trainer.data.augment import resize
from trainer.data.order import generator
from trainer.errors import ConfigError
from trainer.evaluation.evaluate import Evaluation, evaluate
from trainer.evaluation.views import average_views
from trainer.hardware import allow_tf32, without_tf32
from trainer.kernels.choice import unsupported_reason
from trainer.loop.batch_norm import has_single_values
from trainer.loop.compiling import CompiledNetwork
from trainer.loop.ema import WeightAverage
from trainer.loop.graphed_step import NUM_EAGER_STEPS, GraphedStep, GraphedStepByKind
from trainer.loop.loss import TrainingLoss, class_weights
from trainer.loop.optim import Optimizer
from trainer.loop.shards import share_of
from trainer.loop.step import Batch, TrainStep
from trainer.models import Classifier
from trainer.models.airbench import AirbenchNet
from trainer.models.head import run_once
from trainer.models.start import starting_network
from trainer.network_files import has_weights
from trainer.ranks.data_parallel import NUM_EAGER_STEPS as NUM_EAGER_STEPS_OF_DDP
from trainer.ranks.world import World
from trainer.recipes import ParameterKind, ParamGroup, Precision, Recipe, TestTimeViews

CPU = torch.device("cpu")
NUM_WHITENING_IMAGES = 5000
"""Training images from which the whitening is computed; fewer of more than 32 x 32 pixels, of the same size in all."""


class Step(Protocol):
    def __call__(self, batch: Batch) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """A model, its optimizer and its training step.

    Args:
        model: the classifier on the rank's device, without wrappers.
        step: updates the model by a batch; returns float32 `[2]`, the sum of losses and the number of correct answers
            over all ranks.
        precision: of the training steps on this machine.
        train_step: what `step` computes: the same, or one that a CUDA graph replays.
        average: the moving average of the weights, if the recipe has one. It is what is evaluated.
    """

    model: Classifier
    optimizer: Optimizer
    step: Step
    train_step: TrainStep
    precision: Precision
    recipe: Recipe
    average: WeightAverage[Classifier] | None = None

    @property
    def evaluated_model(self) -> Classifier:
        """The network that `predict` computes: that of the averaged weights, or of the trained ones."""
        return self.model if self.average is None else self.average.model

    @torch.inference_mode()
    def predict(self, pixels: torch.Tensor, views: TestTimeViews = "one") -> torch.Tensor:
        """Returns the mean of the logits over views of each image, as the exported model computes them: in float32.

        Args:
            pixels: uint8 `[B, C, H, W]`.

        Returns:
            float32 `[B, classes]`.
        """
        model = self.evaluated_model.eval()
        with without_tf32():
            return average_views(model, pixels, views)

    def evaluate(self, images: Images, indices: torch.Tensor | None, world: World) -> Evaluation:
        """Evaluates images as `evaluate` does, with the recipe's test-time views as a second figure if it has several.

        All ranks call this.
        """
        views = self.recipe.test_time_views
        with_views = None if views == "one" else partial(self.predict, views=views)
        return evaluate(self.predict, images, indices, world, predict_with_views=with_views)

    def rehearse(self, batches: Iterable[Batch]) -> None:
        """Runs steps on this rank alone, and takes back what they change."""
        state = copy.deepcopy(self.state_dict())
        step = self.step if isinstance(self.step, GraphedStep | GraphedStepByKind) else self.train_step
        try:
            for batch in batches:
                step.rehearse(batch)
        finally:
            self.load_state_dict(state)

    def release(self) -> None:
        """Frees what only training steps need: NCCL's communicator cannot close while a CUDA graph uses it."""
        if isinstance(self.step, GraphedStep | GraphedStepByKind):
            self.step.release()

    def state_dict(self) -> dict[str, Any]:
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def build_learner(  # noqa: PLR0913 (what decides a learner)
    recipe: Recipe,
    dataset: Dataset,
    train_indices: torch.Tensor,
    seed: int,
    world: World,
    log: Callable[[str], None],
    *,
    is_compiled: bool = False,
) -> Learner:
    """Builds the recipe's learner. The initial weights depend on the seed and the training images alone.

    Args:
        train_indices: int64, the images that are trained on.
        log: prints one line for the user.
        is_compiled: the steps compute the network's forward and backward passes by torch.compile.

    Raises:
        ConfigError: the network cannot take images of this size, normalises over single values, or cannot be compiled.
    """
    model = initial_model(recipe, dataset, train_indices, seed, log, device=world.device)
    _check_network(recipe, model, dataset.train.take(train_indices[:1]), world.num_shards)
    model.to(memory_format=torch.channels_last).to(world.device)
    world.broadcast([*model.parameters(), *model.buffers()])
    optimizer = Optimizer(parameter_groups(model, recipe), clip_norm=recipe.clip_norm)
    average = WeightAverage(model, recipe.ema_decay, warmup=recipe.ema_warmup) if recipe.ema_decay else None
    weights = class_weights(recipe.class_weights, dataset.train.labels[train_indices], len(dataset.classes))
    precision = recipe.as_computed_on(world.device).precision
    allow_tf32(precision == "tf32")
    autocast = partial(torch.autocast, world.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
    compiled = None
    if is_compiled:
        sizes = share_of(min(recipe.global_batch_size, len(train_indices)), 0, 1, world.num_shards).sizes
        compiled = CompiledNetwork(model, sizes, device=world.device, activity=world.activity, log=log)
    step = TrainStep(
        model=model,
        optimizer=optimizer,
        augment=recipe.augment,
        loss=TrainingLoss(recipe.label_smoothing, None if weights is None else weights.to(world.device)),
        autocast=autocast,
        world=world,
        average=average,
        compiled=compiled,
    )
    return Learner(
        model=model,
        optimizer=optimizer,
        train_step=step,
        step=_graphed(step, recipe, world, log) if world.device.type == "cuda" else step,
        precision=precision,
        recipe=recipe,
        average=average,
    )


def _graphed(step: TrainStep, recipe: Recipe, world: World, log: Callable[[str], None]) -> Step:
    """Returns the step as CUDA graphs, all captured on one stream: DDP is bound to that of its first step."""
    # The thread of backward passes gets its CUDA context with its first kernel; cuBLAS would warn that it has none.
    torch.ones((), device=world.device, requires_grad=True).mul(1).backward()
    reason = unsupported_reason(world.device)
    if reason is not None:
        log(f"warning: no Triton kernels, so steps are slower: {reason}")
    num_eager_steps = NUM_EAGER_STEPS_OF_DDP if world.uses_ddp else NUM_EAGER_STEPS
    make = partial(GraphedStep, step, log, world, stream=torch.cuda.Stream(), num_eager_steps=num_eager_steps)
    has_kinds = bool(recipe.resolutions) or recipe.whitening_bias_until < 1
    return GraphedStepByKind(make) if has_kinds else make()


def _check_network(recipe: Recipe, model: Classifier, image: torch.Tensor, num_shards: int) -> None:
    """Checks that the network can train on images as the recipe asks, whole and in the sizes of its `resolutions`.

    Args:
        image: uint8 `[1, C, H, W]`.
        num_shards: number of shards of a global batch.

    Raises:
        ConfigError: it cannot.
    """
    if recipe.global_batch_size <= num_shards and has_single_values(model, image):
        raise ConfigError(
            f"a batch norm of {recipe.network} would get one value per channel, as each shard of the batch has one "
            f"image: use a larger --global-batch-size, fewer shards or ranks, or larger images"
        )
    for _, size in recipe.resolutions:
        try:
            run_once(model, resize(image, size))
        except RuntimeError:
            raise ConfigError(
                f"{recipe.network} cannot take images of {size} pixels, as resolutions asks: choose a larger size, or "
                "a network of convolutions that ends in a global pool, such as airbench or resnet18"
            ) from None


def initial_model(
    recipe: Recipe,
    dataset: Dataset,
    train_indices: torch.Tensor,
    seed: int,
    log: Callable[[str], None] = lambda _line: None,
    *,
    device: torch.device = CPU,
) -> Classifier:
    """Returns the recipe's network before the first step, on the CPU.

    Args:
        train_indices: int64, the images that are trained on.
        log: prints one line for the user.
        device: computes the whitening, which takes a third of a second of a processor.

    Raises:
        TrainerError: see `starting_network`.
    """
    num_channels, image_size, _ = dataset.train.shape
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator("weights", seed).get_state())
        start = starting_network(
            recipe, num_channels=num_channels, image_size=image_size, num_classes=len(dataset.classes), log=log
        )
    mean, std = start.normalization or (dataset.mean, dataset.std)
    if len(mean) == 1:
        mean, std = mean * start.num_channels, std * start.num_channels
    model = Classifier(
        start.network,
        torch.tensor(mean),
        torch.tensor(std).clamp(min=1e-6),  # a channel with a single value would be divided by 0
        num_channels=num_channels,
        frozen_norms=start.frozen_norms,
        head=start.head,
    )
    if isinstance(start.network, AirbenchNet) and not has_weights(recipe):
        number = min(NUM_WHITENING_IMAGES, max(1, NUM_WHITENING_IMAGES * 32 * 32 // (image_size * image_size)))
        pixels = dataset.train.take(train_indices[:number]).to(device)
        with without_tf32():  # which the environment or an earlier run of this process may allow
            start.network.init_whitening(model.to(device).normalize(pixels))
    return model.to(CPU).train()


def parameter_groups(model: Classifier, recipe: Recipe) -> list[tuple[ParamGroup, list[nn.Parameter]]]:
    """Returns the recipe's parameter groups with the network's parameters in each."""
    groups: dict[ParameterKind, list[nn.Parameter]] = {kind: [] for kind in recipe.param_groups}
    heads: dict[ParameterKind, list[nn.Parameter]] = {kind: [] for kind in recipe.param_groups}
    for name, parameter in model.network.named_parameters():
        if parameter.requires_grad:
            kind = parameter_kind(name, parameter)
            if model.head is None or not name.startswith(f"{model.head}."):
                groups[kind].append(parameter)
            else:
                heads["head" if "head" in heads else kind].append(parameter)
    of_rest = [(recipe.param_groups[kind], parameters) for kind, parameters in groups.items()]
    settings = {kind: replace(group, lr=group.lr * recipe.head_lr) for kind, group in recipe.param_groups.items()}
    return [*of_rest, *((settings[kind], parameters) for kind, parameters in heads.items() if parameters)]


def parameter_kind(name: str, parameter: nn.Parameter) -> ParameterKind:
    """Returns the parameter group of a network's parameter, by its name and shape."""
    if parameter.ndim == 4:
        return "stem" if name.startswith("stem.") else "filters"
    return "matrices" if parameter.ndim == 2 else "vectors"
