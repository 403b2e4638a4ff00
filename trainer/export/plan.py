"""Decides before training what a run will publish and where, so that an export that cannot succeed fails at once."""

from pathlib import Path

from trainer.config import TrainConfig
from trainer.errors import ExportError, TrainerError
from trainer.export.repository import RepositoryModel, printable
from trainer.loop.run import Run
from trainer.records.result import Result


def plan_export(run: Run, config: TrainConfig) -> RepositoryModel | None:
    """Returns the model that the run will publish, or None with `--no-export`.

    Raises:
        ConfigError: a model with this name exists and has other classes, inputs or outputs.
        ExportError: the repository cannot be written.
    """
    if not config.export:
        return None
    model = repository_model(run, config.model_repository, run.recipe.name)
    if run.world.is_main:
        try:
            model.check()
        except TrainerError as error:
            raise type(error)(f"{error}; to train without publishing, pass --no-export") from error
    return model


def repository_model(run: Run, repository: Path, name: str) -> RepositoryModel:
    """Returns a run's model under a name in a model repository.

    Raises:
        ConfigError: the name is not valid.
    """
    _, num_channels, height, width = run.dataset.train.images.shape
    return RepositoryModel(
        repository=repository,
        name=name,
        image_shape=(num_channels, height, width),
        labels=tuple(printable(label) for label in run.dataset.classes),
    )


def export_trained(run: Run, model: RepositoryModel, result: Result) -> str:
    """Publishes the model at the end of its training.

    Returns:
        The version's folder.

    Raises:
        ExportError: a format failed the parity check, or the repository cannot be written.
    """
    from trainer.export.pipeline import export  # imports onnx, which takes a second and would delay the first step

    try:
        return str(export(run, model, result))
    except TrainerError as error:
        raise ExportError(
            f"{error}; the run is complete but not exported; to retry: python -m trainer export {run.folder.path} "
            f"--model-repository {model.repository}"
        ) from error
