"""The training loop: steps, validation, checkpoints, and the ways to leave early."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from trainer.data import Dataset, ImageSet
from trainer.data.augment import draw_params
from trainer.data.order import dropout_seeds, epoch_order, num_steps_per_epoch
from trainer.errors import CheckpointError, DivergenceError
from trainer.evaluation.evaluate import CHUNK_SIZE, evaluate
from trainer.loop.learner import Learner
from trainer.loop.shards import share_of
from trainer.loop.step import Batch
from trainer.progress import Progress
from trainer.ranks.consistency import check_weights, digest_of
from trainer.ranks.watchdog import HANG_AFTER_S, PATIENT_S
from trainer.ranks.world import StopConsensus, World
from trainer.recipes import Recipe
from trainer.records.checkpoint import Checkpoints, CheckpointWriter
from trainer.records.metrics import MetricsLog
from trainer.records.run_folder import RunFolder
from trainer.signals import StopRequest

LOG_EVERY_STEPS = 50
FIRST_SAVE_S = 2.0
"""When the first checkpoint of a sitting is saved; the next ones follow after twice, four times as long, …"""
EVALUATE_S = 60.0
"""How long ranks wait for each other in a validation, at least."""


@dataclass(slots=True, kw_only=True)
class Position:
    """Where a run stands: all that a checkpoint holds besides weights and momenta.

    Args:
        step: steps done.
        seconds: spent in training steps so far, over all sittings; validation and saving not counted.
        totals: float64 `[2]`, sums of losses and of correct answers since the epoch began, over all ranks.
    """

    step: int = 0
    seconds: float = 0.0
    totals: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveEvery:
    """How often a checkpoint is saved: after so many seconds, and after so many steps if that is not None."""

    seconds: float = 20.0
    steps: int | None = None

    def is_due(self, step: int, since_s: float, num_saved: int) -> bool:
        """Whether to save after `step`, `since_s` after the last of `num_saved` saves of this sitting."""
        if self.steps is not None and step % self.steps == 0:
            return True
        return since_s >= min(self.seconds, FIRST_SAVE_S * float(2**num_saved))


@dataclass(slots=True, kw_only=True)
class Run:
    """What the phases of a run share.

    Args:
        train_indices: int64, which of the data set's training images are trained on.
        validation_indices: int64, which of `validation_images` are validated on.
    """

    recipe: Recipe
    seed: int
    dataset: Dataset
    train_indices: torch.Tensor
    validation_images: ImageSet
    validation_indices: torch.Tensor
    learner: Learner
    folder: RunFolder
    checkpoints: Checkpoints
    world: World
    progress: Progress
    position: Position

    @property
    def steps_per_epoch(self) -> int:
        return num_steps_per_epoch(len(self.train_indices), self.recipe.global_batch_size)

    @property
    def num_steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    def lr_factors(self, epoch: int) -> torch.Tensor:
        """The learning rate's factor at each step of an epoch, float32 on the device."""
        steps = range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)
        factors = [self.recipe.schedule.factor(step, self.num_steps) for step in steps]
        return torch.tensor(factors, dtype=torch.float32, device=self.world.device)


def restore(run: Run) -> bool:
    """Go on from the newest good checkpoint in the run folder. Returns whether there is one.

    Raises:
        CheckpointError: it is of another network, as another version of Convoy builds for this recipe.
    """
    state = run.world.broadcast_object(run.checkpoints.load_newest() if run.world.is_main else None)
    if state is None:
        return False
    saved, built = (_shapes(weights) for weights in (state["model"], run.learner.model.state_dict()))
    if saved != built:
        example = min(name for name, _ in saved ^ built)
        raise CheckpointError(
            f"the checkpoints in {run.folder.path} are of another network than {run.recipe.network} is now (see "
            f"{example}): another version of Convoy has made them; take that one, or train anew in another folder"
        )
    run.learner.load_state_dict(state)
    run.position.step, run.position.seconds = state["step"], state["seconds"]
    run.position.totals.copy_(state["totals"])
    run.progress.say(f"at step {run.position.step} of {run.num_steps}, saved in {run.folder.path}")
    return True


def _shapes(weights: dict[str, torch.Tensor]) -> set[tuple[str, torch.Size]]:
    return {(name, weight.shape) for name, weight in weights.items()}


def fit(run: Run, stop: StopRequest, save_every: SaveEvery = SaveEvery()) -> None:
    """Train to the last step. The final weights are saved.

    Raises:
        DivergenceError: a loss is not finite; nothing is saved after the last good checkpoint.
        DesyncError: the ranks' weights are not the same.
        CheckpointError: the run folder cannot be written, or the final weights not be saved.
        Interrupted: a signal came; the state is saved, unless a second one came that would not wait for that.
    """
    loop = _Loop(run, stop, save_every)
    run.progress.start(step=run.position.step, num_steps=run.num_steps)
    with stop.deferred():
        try:
            while run.position.step < run.num_steps:
                with run.world.watchdog.computing():
                    loop.run_epoch()
                loop.end_epoch()
                loop.save_or_leave()
            loop.save_and_wait()
        finally:
            run.world.watchdog.patience = PATIENT_S
            run.progress.stop()
            run.learner.release()
            loop.close()


def save(run: Run) -> None:
    """Checkpoint the run, on the main rank, and wait until it is done; a step that has been saved stays as it is."""
    if run.world.is_main and run.checkpoints.newest_good_step != run.position.step:
        run.checkpoints.save(run.position.step, _state(run))


def _state(run: Run) -> dict[str, Any]:
    """All that a checkpoint holds, not copied."""
    if not all(bool(tensor.isfinite().all()) for tensor in run.learner.model.state_dict().values()):
        raise DivergenceError(_diverged("the weights are not finite", run))
    position = run.position
    seen = {"step": position.step, "seconds": position.seconds, "totals": position.totals}
    return {**seen, **run.learner.state_dict()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """An epoch's samples in its order, on the device: what belongs to a batch is a slice.

    Args:
        indices: int64 `[N]`, into the training images.
        augment_params: float32 `[N, 6]`, their rows of `draw_params`.
        dropout_seeds: int64 `[N]`, theirs of `dropout_seeds`.
    """

    indices: torch.Tensor
    augment_params: torch.Tensor
    dropout_seeds: torch.Tensor

    @classmethod
    def draw(cls, run: Run, epoch: int) -> "Samples":
        """Those of an epoch: which comes when, and all that is random about it."""
        num_images, device = len(run.dataset.train.labels), run.world.device
        indices = run.train_indices[epoch_order(len(run.train_indices), run.seed, epoch)]
        return cls(
            indices=indices.to(device),
            augment_params=draw_params(run.recipe.augment, num_images, run.seed, epoch)[indices].to(device),
            dropout_seeds=dropout_seeds(num_images, run.seed, epoch)[indices].to(device),
        )


class _Stopwatch:
    """Seconds of training, work queued on a GPU included; stands still in validation and saving."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self._seconds = seconds
        self._device = device
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def read(self) -> float:
        """Seconds so far, over all sittings."""
        return self._seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def stop(self) -> float:
        """Wait for the device, then stand still; seconds so far."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds, self._since = self.read(), None
        return self._seconds


class _Loop:
    """One sitting of a run: what the loop must remember between steps but no checkpoint needs."""

    def __init__(self, run: Run, stop: StopRequest, save_every: SaveEvery = SaveEvery()) -> None:
        self._run = run
        self._stop = stop
        self._save_every = save_every
        self._writer = CheckpointWriter(run.checkpoints)
        self._num_saved = 0
        self._stop_consensus = StopConsensus(run.world)
        self._log = (
            MetricsLog(run.folder.path, from_step=run.position.step, say=run.progress.say)
            if run.world.is_main
            else None
        )
        self._saved_at: float | None = None
        self._longest_step_s = 0.0  # of the recent ones: a step counts a tenth less with each one that follows
        self._stopwatch = _Stopwatch(run.position.seconds, run.world.device)
        self._lr_factors = run.lr_factors(run.position.step // run.steps_per_epoch)
        # The results since the last log line stay on the device, so that a GPU need not be waited for at each step.
        self._window = torch.zeros(LOG_EVERY_STEPS, 2, device=run.world.device)
        self._window_images = 0
        self._window_began = self._stopwatch.read()

    def close(self) -> None:
        self._writer.close()
        if self._log is not None:
            self._log.close()

    def save_and_wait(self) -> None:
        """Checkpoint the run after any save that has begun. The main rank writes."""
        self._finish_save()
        save(self._run)

    def run_epoch(self) -> None:
        """The rest of the current epoch's steps."""
        run, batch_size = self._run, self._run.recipe.global_batch_size
        epoch, first = divmod(run.position.step, run.steps_per_epoch)
        samples = Samples.draw(run, epoch)
        self._lr_factors = run.lr_factors(epoch)
        run.learner.model.train()
        self._check_weights()
        self._saved_at = self._saved_at or time.monotonic()
        self._stopwatch.start()
        stepped_at = time.monotonic()
        for start in range(first * batch_size, len(samples.indices), batch_size):
            batch = self._share(samples, start)
            result = run.learner.step(batch)
            run.position.totals += result
            self._window[run.position.step % LOG_EVERY_STEPS] = result
            self._window_images += batch.num_images
            run.position.step += 1
            run.world.failure_context.step = run.position.step
            stepped_at, seconds = time.monotonic(), time.monotonic() - stepped_at
            self._longest_step_s = max(seconds, 0.9 * self._longest_step_s)
            self._be_patient(max(HANG_AFTER_S, 3 * self._longest_step_s))
            if run.world.device.type == "cpu" and not math.isfinite(result[0]):
                self._check_finite()
            self._tell(epoch)
            if run.position.step % run.steps_per_epoch:  # else the epoch's end belongs to what is saved
                self.save_or_leave()
        run.position.seconds = self._stopwatch.stop()

    def end_epoch(self) -> None:
        """Validate, write the epoch's line, begin the next one's sums."""
        run = self._run
        epoch = run.position.step // run.steps_per_epoch
        self._check_finite()
        loss, correct = (run.position.totals / len(run.train_indices)).tolist()
        # Some rank has a chunk of images more than another, and a chunk takes at most what it takes to train on it.
        share = run.recipe.global_batch_size / run.world.num_computing
        self._be_patient(max(EVALUATE_S, 3 * self._longest_step_s * CHUNK_SIZE / share))
        seen = evaluate(run.learner.predict_one_view, run.validation_images, run.validation_indices, run.world)
        if not math.isfinite(seen.loss):  # the last step's loss was the last that its weights had no part in
            raise DivergenceError(_diverged(f"the validation loss is {seen.loss} after epoch {epoch}", run))
        if self._log is not None:
            self._log.write(
                "epoch",
                step=run.position.step,
                epoch=epoch,
                train_loss=loss,
                train_accuracy=correct,
                val_loss=seen.loss,
                val_accuracy=seen.accuracy,
                seconds=run.position.seconds,
            )
        run.progress.say(
            f"epoch {epoch}/{run.recipe.epochs}: train loss {loss:.4f}, accuracy {100 * correct:.2f} %; "
            f"validation loss {seen.loss:.4f}, accuracy {100 * seen.accuracy:.2f} %; {run.position.seconds:.1f} s"
        )
        run.position.totals.zero_()
        self._be_patient(max(HANG_AFTER_S, 3 * self._longest_step_s))

    def _be_patient(self, seconds: float) -> None:
        """How long other ranks, and a signal, may wait for this one, and it for them."""
        self._run.world.watchdog.patience = self._stop.patience_s = seconds

    def _share(self, samples: "Samples", start: int) -> Batch:
        """This rank's share of the global batch that begins there in the epoch's order."""
        run, world = self._run, self._run.world
        num_images = min(run.recipe.global_batch_size, len(samples.indices) - start)
        share = share_of(num_images, world.rank, world.num_computing, world.num_shards)
        part = slice(start + share.part.start, start + share.part.stop)
        return Batch(
            indices=samples.indices[part],
            augment_params=samples.augment_params[part],
            dropout_seeds=samples.dropout_seeds[part],
            lr_factor=self._lr_factors[run.position.step % run.steps_per_epoch],
            sizes=share.sizes,
            num_images=num_images,
        )

    def _tell(self, epoch: int) -> None:
        """Log and show where the run is, if it is time to."""
        run = self._run
        if run.position.step % LOG_EVERY_STEPS == 0:
            self._check_weights()
            with run.world.watchdog.patient():
                self._write_window(epoch)
        if run.progress.is_due():
            with run.world.watchdog.patient():
                self._show(epoch)

    def save_or_leave(self) -> None:
        """Between two steps: begin a save if it is time for one, and end the run if some rank has been asked to."""
        run = self._run
        if run.world.is_main:
            self._save_if_due()
        if self._stop_consensus.poll(self._stop.number is not None):
            run.position.seconds = self._stopwatch.stop()
            self._leave()

    def _save_if_due(self) -> None:
        """Begin a save if it is time for one, and tell how the last one went; never wait for it."""
        run = self._run
        if self._writer.is_busy:
            return
        self._finish_save()
        since_s = time.monotonic() - (self._saved_at or 0.0)
        if self._save_every.is_due(run.position.step, since_s, self._num_saved):
            run.position.seconds = self._stopwatch.read()
            self._writer.begin(run.position.step, _state(run))
            self._saved_at, self._num_saved = time.monotonic(), self._num_saved + 1

    def _finish_save(self) -> None:
        try:
            self._writer.finish()
        except CheckpointError as error:
            self._run.progress.say(f"warning: {error}; the training goes on, and the next save tries again")

    def _check_weights(self) -> None:
        """Compare the ranks' weights, which one bad chip is enough to change."""
        world = self._run.world
        if world.size > 1:
            digest = digest_of(list(self._run.learner.model.state_dict().values())).cpu()
            digests = [tuple(theirs.tolist()) for theirs in world.all_gather(digest)]
            check_weights(digests, self._run.position.step)

    def _check_finite(self) -> None:
        if bool(self._window.isfinite().all()):
            return
        position = self._run.position.step - 1
        first = position - position % LOG_EVERY_STEPS
        bad = next(i for i, loss in enumerate(self._window[:, 0].tolist()) if not math.isfinite(loss))
        raise DivergenceError(
            _diverged(f"the loss is {self._window[bad, 0].item()} at step {first + bad + 1}", self._run)
        )

    def _write_window(self, epoch: int) -> None:
        run = self._run
        self._check_finite()
        loss, correct = (self._window.double().sum(dim=0) / self._window_images).tolist()
        now = self._stopwatch.read()
        if self._log is not None:
            self._log.write(
                "step",
                step=run.position.step,
                epoch=epoch + 1,
                loss=loss,
                accuracy=correct,
                lr_factor=self._lr_factors[(run.position.step - 1) % run.steps_per_epoch].item(),
                images_per_second=self._window_images / (now - self._window_began),
            )
        self._window.zero_()
        self._window_images, self._window_began = 0, now

    def _show(self, epoch: int) -> None:
        """Where the run is in the current epoch."""
        run = self._run
        steps_in_epoch = run.position.step - epoch * run.steps_per_epoch
        loss, correct = run.position.totals.tolist()
        num_images = min(steps_in_epoch * run.recipe.global_batch_size, len(run.train_indices))
        run.progress.update(
            step=run.position.step,
            num_steps=run.num_steps,
            epoch=f"{epoch + 1}/{run.recipe.epochs}",
            loss=loss / num_images,
            accuracy=correct / num_images,
            rate=run.position.step * run.recipe.global_batch_size / self._stopwatch.read(),
        )

    def _leave(self) -> None:
        """Save, tell the user how to go on, and end the run."""
        run = self._run
        with run.world.watchdog.patient():
            self._stop.grant()
            self._stop_consensus.close()
            self.save_and_wait()
            run.world.barrier()
            number = run.world.all_reduce_max(self._stop.number or 0)
        raise self._stop.interrupted(
            f"saved at step {run.position.step} of {run.num_steps}; "
            f"go on with the same command and --run-dir {run.folder.path}",
            number,
        )


def _diverged(what: str, run: Run) -> str:
    kept = run.checkpoints.newest()
    where = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved yet"
    return f"training diverged: {what}; {where}. A lower --lr-scale usually helps"
