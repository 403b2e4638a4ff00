"""The end of a run whose steps do not fit in a GPU's memory: one line that names the options to use."""

from trainer.errors import ConfigError
from trainer.loop.run import Run


def out_of_memory(run: Run, error: Exception) -> ConfigError:
    """Returns the error for the user.

    Args:
        error: torch's, whose second sentence says how much it tried to allocate.
    """
    world, batch_size = run.world, run.recipe.global_batch_size
    num_parts = world.num_shards // world.num_computing
    num_images = -(-batch_size // world.num_computing)
    sentences = str(error).splitlines()[0].split(". ")
    tried = f": {sentences[1].removesuffix('.')}" if len(sentences) > 1 else ""
    if num_parts >= num_images:
        advice = "use smaller images, a smaller network or more GPUs"
    elif world.virtual_shards is not None:
        advice = f"train anew with --virtual-shards {2 * world.virtual_shards} or a smaller --global-batch-size"
    else:
        advice = (
            f"continue with --grad-accumulation {2 * num_parts}, which computes them in {2 * num_parts} parts, or use "
            "a smaller --global-batch-size or more GPUs"
        )
    return ConfigError(f"the GPU's memory does not hold a step of {num_images:,} images{tried}; {advice}")
