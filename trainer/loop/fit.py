"""The training loop: steps, validation, log lines, checkpoints, and the ends of a run: done, diverged, interrupted."""

import itertools
import math
import time
from contextlib import nullcontext

import torch

from trainer.errors import ConfigError, DivergenceError, Interrupted, TrainerError
from trainer.evaluation.baseline import TrainingWarning
from trainer.evaluation.evaluate import Evaluation, chunk_size, evaluate
from trainer.loop.look_ahead import LookAhead
from trainer.loop.memory import out_of_memory
from trainer.loop.rehearsal import await_kernels
from trainer.loop.run import Run
from trainer.loop.saving import BackgroundSaver, SaveInterval
from trainer.loop.shown_mistakes import mistakes_in_validation
from trainer.loop.sources import open_source
from trainer.loop.step import Batch
from trainer.loop.step_results import LOG_EVERY_STEPS, StepResults
from trainer.loop.stopping import BestEpoch, score_of
from trainer.loop.stopwatch import Stopwatch
from trainer.paths import FAILURE_FILE
from trainer.ranks.activity import SLOW_PHASE_TIMEOUT_S
from trainer.ranks.consistency import check_weights, digest_of
from trainer.ranks.stop import StopConsensus
from trainer.records.checkpoint import copy_to_cpu
from trainer.records.mistakes import NUM_KEPT, is_kept
from trainer.signals import StopRequest
from trainer.sinks import Sinks
from trainer.user_code import describe_if_in, is_reference

VALIDATION_TIMEOUT_S = 60.0
"""Least time that ranks wait for each other in a validation."""


def fit(run: Run, stop: StopRequest, save_every: SaveInterval | None = None, sinks: Sinks | None = None) -> None:
    """Trains to the end, saves the last state, and gives the model its final weights. All ranks call this.

    Args:
        sinks: of the run's metrics; None for those in the run folder alone.

    Raises:
        ConfigError: a step does not fit in the GPU's memory, or the user's own network fails.
        DivergenceError: a loss is not finite; nothing is saved after the last good checkpoint.
        DesyncError: the ranks' weights differ.
        CheckpointError: the run folder cannot be written, or the final weights cannot be saved.
        Interrupted: a signal came. The state is saved, unless a second signal asked to leave at once.
    """
    with run.open_sinks() if sinks is None else nullcontext(sinks) as open_sinks:
        loop = TrainingLoop(run, stop, save_every or SaveInterval(), open_sinks)
        run.progress.start(step=run.state.step, num_steps=run.num_steps)
        with stop.deferred():
            try:
                await_kernels(run)
                while not run.is_trained:
                    with run.world.activity.computing():
                        loop.train_epoch()
                    loop.end_epoch()
                    loop.save_or_stop()
                loop.save_and_wait()
            except torch.OutOfMemoryError as error:
                raise out_of_memory(run, error) from error
            except Exception as error:
                if (of_user := _error_in_user_code(run, error)) is not None:
                    raise of_user from error
                raise
            finally:
                run.world.activity.timeout_s = SLOW_PHASE_TIMEOUT_S
                run.progress.stop()
                run.learner.release()
                loop.close()
    if run.recipe.keep_best and run.state.best is not None:
        run.progress.log(f"the trained model has the weights of epoch {run.state.best.epoch} of {run.num_epochs_done}")
    run.use_final_weights()


def _error_in_user_code(run: Run, error: Exception) -> ConfigError | None:
    """Returns the error in one line if it arose in the user's own network; a failure report has the whole stack."""
    if isinstance(error, TrainerError) or not is_reference(run.recipe.network):
        return None
    text, folder = describe_if_in(run.recipe.network, error), run.world.failure_context.folder
    if text is None:
        return None
    return ConfigError(f"{text}; the whole stack is in {folder / FAILURE_FILE}" if folder is not None else text)


class TrainingLoop:
    """One session of a run: the state between steps that no checkpoint holds."""

    def __init__(self, run: Run, stop: StopRequest, save_every: SaveInterval, sinks: Sinks) -> None:
        self._run = run
        self._stop = stop
        self._source = open_source(run)
        self._saver = BackgroundSaver(run, save_every, self._check_finite)
        self._stop_consensus = StopConsensus(run.world)
        self._stopwatch = Stopwatch(run.state.seconds, run.world.device)
        self._results = StepResults(run.world.device, run.state.seconds)
        self._lr_factor = torch.zeros(())  # of the last step
        self._look_ahead = LookAhead(run.world.device)
        self._longest_step_s = 0.0  # of the recent steps: a step counts a tenth less with each one after it
        self._baseline = run.baseline
        self._warned_of: set[str] = set()
        self._sinks = sinks

    def close(self) -> None:
        self._source.close()
        self._saver.close()

    def save_and_wait(self) -> None:
        self._check_finite()
        self._saver.save_and_wait()

    def train_epoch(self) -> None:
        """Trains the steps that the current epoch still has."""
        run = self._run
        epoch = run.state.step // run.steps_per_epoch
        first = self._source.batch(run.state.step)  # before the clock starts: the epoch's samples are drawn
        run.learner.model.train()
        self._check_weights()
        self._saver.start_clock()
        self._stopwatch.start()
        step_ended_at = time.monotonic()
        others = map(self._source.batch, range(run.state.step + 1, (epoch + 1) * run.steps_per_epoch))
        for batch in itertools.chain([first], others):
            self._train_step(batch)
            step_ended_at, step_s = time.monotonic(), time.monotonic() - step_ended_at
            self._longest_step_s = max(step_s, 0.9 * self._longest_step_s)
            self._set_step_timeout()
            self._log_if_due(epoch)
            if run.state.step % run.steps_per_epoch:  # a checkpoint at the epoch's end follows its validation
                self.save_or_stop()
        self._stop_clock()

    def _train_step(self, batch: Batch) -> None:
        run, self._lr_factor = self._run, batch.lr_factor
        result = run.learner.step(batch)
        run.state.totals += result
        self._results.add(run.state.step, result, batch.num_images)
        self._look_ahead.wait()
        run.state.step += 1
        run.world.failure_context.step = run.state.step
        if not self._look_ahead.num_steps and not math.isfinite(result[0]):  # else to read the loss would wait for it
            self._check_finite()

    def end_epoch(self) -> None:
        """Validates, writes the epoch's line, and begins the sums of the next epoch."""
        run = self._run
        epoch = run.state.step // run.steps_per_epoch
        self._check_finite()
        loss, accuracy = (run.state.totals / len(run.train_indices)).tolist()
        # A rank may have a chunk of images more than another; to classify a chunk takes no longer than to train on it.
        share = run.recipe.global_batch_size / run.world.num_computing
        chunk = chunk_size(run.validation_images.shape)
        self._set_timeout(max(VALIDATION_TIMEOUT_S, 3 * self._longest_step_s * chunk / share))
        validation = self._validate(epoch) if run.has_validation else None
        figures = {} if validation is None else {"val_loss": validation.loss, "val_accuracy": validation.accuracy}
        self._sinks.write(
            "epoch",
            step=run.state.step,
            epoch=epoch,
            train_loss=loss,
            train_accuracy=accuracy,
            **figures,
            seconds=run.state.seconds,
        )
        shown = (
            "no validation"
            if validation is None
            else f"validation loss {validation.loss:.4f}, accuracy {100 * validation.accuracy:.2f} %"
        )
        run.progress.log(
            f"epoch {epoch}/{run.recipe.epochs}: train loss {loss:.4f}, accuracy {100 * accuracy:.2f} %; {shown}; "
            f"{run.state.seconds:.1f} s"
        )
        if validation is not None:
            self._keep_mistakes(epoch, validation)
            self._find_best(epoch, validation)
            if epoch > 1 or run.recipe.epochs == 1:
                self._warn(epoch, self._baseline.check(loss, validation))
        run.state.totals.zero_()
        self._set_step_timeout()

    def _validate(self, epoch: int) -> Evaluation:
        run = self._run
        try:
            return evaluate(run.learner.predict, run.validation_images, run.validation_indices, run.world)
        except DivergenceError as error:  # the last step's loss was that of the weights before it
            raise run.diverged(f"after epoch {epoch}, {error}") from error

    def _keep_mistakes(self, epoch: int, validation: Evaluation) -> None:
        run = self._run
        if run.world.is_main and is_kept(epoch, run.recipe.epochs):
            self._sinks.keep_mistakes(mistakes_in_validation(run, validation, NUM_KEPT), epoch=epoch)

    def _find_best(self, epoch: int, validation: Evaluation) -> None:
        """Remembers the epoch if its validation is the best so far, and tells the user if the training ends early."""
        run, recipe = self._run, self._run.recipe
        if not recipe.patience and not recipe.keep_best:
            return
        score, best = score_of(validation, recipe.best_by, run.dataset.classes), run.state.best
        # Rank 0 decides for all: another kind of processor may round the mean loss in another way.
        if run.world.broadcast_object(best is None or score < best.score):
            weights = copy_to_cpu(run.learner.evaluated_model.state_dict()) if recipe.keep_best else None
            best = run.state.best = BestEpoch(epoch=epoch, score=score, weights=weights)
        if run.is_trained and epoch < recipe.epochs and best is not None:
            run.progress.log(
                f"the validation {recipe.best_by} was best after epoch {best.epoch}: the training ends early, after "
                f"epoch {epoch} of {recipe.epochs}"
            )

    def _warn(self, epoch: int, warnings: list[TrainingWarning]) -> None:
        """Warns once of each kind if the network learns nothing useful; the last epoch tells if that has changed.

        A loss near the threshold may cross it several times.
        """
        for warning in warnings:
            if warning.kind not in self._warned_of:
                self._warned_of.add(warning.kind)
                self._run.progress.log(f"warning: epoch {epoch}: {warning.text}")
        if self._warned_of and not warnings and self._run.is_trained:
            self._run.progress.log(f"epoch {epoch}: the earlier warning about this training no longer holds")

    def save_or_stop(self) -> None:
        """Between two steps: begins a checkpoint if one is due, and ends the run if any rank was asked to stop."""
        self._run.state.seconds = self._stopwatch.read()
        self._saver.save_if_due()
        if self._stop_consensus.poll(self._stop.signal_number is not None):
            self._stop_clock()
            raise self._save_and_interrupt()

    def _stop_clock(self) -> None:
        """Stops the clock when the last step is computed. All ranks call this."""
        with self._run.world.activity.collective():  # a GPU waits here for the other ranks' part of the queued steps
            self._run.state.seconds = self._stopwatch.stop()

    def _save_and_interrupt(self) -> Interrupted:
        """Saves, and returns the exception that ends the run on every rank and tells the user how to continue."""
        run = self._run
        with run.world.activity.slow_phase():
            self._stop.acknowledge()
            self._stop_consensus.close()
            self.save_and_wait()
            run.world.barrier()
            number = run.world.all_reduce_max(self._stop.signal_number or 0)
        return self._stop.interruption(
            f"saved at step {run.state.step} of {run.num_steps}; "
            f"continue with the same command and --run-dir {run.folder.path}",
            number,
        )

    def _set_step_timeout(self) -> None:
        """Sets the timeouts for steps, once their time is known. A rank that saves first waits for its queued steps."""
        if self._look_ahead.is_reached:
            self._set_timeout((3 + 2 * self._look_ahead.num_steps) * self._longest_step_s)

    def _set_timeout(self, seconds: float) -> None:
        """Sets the hang timeout and the grace period after a signal; both have a minimum of their own."""
        self._run.world.activity.timeout_s = self._stop.grace_period_s = seconds

    def _check_weights(self) -> None:
        """Compares the ranks' weights: one faulty chip is enough to change them."""
        world = self._run.world
        if world.size > 1:
            digest = digest_of(list(self._run.learner.model.state_dict().values()))
            with world.activity.collective():  # a GPU waits here for the other ranks' part of the queued steps
                digest = digest.cpu()
            digests = [tuple(theirs.tolist()) for theirs in world.all_gather(digest)]
            check_weights(digests, self._run.state.step)

    def _check_finite(self) -> None:
        bad = self._results.find_not_finite(self._run.state.step - 1)
        if bad is not None:
            step, loss = bad
            raise self._run.diverged(f"the loss is {loss} at step {step}")

    def _log_if_due(self, epoch: int) -> None:
        run = self._run
        if run.state.step % LOG_EVERY_STEPS == 0:
            self._check_weights()
            with run.world.activity.slow_phase():
                self._write_step_line(epoch)
        if run.progress.is_due():
            with run.world.activity.slow_phase():
                self._show_progress(epoch)

    def _write_step_line(self, epoch: int) -> None:
        run = self._run
        self._check_finite()
        now = self._stopwatch.read()
        loss, accuracy, images_per_second = self._results.means(now)
        self._sinks.write(
            "step",
            step=run.state.step,
            epoch=epoch + 1,
            loss=loss,
            accuracy=accuracy,
            lr_factor=self._lr_factor.item(),
            images_per_second=images_per_second,
        )
        self._results.clear(now)

    def _show_progress(self, epoch: int) -> None:
        run = self._run
        steps_in_epoch = run.state.step - epoch * run.steps_per_epoch
        loss, correct = run.state.totals.tolist()
        num_images = min(steps_in_epoch * run.recipe.global_batch_size, len(run.train_indices))
        run.progress.update(
            step=run.state.step,
            num_steps=run.num_steps,
            epoch=f"{epoch + 1}/{run.recipe.epochs}",
            loss=loss / num_images,
            accuracy=correct / num_images,
            rate=run.state.step * run.recipe.global_batch_size / self._stopwatch.read(),
        )
