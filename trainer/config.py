"""The command line of a training run, and what it resolves to."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from trainer.errors import ConfigError
from trainer.paths import default_data_dir, full_name
from trainer.recipes import Precision, Recipe, find_recipe

DeviceChoice = Literal["auto", "cpu", "cuda"]
Resume = Literal["auto", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Train a convnet by a recipe, evaluate it once on the test set, write everything to a run folder."""

    recipe: str = "mnist"
    """What to compute; `python -m trainer recipes` lists them."""
    dataset: str | None = None
    """Another than the recipe's: a name from `python -m trainer data list`, or folder:PATH, one folder per class."""
    image_size: int | None = None
    """For folder:PATH: images are resized (shorter side) and cropped to this many pixels."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Where data sets are kept."""
    run_dir: Path | None = None
    """Folder of this run. An existing one is continued. [default: runs/RECIPE-TIME-sSEED]"""
    seed: int = 0
    """Decides the initial weights, the order of samples and the augmentation."""
    epochs: int | None = None
    """Instead of the recipe's."""
    global_batch_size: int | None = None
    """Images a step over all ranks together, instead of the recipe's."""
    lr_scale: float = 1.0
    """Multiplies every learning rate of the recipe."""
    precision: Precision | None = None
    """Of the forward pass, instead of the recipe's; bfloat16 is used only where the hardware is faster in it."""
    virtual_shards: int | None = None
    """Cut each batch in so many shards, a power of two: the same weights for every number of ranks that divides it."""
    save_every_s: float = 20.0
    """Save a checkpoint when so many seconds have passed since the last one; the first ones follow sooner."""
    save_every_steps: int | None = None
    """Save one after every so many steps as well."""
    resume: Resume = "auto"
    """auto: continue from the newest good checkpoint in the run folder; never: refuse a folder that has any."""
    device: DeviceChoice = "auto"
    """auto takes the GPUs if there are any, one for each rank."""
    export: bool = True
    """Publish the trained model in the model repository."""
    model_repository: Path = Path("models")
    """Folder of the models to serve; the model's name there is the recipe's."""

    def resolve(self) -> Recipe:
        """The recipe with this command line's changes.

        Raises:
            ConfigError: an unknown recipe or a value that makes no sense.
        """
        for name in ("epochs", "global_batch_size", "image_size", "save_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if not 0 < self.lr_scale < float("inf"):
            raise ConfigError(f"--lr-scale {self.lr_scale}: must be a positive number")
        if not self.save_every_s > 0:
            raise ConfigError(f"--save-every-s {self.save_every_s}: must be a positive number")
        recipe = find_recipe(self.recipe)
        _check_virtual_shards(self.virtual_shards, self.global_batch_size or recipe.global_batch_size)
        groups = {kind: replace(group, lr=group.lr * self.lr_scale) for kind, group in recipe.param_groups.items()}
        return replace(
            recipe,
            dataset=full_name(self.dataset or recipe.dataset),
            epochs=self.epochs or recipe.epochs,
            global_batch_size=self.global_batch_size or recipe.global_batch_size,
            param_groups=groups,
            precision=self.precision or recipe.precision,
        )


def _check_virtual_shards(number: int | None, global_batch_size: int) -> None:
    if number is None:
        return
    if number < 1 or number & (number - 1):
        raise ConfigError(f"--virtual-shards {number}: must be a power of two, such as 4 or 8")
    if number > global_batch_size:
        raise ConfigError(
            f"--virtual-shards {number} of a global batch of {global_batch_size} images: use at most as many as images"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Tell how a finished run's weights do on its validation images, or on the test images."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    split: Literal["validation", "test"] = "validation"
    """A look at the test set is written into the ledger; a second one with the same weights is read from it."""
    dataset: str | None = None
    """folder:PATH, where the run's folder of images lies now, if it was moved."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Where data sets are kept."""
    device: DeviceChoice = "auto"
    """auto takes the GPUs if there are any, one for each rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Make a run's newest weights a version in a model repository, for servers, if every format passes its check."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    model_repository: Path = Path("models")
    """Folder of the models to serve."""
    name: str | None = None
    """The model's name there. [default: the recipe's, and -int8 with --int8]"""
    int8: bool = False
    """Publish the model in int8, as a model of its own, if that costs at most 0.1 points of validation accuracy."""
    dataset: str | None = None
    """folder:PATH, where the run's folder of images lies now, if it was moved."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Where data sets are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """Tell how finished runs did, setting by setting: worst, median and best over all seeds that were looked at."""

    runs: Annotated[list[Path], tyro.conf.Positional]
    """Run folders of one data set; of each setting all seeds, or it is refused."""
