"""Finds the kernels of a run's steps before the first one, so that they are compiled while other things are done."""

from collections.abc import Iterator
from contextlib import suppress

import torch

from convoy.cpus import num_available_cpus
from trainer.data.augment import draw_params
from trainer.kernels.ahead import Compilation
from trainer.kernels.choice import is_fusible
from trainer.loop.run import Run
from trainer.loop.samples import StepShare
from trainer.loop.step import Batch

_MAX_THREADS = 16
"""Kernels compiled at a time: a sixth of the work holds Python's lock."""


def compile_ahead(run: Run) -> Compilation | None:
    """Starts to compile the kernels of a run's steps, in the background; they are those that a rehearsal asks for.

    A rehearsal is a step of each kind and each number of images, without images that matter and without our kernels.
    It changes nothing, and loads what cuDNN and cuBLAS need.

    Returns:
        The compilation, for which the first step should wait. None where there is nothing to compile: on CPUs, for
        networks with other kernels than ours, and on all ranks of a host but one, which find the kernels in Triton's
        cache.
    """
    world, learner = run.world, run.learner
    if world.local_rank > 0 or not is_fusible(torch.zeros(1, device=world.device)):
        return None
    if run.folder.fingerprint.is_compiled or not getattr(learner.model.network, "suits_kernels", False):
        return None
    compilation = Compilation(world.device, min(num_available_cpus(), _MAX_THREADS))
    world.on_leave.callback(compilation.close)
    learner.model.train()
    with suppress(Exception), compilation.rehearsal():  # what fails here, such as for memory, fails in the step
        learner.rehearse(_batches(run))
    return compilation


def await_kernels(run: Run) -> None:
    """Returns when the kernels that are compiled ahead are ready, on all hosts. All ranks call this."""
    if run.kernels is not None:
        with run.world.activity.slow_phase():
            run.kernels.wait()
    if run.world.device.type == "cuda":
        run.world.barrier()


def _batches(run: Run) -> Iterator[Batch]:
    """Yields this rank's part of a batch of each kind of step, of the usual size and of an epoch's last one."""
    recipe, device, dataset, num_images = run.recipe, run.world.device, run.dataset, len(run.train_indices)
    starts = 0, (run.steps_per_epoch - 1) * recipe.global_batch_size
    shares = [StepShare.of(start, num_images, recipe.global_batch_size, run.world) for start in starts]
    for sizes, num_global in dict.fromkeys((share.sizes, share.num_images) for share in shares):
        size, image_size = sum(sizes), None if dataset.is_streamed else dataset.train.shape[1:]
        params = draw_params(recipe.augment, size, seed=0, epoch=0, image_size=image_size).to(device)
        zeros = torch.zeros(size, dtype=torch.int64, device=device)
        for kind in run.kinds:
            yield Batch(
                images=torch.zeros(1, *dataset.train.shape, dtype=torch.uint8, device=device),
                indices=zeros,
                labels=zeros,
                augment_params=params,
                dropout_seeds=zeros,
                lr_factor=torch.zeros((), device=device),
                sizes=sizes,
                num_images=num_global,
                kind=kind,
            )
