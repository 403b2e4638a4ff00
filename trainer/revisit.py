"""A run opened again: its newest weights, on its validation images or on the test images."""

from trainer.checkpoint import weights_sha256
from trainer.config import EvaluateConfig, recipe_from_json
from trainer.distributed import World
from trainer.errors import ConfigError
from trainer.evaluate import describe_accuracy, evaluate
from trainer.fit import Run, restore
from trainer.hardware import keep_freed_memory
from trainer.ledger import Ledger
from trainer.progress import Progress
from trainer.run_folder import RunFolder
from trainer.train import evaluate_on_test_set, load, setup


def evaluate_run(config: EvaluateConfig) -> None:
    """`python -m trainer evaluate RUN`; also under torchrun, with the same figures for every number of ranks.

    Raises:
        TrainerError: see `trainer.errors`.
    """
    keep_freed_memory()
    with World.join(config.device) as world, Progress(is_main=world.is_main) as progress:
        run = open_run(config, world, progress)
        if config.split == "validation":
            seen = evaluate(run.learner.predict, run.validation_images, run.validation_indices, world)
            progress.say(f"validation accuracy {describe_accuracy(seen.num_errors, seen.num_images)}")
            return
        look = Ledger(run.folder.ledger_path).find(run.dataset.sha256, weights_sha256(run.learner.model))
        if look is None:
            _, _, look = evaluate_on_test_set(run)
        if look is not None:
            recorded = ", as recorded then" if look.is_repeated else ""
            progress.say(
                f"test accuracy {describe_accuracy(look.num_errors, look.num_images, look.num_looks)}, "
                f"look {look.number} of {look.num_looks} at this test set in {run.folder.ledger_path}{recorded}"
            )


def open_run(config: EvaluateConfig, world: World, progress: Progress) -> Run:
    """The run in a folder, at its newest good checkpoint.

    Raises:
        ConfigError: there is no run or no checkpoint, or its data set has changed.
    """
    folder = RunFolder.read(config.run)
    recipe = recipe_from_json(folder.fingerprint["recipe"])
    dataset = load(recipe, folder.fingerprint["image_size"], config.data_dir, world, progress.say)
    if dataset.sha256 != folder.fingerprint["dataset_sha256"]:
        raise ConfigError(f"{dataset.name} is not what {folder.path} was trained on: its content has changed since")
    run = setup(recipe, dataset, folder, world, progress)
    if not restore(run):
        raise ConfigError(f"{folder.path} has no checkpoint: train it first")
    return run
