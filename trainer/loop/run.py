"""A run: the objects that its phases share, its training state, and restoring from a checkpoint."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from trainer.config import LogTo
from trainer.data import Dataset, Images
from trainer.data.order import num_steps_per_epoch
from trainer.errors import CheckpointError, DivergenceError
from trainer.evaluation.baseline import Baseline
from trainer.kernels.ahead import Compilation
from trainer.loop.learner import Learner
from trainer.loop.step import StepKind
from trainer.loop.stopping import BestEpoch
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.recipes import Recipe
from trainer.records.checkpoint import Checkpoints, weights_sha256
from trainer.records.run_folder import RunFolder
from trainer.sinks import Sinks, open_sinks


@dataclass(slots=True, kw_only=True)
class TrainState:
    """The progress of a run: all that a checkpoint holds besides weights and momenta.

    Args:
        step: steps done.
        seconds: time spent in training steps, in all sessions of the run; validation and saving are not counted.
        totals: float64 `[2]`, sums of losses and of correct answers since the epoch began, over all ranks.
        best: the best epoch so far, if the recipe has a use for it.
    """

    step: int = 0
    seconds: float = 0.0
    totals: torch.Tensor
    best: BestEpoch | None = None


@dataclass(slots=True, kw_only=True)
class Run:
    """The objects that the phases of a run share.

    Args:
        dataset: without its test images.
        train_indices: int64, the training images that are trained on.
        validation_images: the images that `validation_indices`, int64, point into; no indices with num_validation 0.
        kernels: those of its steps, which `compile_ahead` compiles in the background.
    """

    recipe: Recipe
    seed: int
    dataset: Dataset
    train_indices: torch.Tensor
    validation_images: Images
    validation_indices: torch.Tensor
    learner: Learner
    folder: RunFolder
    checkpoints: Checkpoints
    world: World
    progress: Progress
    state: TrainState
    kernels: Compilation | None = None

    @property
    def baseline(self) -> Baseline:
        """The constant predictor for the training images."""
        labels = self.dataset.train.labels[self.train_indices]
        is_balanced = self.recipe.balanced_sampling or self.recipe.class_weights == "balanced"
        return Baseline.of(labels, self.dataset.classes, self.recipe.label_smoothing, is_balanced=is_balanced)

    @property
    def has_validation(self) -> bool:
        """Whether there are validation images; if not, no validation accuracy is known anywhere."""
        return len(self.validation_indices) > 0

    @property
    def steps_per_epoch(self) -> int:
        return num_steps_per_epoch(len(self.train_indices), self.recipe.global_batch_size)

    @property
    def num_steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def num_epochs_done(self) -> int:
        return self.state.step // self.steps_per_epoch

    @property
    def is_trained(self) -> bool:
        """Whether the training is at its end: all steps are done, or the validation has not improved for too long."""
        best, patience = self.state.best, self.recipe.patience
        has_stalled = patience > 0 and best is not None and self.num_epochs_done - best.epoch >= patience
        return has_stalled or self.state.step >= self.num_steps

    def use_final_weights(self) -> None:
        """Gives the model the weights that the run is for, from its newest state; no step can follow.

        They are those of the best epoch, of the moving average, or the trained ones, as the recipe says.
        """
        best, learner = self.state.best, self.learner
        if self.is_trained and best is not None and best.weights is not None:
            learner.model.load_state_dict(best.weights)
        elif learner.average is not None:
            learner.model.load_state_dict(learner.average.model.state_dict())
        self.learner = replace(learner, average=None)

    def kind_of(self, step: int) -> StepKind:
        """Returns the kind of a step, which the recipe alone decides; it never enlarges images."""
        size = self.recipe.image_size(step, self.num_steps)
        has_bias = self.learner.train_step.whitening_bias is not None
        return StepKind(
            image_size=size if size is not None and size < self.dataset.train.shape[1] else None,
            trains_whitening_bias=not has_bias or self.recipe.trains_whitening_bias(step, self.num_steps),
        )

    @property
    def kinds(self) -> list[StepKind]:
        """The kinds of the run's steps, in the order in which they come."""
        return list(dict.fromkeys(map(self.kind_of, range(self.num_steps))))

    def lr_factors(self, epoch: int) -> torch.Tensor:
        """Returns the learning rate's factor at each step of an epoch, float32 on the device."""
        steps = range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)
        factors = [self.recipe.schedule.factor(step, self.num_steps) for step in steps]
        return torch.tensor(factors, dtype=torch.float32, device=self.world.device)

    def open_sinks(
        self, services: Sequence[LogTo] = (), metrics_address: str | None = None
    ) -> AbstractContextManager[Sinks]:
        """Returns the context of the sinks of the run's metrics; see `sinks.open_sinks`."""
        return open_sinks(
            self.folder,
            services,
            steps=(self.state.step, self.num_steps),
            is_main=self.world.is_main,
            log=self.progress.log,
            metrics_address=metrics_address,
        )

    def diverged(self, what: str) -> DivergenceError:
        """Returns the error for a run that diverged; it names the last good checkpoint."""
        kept = self.checkpoints.newest()
        where = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved yet"
        return DivergenceError(f"training diverged: {what}; {where}. A lower --lr-scale usually helps")


def restore(run: Run) -> bool:
    """Restores the run from the newest good checkpoint in its folder. All ranks call this.

    Returns:
        Whether there is one.

    Raises:
        CheckpointError: the checkpoint is of another network than this version of Convoy builds for the recipe.
    """
    checkpoint = run.world.broadcast_object(run.checkpoints.load_newest() if run.world.is_main else None)
    if checkpoint is None:
        return False
    saved, built = (_shapes(weights) for weights in (checkpoint["model"], run.learner.model.state_dict()))
    if saved != built:
        example = min(name for name, _ in saved ^ built)
        raise CheckpointError(
            f"the checkpoints in {run.folder.path} are of another network than {run.recipe.network} is now (see "
            f"{example}): another version of Convoy saved them; use that version, or train anew in another folder"
        )
    run.learner.load_state_dict(checkpoint)
    run.state.step, run.state.seconds = checkpoint["step"], checkpoint["seconds"]
    run.state.totals.copy_(checkpoint["totals"])
    if "best" in checkpoint:
        run.state.best = BestEpoch.from_state_dict(checkpoint["best"])
    return True


def restore_final_weights(run: Run) -> bool:
    """Restores the weights that the run is for, from its newest good checkpoint. All ranks call this.

    Returns:
        Whether there is a checkpoint.

    Raises:
        CheckpointError: the checkpoint with the run's final weights is damaged or gone.
    """
    result = run.folder.result()
    if not restore(run):
        if result is None:
            return False
        raise CheckpointError(
            f"{run.folder.path} is complete, but has no good checkpoint any more: restore one, or train anew in "
            "another folder"
        )
    run.use_final_weights()
    if result is not None and result.weights_sha256 != weights_sha256(run.learner.model):
        raise CheckpointError(
            f"{run.folder.path} ended with other weights than those of step {run.state.step}: its last checkpoint is "
            "damaged or gone; restore it, or train anew in another folder"
        )
    return True


def _shapes(weights: dict[str, torch.Tensor]) -> set[tuple[str, torch.Size]]:
    return {(name, weight.shape) for name, weight in weights.items()}
