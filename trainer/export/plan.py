"""What a run exports and where, known before it trains: what cannot be published is said before the work, not after."""

from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.errors import ExportError, TrainerError
from trainer.export.repository import Model, printable
from trainer.loop.fit import Run


def plan_export(run: Run, config: TrainConfig) -> Model | None:
    """Where the trained model will be published, if it will.

    Raises:
        ConfigError: a model with other classes, inputs or outputs has its name already.
        ExportError: the repository may not be written.
    """
    if not config.export:
        return None
    model = served_model(run, config.model_repository, run.recipe.name)
    if run.world.is_main:
        try:
            model.check()
        except TrainerError as error:
            raise type(error)(f"{error}; --no-export trains without publishing") from error
    return model


def served_model(run: Run, repository: Path, name: str) -> Model:
    """A run's model in a model repository.

    Raises:
        ConfigError: the name is none for a model.
    """
    _, num_channels, height, width = run.dataset.train.images.shape
    return Model(
        repository=repository,
        name=name,
        image_shape=(num_channels, height, width),
        labels=tuple(printable(label) for label in run.dataset.classes),
    )


def export_trained(run: Run, model: Model, result: dict[str, Any]) -> str:
    """Publish the model at the end of its training; returns the version's folder.

    Raises:
        ExportError: it failed its check, or the repository cannot be written.
    """
    from trainer.export.pipeline import export  # imports onnx: a second, which the first step need not wait for

    try:
        return str(export(run, model, result))
    except TrainerError as error:
        raise ExportError(
            f"{error}; the run is complete, but not exported: python -m trainer export {run.folder.path} "
            f"--model-repository {model.repository} tries again"
        ) from error
