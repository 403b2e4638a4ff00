"""Plans a run's export before the training, so that an export that cannot succeed fails at once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from convoy.preprocessing import Method
from convoy.printable import printable
from trainer.config import ExportConfig, TrainConfig, flag_of
from trainer.data.datasets import DATASETS
from trainer.errors import ConfigError, ExportError, TrainerError
from trainer.export.quality import QualityError
from trainer.export.repository import RepositoryModel, find_version
from trainer.loop.run import Run
from trainer.models.start import is_foreign
from trainer.paths import default_model_name
from trainer.ranks.world import World
from trainer.records.result import Result
from trainer.records.run_folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Options of an export; the first three are options of the command line.

    Args:
        device: computes the outputs for validation images, if it is a GPU; files are checked on the CPU.
    """

    promote: bool = False
    thorough: bool = False
    export_views: bool = False
    device: torch.device

    @classmethod
    def of(cls, config: TrainConfig | ExportConfig, device: torch.device) -> Self:
        """Returns the options that a command line gives."""
        return cls(promote=config.promote, thorough=config.thorough, export_views=config.export_views, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """The model that a run will publish, and the options of its export."""

    model: RepositoryModel
    options: ExportOptions


def plan_export(run: Run, config: TrainConfig) -> ExportPlan | None:
    """Returns the plan of the run's export, or None with `--no-export`.

    Raises:
        ConfigError: a model with this name exists and has other classes, inputs or outputs.
        ExportError: the repository cannot be written, or a network that is not Convoy's cannot be exported.
    """
    if not config.export:
        return None
    name = config.name or default_model_name(run.recipe.dataset, run.recipe.name)
    model = repository_model(run, config.model_repository, name)
    options = ExportOptions.of(config, run.world.device)
    if run.world.is_main:
        try:
            model.check()
            if is_foreign(run.recipe.network) and not run.folder.config_path.exists():  # else it was rehearsed before
                from trainer.export.pipeline import rehearse  # imports onnx

                rehearse(run, options)
        except TrainerError as error:
            raise type(error)(f"{error}; to train without publishing, pass --no-export") from error
        if not (run.has_validation or config.promote or model.serving() is None):
            raise ConfigError(
                f"with num_validation 0 nothing tells if the model is worse than version {model.serving()} of {name}: "
                "pass --promote to publish it all the same, --no-export to train only, or another --name"
            )
    return ExportPlan(model=model, options=options)


def check_complete(folder: RunFolder, config: TrainConfig, world: World, log: Callable[[str], None]) -> bool:
    """Returns whether the run is complete, and published if that is asked for; logs it. All ranks call this.

    Raises:
        CheckpointError: `result.json` cannot be read, or is damaged.
    """
    is_done: bool = world.broadcast_object(world.is_main and _is_done(folder, config))
    if is_done:
        report = f" Its report: {folder.report_path}" if folder.report_path.exists() else ""  # a study has its own
        log(f"{folder.path} is complete; nothing to do.{report}")
    return is_done


def _is_done(folder: RunFolder, config: TrainConfig) -> bool:
    """Returns whether nothing is left to do of what the command line asks for.

    A model that the run has published elsewhere, or that was withdrawn since, counts as published. `convoy export`
    records nothing in the run folder: the digest of the weights identifies its versions.
    """
    result = folder.result()
    if result is None or not config.export or result.exported is not None:
        return result is not None
    name = config.name or default_model_name(folder.fingerprint.dataset, folder.fingerprint.recipe.name)
    return find_version(config.model_repository / name, result.weights_sha256) is not None


def repository_model(run: Run, repository: Path, name: str) -> RepositoryModel:
    """Returns a run's model under a name in a model repository.

    Raises:
        ConfigError: the name is not valid.
    """
    return RepositoryModel(
        repository=repository,
        name=name,
        image_shape=run.dataset.train.shape,
        labels=tuple(printable(label) for label in run.dataset.classes),
        significant_bits=run.dataset.significant_bits,
        preprocessing=_preprocessing(run),
    )


def _preprocessing(run: Run) -> Method:
    """Returns how a file of the user becomes an image as the run's are."""
    if run.dataset.name in DATASETS:
        return DATASETS[run.dataset.name].preprocessing
    return "pad" if run.recipe.square == "pad" else "fit"


def export_trained(run: Run, plan: ExportPlan | None, result: Result) -> Result:
    """Publishes the model at the end of its training, if that is planned.

    Returns:
        The result with the folder of the published version.

    Raises:
        ExportError: a format failed the parity check, the model is clearly worse than the version that serves, or the
            repository cannot be written.
    """
    if plan is None:
        return result
    version = find_version(plan.model.path, result.weights_sha256, run=run.folder.path.absolute().name)
    if version is not None:
        run.progress.log(f"exported to {version} before this run was interrupted")
        return replace(result, exported=str(version))
    from trainer.export.pipeline import export  # imports onnx, which takes a second and would delay the first step

    try:
        return replace(result, exported=str(export(run, plan.model, result, plan.options)))
    except TrainerError as error:
        command = f"convoy export {run.folder.path} --model-repository {plan.model.repository}"
        for name in ("thorough", "export_views"):
            command += f" {flag_of(name)}" if getattr(plan.options, name) else ""
        retry = f": {command} --promote" if isinstance(error, QualityError) else f"; to retry: {command}"
        raise ExportError(f"{error}; the run is complete but not exported{retry}") from error
