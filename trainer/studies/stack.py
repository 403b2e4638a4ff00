"""Many seeds of one recipe trained at once, as one network whose weights have a dimension more.

torch.func's vmap turns the members' convolutions into one grouped convolution and their matrix products into one
batched product. Each member keeps its own initial weights, order of samples and augmentation, so that it equals its
lone run up to rounding (float32: about 1e-6 after some steps). One launch serves all, which pays where launches, not
arithmetic, take the time.
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
from trainer.loop.fit import Run, Samples, save
from trainer.loop.learner import parameter_kind
from trainer.loop.optim import Optimizer
from trainer.loop.step import Batch
from trainer.models.layers import dropout_layers, use_dropout_seeds
from trainer.recipes import ParameterKind, ParamGroup, Recipe
from trainer.records.checkpoint import Checkpoints


def can_stack(recipe: Recipe) -> bool:
    """Whether members would equal their lone runs: Muon's update is not element by element."""
    return not any(group.muon for group in recipe.param_groups.values())


class Stack:
    """Members of one recipe on one data set, in lockstep.

    Args:
        runs: the members' runs, fresh, which differ in their seed alone; their learners' steps are not used, but their
            models receive the weights in `copy_to_runs`.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        first = runs[0]
        self._recipe, self._data, self._device = first.recipe, first.learner.data, first.world.device
        networks = [run.learner.model.network for run in runs]
        self._parameters, self._buffers = stack_module_state(networks)
        self._template = copy.deepcopy(networks[0]).to("meta")
        self._dropouts = dropout_layers(self._template)
        self._optimizer = Optimizer(self._groups(networks[0]))
        self.step = 0

    def train_epoch(self, epoch: int) -> None:
        """Train an epoch.

        Raises:
            DivergenceError: a member's loss is not finite.
        """
        losses = self.train_steps(self.draw(epoch), num_steps=self.runs[0].steps_per_epoch)
        if not bool(losses.isfinite().all()):
            seed = self.runs[int((~losses.isfinite()).nonzero()[0])].seed
            raise DivergenceError(f"training diverged in epoch {epoch + 1}: the loss of seed {seed} is not finite")

    def draw(self, epoch: int) -> Samples:
        """The members' samples of an epoch, with one dimension more in front: `[S, N]`."""
        drawn = [Samples.draw(run, epoch) for run in self.runs]
        return Samples(
            indices=torch.stack([samples.indices for samples in drawn]),
            augment_params=torch.stack([samples.augment_params for samples in drawn]),
            dropout_seeds=torch.stack([samples.dropout_seeds for samples in drawn]),
        )

    def train_steps(self, samples: Samples, *, num_steps: int) -> torch.Tensor:
        """The first steps of an epoch that was drawn; the members' sums of mean losses, float32 `[S]`."""
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
        """Copy each member's weights into its own run's model."""
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
        for mine, saved in ((self._parameters, state["parameters"]), (self._buffers, state["buffers"])):
            for name, tensor in mine.items():
                tensor.copy_(saved[name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _groups(self, network: nn.Module) -> list[tuple[ParamGroup, list[nn.Parameter]]]:
        groups: dict[ParameterKind, list[nn.Parameter]] = {kind: [] for kind in self._recipe.param_groups}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                groups[parameter_kind(name, parameter)].append(self._parameters[name])
        return [(self._recipe.param_groups[kind], parameters) for kind, parameters in groups.items()]

    def _train_step(self, samples: Samples, part: slice, lr_factor: torch.Tensor) -> torch.Tensor:
        """One step of all members, on that part of their epochs; their losses, float32 `[S]`."""
        indices, seeds = samples.indices[:, part], samples.dropout_seeds[:, part]
        num_members, size = indices.shape
        learner = self.runs[0].learner
        pixels = torch.cat(
            [
                augment_batch(self._recipe.augment, self._data.images, chosen, drawn)
                for chosen, drawn in zip(indices, samples.augment_params[:, part], strict=True)
            ]
        )
        labels = self._data.labels[indices.flatten()]
        with learner.autocast():
            images = learner.model.normalize(pixels)
            logits = vmap(self._answer)(
                self._parameters, self._buffers, images.unflatten(0, (num_members, size)), seeds
            )
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), labels, label_smoothing=self._recipe.label_smoothing, reduction="none"
        )
        (losses.sum() / size).backward()
        self._optimizer.step(lr_factor)
        self._optimizer.zero_grad()
        return losses.detach().view(num_members, size).mean(dim=1)

    def _answer(
        self,
        parameters: dict[str, torch.Tensor],
        buffers: dict[str, torch.Tensor],
        images: torch.Tensor,
        seeds: torch.Tensor,
    ) -> torch.Tensor:
        with use_dropout_seeds(self._dropouts, seeds):
            logits: torch.Tensor = functional_call(self._template, (parameters, buffers), (images,))
        return logits


def train_stack(runs: list[Run], checkpoints: Checkpoints) -> None:
    """Train the members to their end, saved after each epoch; give them their weights and their share of the time.

    Raises:
        DivergenceError: a member's loss is not finite.
    """
    stack, seconds = Stack(runs), 0.0
    state = checkpoints.load_newest()
    if state is not None:
        stack.load_state_dict(state)
        seconds = state["seconds"]
    seeds = f"seeds {runs[0].seed} to {runs[-1].seed} together"
    for epoch in range(stack.step // runs[0].steps_per_epoch, runs[0].recipe.epochs):
        began = time.perf_counter()
        stack.train_epoch(epoch)
        _wait(runs[0])
        seconds += time.perf_counter() - began
        checkpoints.save(stack.step, {**stack.state_dict(), "seconds": seconds})
        print(f"{seeds}, epoch {epoch + 1}/{runs[0].recipe.epochs}: {seconds:.1f} s", flush=True)
    stack.copy_to_runs()
    for run in runs:
        run.position.step, run.position.seconds = stack.step, seconds / len(runs)
        save(run)  # for `evaluate` and `export`


def lone_steps(run: Run, num_steps: int) -> None:
    """A run's first steps, by its own learner: what a member of a stack must equal, and is measured against."""
    size = run.recipe.global_batch_size
    samples, lr_factors = Samples.draw(run, 0), run.lr_factors(0)
    run.learner.model.train()
    for step in range(num_steps):
        part = slice(step * size, (step + 1) * size)
        indices = samples.indices[part]
        run.learner.step(
            Batch(
                indices=indices,
                augment_params=samples.augment_params[part],
                dropout_seeds=samples.dropout_seeds[part],
                lr_factor=lr_factors[step],
                sizes=(len(indices),),
                num_images=len(indices),
            )
        )


def measure_rate(runs: list[Run], num_steps: int) -> float:
    """Images a second, over all members, of the first steps: stacked, or of a single run by its own learner."""
    work = partial(lone_steps, runs[0]) if len(runs) == 1 else partial(_first_steps, Stack(runs))
    work(2)
    _wait(runs[0])
    began = time.perf_counter()
    work(num_steps)
    _wait(runs[0])
    return num_steps * len(runs) * runs[0].recipe.global_batch_size / (time.perf_counter() - began)


def _first_steps(stack: Stack, num_steps: int) -> None:
    stack.train_steps(stack.draw(0), num_steps=num_steps)


def _wait(run: Run) -> None:
    """Until the device has done what is queued on it."""
    if run.world.device.type == "cuda":
        torch.cuda.synchronize(run.world.device)
