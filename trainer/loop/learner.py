"""The learner of a run: model, optimizer and training step, built for a recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from trainer.data import Dataset, Images
from trainer.data.order import generator
from trainer.errors import ConfigError
from trainer.evaluation.evaluate import Evaluation, evaluate
from trainer.evaluation.views import average_views
from trainer.loop.batch_norm import has_single_values
from trainer.loop.optim import Optimizer
from trainer.loop.step import Batch, GraphedStep, TrainStep
from trainer.models import Classifier, build_network
from trainer.models.airbench import AirbenchNet
from trainer.models.originals import published_normalization
from trainer.ranks.world import World
from trainer.recipes import PRETRAINED_PREFIX, ParameterKind, ParamGroup, Recipe, TestTimeViews

NUM_WHITENING_IMAGES = 5000


class Step(Protocol):
    def __call__(self, batch: Batch) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """A model, its optimizer and its training step.

    Args:
        model: the classifier on the rank's device, without wrappers.
        step: updates the model by a batch; returns float32 `[2]`, the sum of losses and the number of correct answers
            over all ranks.
        autocast: makes the context of the forward pass's precision.
        device: the rank's device.
    """

    model: Classifier
    optimizer: Optimizer
    step: Step
    autocast: Callable[[], torch.autocast]
    recipe: Recipe
    device: torch.device

    @property
    def precision(self) -> str:
        """The precision of the forward pass on this machine."""
        with self.autocast():
            return "bfloat16" if torch.is_autocast_enabled(self.device.type) else "float32"

    def predict(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns logits for one view of each image, as the exported model computes them.

        Args:
            pixels: uint8 `[B, C, H, W]`.

        Returns:
            float32 `[B, classes]`.
        """
        return self._predict(pixels, "one")

    def predict_with_views(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the mean of the logits over the recipe's test-time views, for the same arguments."""
        return self._predict(pixels, self.recipe.test_time_views)

    def evaluate(self, images: Images, indices: torch.Tensor | None, world: World) -> Evaluation:
        """Evaluates images as `evaluate` does, with the recipe's test-time views as a second figure if it has several.

        All ranks call this.
        """
        with_views = None if self.recipe.test_time_views == "one" else self.predict_with_views
        return evaluate(self.predict, images, indices, world, predict_with_views=with_views)

    @torch.inference_mode()
    def _predict(self, pixels: torch.Tensor, views: TestTimeViews) -> torch.Tensor:
        self.model.eval()
        with self.autocast():
            return average_views(self.model, pixels, views)

    def release(self) -> None:
        """Frees what only training steps need: NCCL's communicator cannot close while a CUDA graph uses it."""
        if isinstance(self.step, GraphedStep):
            self.step.release()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def build_learner(
    recipe: Recipe, dataset: Dataset, train_indices: torch.Tensor, seed: int, world: World, log: Callable[[str], None]
) -> Learner:
    """Builds the recipe's learner. The initial weights depend on the seed and the training images alone.

    Args:
        train_indices: int64, the images that are trained on.
        log: prints one line for the user.

    Raises:
        ConfigError: the network cannot take images of this size, or normalises over single values.
    """
    model = initial_model(recipe, dataset, train_indices, seed)
    first = dataset.train.take(train_indices[:1])
    if recipe.global_batch_size <= world.num_shards and has_single_values(model, first):
        raise ConfigError(
            f"a batch norm of {recipe.network} would get one value per channel, as each shard of the batch has one "
            f"image: use a larger --global-batch-size, fewer shards or ranks, or larger images"
        )
    model.to(memory_format=torch.channels_last).to(world.device)
    optimizer = Optimizer(parameter_groups(model, recipe))
    autocast = partial(
        torch.autocast,
        world.device.type,
        dtype=torch.bfloat16,
        enabled=recipe.as_computed_on(world.device).precision == "bfloat16",
    )
    step = TrainStep(
        model=model,
        optimizer=optimizer,
        augment=recipe.augment,
        label_smoothing=recipe.label_smoothing,
        autocast=autocast,
        all_reduce=world.all_reduce,
    )
    world.broadcast([*model.parameters(), *model.buffers()])
    return Learner(
        model=model,
        optimizer=optimizer,
        step=GraphedStep(step, log) if world.device.type == "cuda" else step,
        autocast=autocast,
        recipe=recipe,
        device=world.device,
    )


def initial_model(recipe: Recipe, dataset: Dataset, train_indices: torch.Tensor, seed: int) -> Classifier:
    """Returns the recipe's network before the first step, on the CPU."""
    num_channels, image_size, _ = dataset.train.shape
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator("weights", seed).get_state())
        network = build_network(
            recipe.network,
            num_channels=num_channels,
            image_size=image_size,
            num_classes=len(dataset.classes),
            widths=recipe.widths,
        )
    mean, std = dataset.mean, dataset.std
    if recipe.network.startswith(PRETRAINED_PREFIX):
        mean, std = published_normalization(recipe.network.removeprefix(PRETRAINED_PREFIX))
    # A channel with a single value would be divided by 0.
    model = Classifier(network, torch.tensor(mean), torch.tensor(std).clamp(min=1e-6))
    if isinstance(network, AirbenchNet):
        network.init_whitening(model.normalize(dataset.train.take(train_indices[:NUM_WHITENING_IMAGES])))
    return model


def parameter_groups(model: Classifier, recipe: Recipe) -> list[tuple[ParamGroup, list[nn.Parameter]]]:
    """Returns the recipe's parameter groups with the network's parameters in each."""
    groups: dict[ParameterKind, list[nn.Parameter]] = {kind: [] for kind in recipe.param_groups}
    for name, parameter in model.network.named_parameters():
        if parameter.requires_grad:
            groups[parameter_kind(name, parameter)].append(parameter)
    return [(recipe.param_groups[kind], parameters) for kind, parameters in groups.items()]


def parameter_kind(name: str, parameter: nn.Parameter) -> ParameterKind:
    """Returns the parameter group of a network's parameter, by its name and shape."""
    if parameter.ndim == 4:
        return "stem" if name.startswith("stem.") else "filters"
    return "matrices" if parameter.ndim == 2 else "vectors"
