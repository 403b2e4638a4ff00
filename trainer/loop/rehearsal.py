"""Finds the kernels of a run's steps before the first one, so that they are compiled while other things are done."""

from collections.abc import Iterator
from contextlib import suppress

import torch

from convoy.cpus import num_available_cpus
from trainer.data.augment import draw_params
from trainer.kernels.ahead import Compilation, is_cache_empty
from trainer.kernels.choice import is_fusible, try_kernels
from trainer.loop.run import Run
from trainer.loop.samples import share_of_step
from trainer.loop.step import Batch
from trainer.ranks.world import World

_MAX_THREADS = 16
"""Kernels that are compiled at a time."""


def start_compilers(world: World) -> Compilation | None:
    """Starts what compiles kernels for the ranks of a host, in the background.

    Returns:
        None on CPUs, and on all ranks of a host but one: they find the kernels in Triton's cache.
    """
    if world.device.type != "cuda":
        return None
    is_cold = is_cache_empty()
    try_kernels(world.device)
    if world.local_rank > 0:
        return None
    compilation = Compilation(world.device, min(num_available_cpus(), _MAX_THREADS), has_processes=is_cold)
    world.on_leave.callback(compilation.close)
    return compilation


def compile_ahead(run: Run, compilation: Compilation) -> None:
    """Begins to compile the kernels of a run's steps; they are those that a rehearsal asks for.

    A rehearsal is a step of each kind and each number of images, without images that matter and without our kernels.
    It changes nothing, and loads what cuDNN and cuBLAS need. Networks with other kernels than ours have none.
    """
    learner = run.learner
    is_ours = getattr(learner.model.network, "suits_kernels", False) and not run.folder.fingerprint.is_compiled
    if not is_ours or not is_fusible(torch.zeros(1, device=run.world.device)):
        compilation.close()
        return
    run.kernels = compilation
    learner.model.train()
    with suppress(Exception), compilation.rehearsal():  # what fails here, such as for memory, fails in the step
        learner.rehearse(_batches(run))


def await_kernels(run: Run) -> None:
    """Returns when the kernels that are compiled ahead are ready, on all hosts. All ranks call this."""
    if run.kernels is not None:
        with run.world.activity.slow_phase():
            run.kernels.wait()
    if run.world.device.type == "cuda":
        run.world.barrier()


def compile_now(run: Run) -> None:
    """Compiles the kernels of a run's steps, several at a time. All ranks call this."""
    compilation = start_compilers(run.world)
    if compilation is not None:
        compile_ahead(run, compilation)
    await_kernels(run)


def _batches(run: Run) -> Iterator[Batch]:
    """Yields this rank's part of a batch of each kind of step, of the usual size and of an epoch's last one."""
    device, dataset = run.world.device, run.dataset
    shares = [share_of_step(run, step) for step in (0, run.steps_per_epoch - 1)]
    for sizes, num_global in dict.fromkeys((share.sizes, share.num_images) for share in shares):
        size, image_size = sum(sizes), None if dataset.is_streamed else dataset.train.shape[1:]
        params = draw_params(run.recipe.augment, size, seed=0, epoch=0, image_size=image_size).to(device)
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
