"""Trains several seeds of a recipe at once, as one network whose tensors have an additional dimension.

torch.func's vmap turns the networks' convolutions into one grouped convolution and their matrix products into one
batched product. Each seed keeps its own initial weights, order of samples and augmentation, so that its network equals
that of a single run up to rounding (float32: about 1e-6 after some steps). One kernel launch serves all seeds, which
pays off where launches take the time, not arithmetic.
"""

import copy
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from trainer.data.augment import augment_batch
from trainer.errors import DivergenceError
from trainer.loop.learner import parameter_kind
from trainer.loop.optim import Optimizer
from trainer.loop.run import Run
from trainer.loop.samples import EpochSamples
from trainer.loop.saving import save
from trainer.loop.sources import ResidentSource
from trainer.models.layers import dropout_layers, use_dropout_seeds
from trainer.recipes import ParameterKind, ParamGroup, Recipe
from trainer.records.checkpoint import Checkpoints


def can_stack(recipe: Recipe) -> bool:
    """Returns whether stacked seeds equal single runs.

    Muon and a limit of the gradients' norm are excluded, as their updates are not element by element; so are mixtures
    of images, and all that follows each epoch's validation, which stacked runs do without.
    """
    is_plain = not (recipe.clip_norm or recipe.ema_decay or recipe.patience or recipe.keep_best)
    has_muon = any(group.optimizer == "muon" for group in recipe.param_groups.values())
    return is_plain and recipe.class_weights == "none" and not recipe.augment.mixes and not has_muon


class StackedTrainer:
    """Trains runs that differ in their seed alone, in lockstep.

    Args:
        runs: untrained, of one recipe and one data set. Their own learners take no step; `copy_to_runs` gives their
            models the trained weights.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        first = runs[0]
        self._recipe, self._device = first.recipe, first.world.device
        self._images = ResidentSource(first).images
        networks = [run.learner.model.network for run in runs]
        self._parameters, self._buffers = stack_module_state(networks)
        self._template = copy.deepcopy(networks[0]).to("meta")
        self._dropouts = dropout_layers(self._template)
        self._optimizer = Optimizer(self._param_groups(networks[0]))
        self.step = 0

    def train_epoch(self, epoch: int) -> None:
        """Trains an epoch.

        Raises:
            DivergenceError: the loss of a seed is not finite.
        """
        losses = self.train_steps(self.draw(epoch), num_steps=self.runs[0].steps_per_epoch)
        if not bool(losses.isfinite().all()):
            seed = self.runs[int((~losses.isfinite()).nonzero()[0])].seed
            raise DivergenceError(f"training diverged in epoch {epoch + 1}: the loss of seed {seed} is not finite")

    def draw(self, epoch: int) -> EpochSamples:
        """Draws an epoch's samples for each of the S seeds: tensors `[S, N, ...]`."""
        drawn = [EpochSamples.draw(run, epoch).to(self._device) for run in self.runs]
        return EpochSamples(
            indices=torch.stack([samples.indices for samples in drawn]),
            labels=torch.stack([samples.labels for samples in drawn]),
            augment_params=torch.stack([samples.augment_params for samples in drawn]),
            dropout_seeds=torch.stack([samples.dropout_seeds for samples in drawn]),
        )

    def train_steps(self, samples: EpochSamples, *, num_steps: int) -> torch.Tensor:
        """Trains the first steps of an epoch.

        Args:
            samples: from `draw`.

        Returns:
            The sum of mean losses of each seed, float32 `[S]`.
        """
        size, steps_per_epoch = self._recipe.global_batch_size, self.runs[0].steps_per_epoch
        self._template.train()
        losses = torch.zeros(len(self.runs), device=self._device)
        lr_factors = self.runs[0].lr_factors(self.step // steps_per_epoch)
        for start in range(0, num_steps * size, size):
            lr_factor = lr_factors[self.step % steps_per_epoch]
            losses += self._train_step(samples, slice(start, start + size), lr_factor)
            self.step += 1
        return losses

    def copy_to_runs(self) -> None:
        """Copies each seed's weights into the model of its run."""
        for number, run in enumerate(self.runs):
            state = {name: tensor[number].detach() for name, tensor in (self._parameters | self._buffers).items()}
            run.learner.model.network.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "parameters": {name: tensor.detach() for name, tensor in self._parameters.items()},
            "buffers": dict(self._buffers),
            "optimizer": self._optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for tensors, saved in ((self._parameters, state["parameters"]), (self._buffers, state["buffers"])):
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _param_groups(self, network: nn.Module) -> list[tuple[ParamGroup, list[nn.Parameter]]]:
        groups: dict[ParameterKind, list[nn.Parameter]] = {kind: [] for kind in self._recipe.param_groups}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                groups[parameter_kind(name, parameter)].append(self._parameters[name])
        return [(self._recipe.param_groups[kind], parameters) for kind, parameters in groups.items()]

    def _train_step(self, samples: EpochSamples, part: slice, lr_factor: torch.Tensor) -> torch.Tensor:
        """Trains one step of all seeds on a part of the epoch; returns their mean losses, float32 `[S]`."""
        indices, dropout_seeds = samples.indices[:, part], samples.dropout_seeds[:, part]
        num_seeds, size = indices.shape
        learner = self.runs[0].learner
        pixels = torch.cat(
            [
                augment_batch(self._recipe.augment, self._images, chosen, drawn)
                for chosen, drawn in zip(indices, samples.augment_params[:, part], strict=True)
            ]
        )
        labels = samples.labels[:, part].flatten()
        with learner.autocast():
            images = learner.model.normalize(pixels).unflatten(0, (num_seeds, size))
            logits = vmap(self._forward)(self._parameters, self._buffers, images, dropout_seeds)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), labels, label_smoothing=self._recipe.label_smoothing, reduction="none"
        )
        (losses.sum() / size).backward()
        self._optimizer.step(lr_factor)
        self._optimizer.zero_grad()
        return losses.detach().view(num_seeds, size).mean(dim=1)

    def _forward(
        self,
        parameters: dict[str, torch.Tensor],
        buffers: dict[str, torch.Tensor],
        images: torch.Tensor,
        dropout_seeds: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the logits of one seed's network."""
        with use_dropout_seeds(self._dropouts, dropout_seeds):
            logits: torch.Tensor = functional_call(self._template, (parameters, buffers), (images,))
        return logits


def train_stacked(runs: list[Run], checkpoints: Checkpoints) -> None:
    """Trains runs together to the end and saves each; a checkpoint follows each epoch.

    Each run gets its trained weights and its share of the training time.

    Raises:
        DivergenceError: the loss of a seed is not finite.
    """
    trainer, seconds = StackedTrainer(runs), 0.0
    state = checkpoints.load_newest()
    if state is not None:
        trainer.load_state_dict(state)
        seconds = state["seconds"]
    seeds = f"seeds {runs[0].seed} to {runs[-1].seed} together"
    for epoch in range(trainer.step // runs[0].steps_per_epoch, runs[0].recipe.epochs):
        began = time.perf_counter()
        trainer.train_epoch(epoch)
        _synchronize(runs[0])
        seconds += time.perf_counter() - began
        checkpoints.save(trainer.step, {**trainer.state_dict(), "seconds": seconds})
        print(f"{seeds}, epoch {epoch + 1}/{runs[0].recipe.epochs}: {seconds:.1f} s", flush=True)
    trainer.copy_to_runs()
    for run in runs:
        run.state.step, run.state.seconds = trainer.step, seconds / len(runs)
        save(run)  # for `evaluate` and `export`


def train_alone(run: Run, num_steps: int) -> None:
    """Trains the first steps of a run with its own learner, for comparison with stacked ones."""
    source = ResidentSource(run)
    run.learner.model.train()
    for step in range(num_steps):
        run.learner.step(source.batch(step))


def measure_throughput(runs: list[Run], num_steps: int) -> float:
    """Returns the images per second, over all runs, of their first steps: stacked, or those of a single run."""
    train = partial(train_alone, runs[0]) if len(runs) == 1 else partial(_train_first_steps, StackedTrainer(runs))
    train(2)
    _synchronize(runs[0])
    began = time.perf_counter()
    train(num_steps)
    _synchronize(runs[0])
    return num_steps * len(runs) * runs[0].recipe.global_batch_size / (time.perf_counter() - began)


def _train_first_steps(trainer: StackedTrainer, num_steps: int) -> None:
    trainer.train_steps(trainer.draw(0), num_steps=num_steps)


def _synchronize(run: Run) -> None:
    """Waits until the run's device has finished its work."""
    if run.world.device.type == "cuda":
        torch.cuda.synchronize(run.world.device)
