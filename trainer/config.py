"""The command lines of the trainer as values, and the recipe that a training run's command line resolves to.

Knows nothing about models and hardware; imports no torch.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from convoy.options import option
from trainer.errors import ConfigError
from trainer.network_files import check_photographs, with_files
from trainer.paths import check_model_name, default_data_dir, full_name
from trainer.recipes import Precision, Recipe
from trainer.recipes.fields import parse_assignments, set_fields
from trainer.recipes.files import load_recipe

DeviceChoice = Literal["auto", "cpu", "cuda"]
SourceChoice = Literal["auto", "resident", "streamed"]
LogTo = Literal["wandb", "mlflow"]
Resume = Literal["auto", "never"]
GradientReduction = Literal["auto", "vector", "ddp", "ddp-bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Trains a network by a recipe, evaluates it once on the test images, and writes everything to a run folder."""

    recipe: Annotated[str, option("RECIPE", "mnist")] = "mnist"
    """A recipe that `convoy recipes` lists, or one of your own: FILE.py:NAME, or a run's run.toml."""
    config: Annotated[Path | None, option("FILE", "none")] = None
    """TOML file of options and of [set] values; the command line wins. Each run writes one, run.toml."""
    set: Annotated[tuple[str, ...], option("FIELD=VALUE ...", "the recipe's fields")] = ()
    """New values of the recipe's fields, such as augment.shift=2; `convoy recipes NAME` shows all fields."""
    dataset: Annotated[str | None, option("NAME", "the recipe's")] = None
    """The data set: a name that `convoy data list` shows, or folder:PATH, a folder with one folder for each class."""
    network: Annotated[str | None, option("NAME", "the recipe's")] = None
    """The network: one of Convoy's, torchvision:NAME, timm:NAME, or a class or function of your own, FILE.py:NAME."""
    weights: Annotated[str | None, option("FILE", "the recipe's")] = None
    """File of weights to start from, .pth, .pt or .safetensors; no code of it is run. Other classes get a new head."""
    freeze_until: Annotated[str | None, option("MODULE", "the recipe's")] = None
    """Module of the network, such as layer4, before which no weights and no statistics change."""
    head_lr: Annotated[float | None, option("FLOAT", "the recipe's")] = None
    """Learning rate of the last layer, as a multiple of the others'."""
    image_size: Annotated[int | None, option("INT", "their own, if all are squares of one size")] = None
    """For folder:PATH only: size in pixels to which images are resized (the shorter side) and cropped to a square."""
    source: SourceChoice = "auto"
    """resident: images decoded once, on the device. streamed: decoded when needed. auto: by the device's memory."""
    skip_bad_images: int = 0
    """Leave out files that cannot be decoded, up to so many, instead of ending the run before it begins."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Folder in which data sets are kept."""
    run_dir: Annotated[Path | None, option("PATH", "runs/RECIPE-TIME-sSEED")] = None
    """Folder of this run. An unfinished run in it is continued."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and their augmentation."""
    epochs: Annotated[int | None, option("INT", "the recipe's")] = None
    """Number of epochs."""
    global_batch_size: Annotated[int | None, option("INT", "the recipe's")] = None
    """Images per step, over all ranks together. The recipe's learning rates are scaled with it."""
    num_validation: Annotated[int | None, option("INT", "the recipe's")] = None
    """Training images set aside for validation, at most a tenth. 0: none, once the hyper-parameters are fixed."""
    mirror: Annotated[bool | None, tyro.conf.DisallowNone, option("", "the recipe's")] = None
    """Mirror images at random. --no-mirror where left and right matter, as in letters, arrows and faces of clocks."""
    shift: Annotated[int | None, option("INT", "the recipe's")] = None
    """Largest shift of a training image, in pixels. 0 where the position of things matters."""
    rotate_degrees: Annotated[float | None, option("FLOAT", "the recipe's")] = None
    """Largest rotation of a training image, both ways. 0 where the direction of things matters, as in gauges."""
    scale: Annotated[float | None, option("FLOAT", "the recipe's")] = None
    """Largest relative change of a training image's width and height, such as 0.1. 0 where sizes matter."""
    lr_scale: float = 1.0
    """Factor of every learning rate of the recipe."""
    precision: Annotated[Precision | None, option("{float32,tf32,bfloat16}", "the recipe's")] = None
    """bfloat16: mixed; float32 where the hardware is not faster in it. tf32: float32, rounded by GPUs since Ampere."""
    virtual_shards: Annotated[int | None, option("INT", "one shard for each rank")] = None
    """Number of parts of each batch, a power of two. Every number of ranks that divides it gives the same weights."""
    grad_accumulation: int = 1
    """Parts in which each rank computes its share of a batch, one after another, to need less memory."""
    compile: bool = False
    """Compile the steps by torch.compile, which takes up to minutes: for long trainings of large networks."""
    gradient_reduction: GradientReduction = "auto"
    """Ranks add up gradients in the backward pass (ddp) or after it (vector); ddp-bfloat16 rounds. auto: GPUs ddp."""
    save_every_s: float = 20.0
    """Seconds between checkpoints. The first checkpoints follow each other sooner."""
    save_every_steps: Annotated[int | None, option("INT", "by time only")] = None
    """Steps between checkpoints, in addition to those by time."""
    resume: Resume = "auto"
    """auto: continue from the newest good checkpoint in the run folder. never: refuse a folder that holds a run."""
    device: DeviceChoice = "auto"
    """auto: GPUs if there are any, one for each rank."""
    allow_shared_gpu: bool = False
    """Let several ranks share a GPU if there are fewer GPUs than ranks: to try things out, as it is slow."""
    hang_timeout_s: float = 5.0
    """Seconds that ranks wait for one that hangs in a training step; slow steps get more. 0: for ever, to debug."""
    log_to: Annotated[tuple[LogTo, ...], option("{wandb,mlflow} ...", "neither")] = ()
    """Services that get the metrics, too. Their own variables hold, such as WANDB_MODE, MLFLOW_TRACKING_URI."""
    metrics_address: Annotated[str | None, option("HOST:PORT", "off")] = None
    """Address on which the main rank answers Prometheus while it trains, such as 0.0.0.0:8007."""
    export: bool = True
    """Publish the trained model in the model repository."""
    model_repository: Path = Path("models")
    """Folder of the models to serve."""
    name: Annotated[str | None, option("NAME", "that of the folder of images, or the recipe's")] = None
    """Name of the published model."""
    promote: bool = False
    """Publish the model even if it is clearly worse than the version that serves, or always predicts the same class."""
    thorough: bool = False
    """Check every exported file on 10,000 images at every batch size, instead of for less than a minute."""
    export_views: bool = False
    """Export the mean over the recipe's test-time views, which multiplies the computation, instead of one view."""

    @property
    def chooses_mirroring(self) -> bool:
        """Whether the command line says if images are mirrored."""
        return self.mirror is not None or "augment.flip" in parse_assignments(self.set)

    def resolve(self) -> Recipe:
        """Returns the recipe with this command line's changes.

        Raises:
            ConfigError: there is no such recipe, or a value is impossible.
        """
        self.check_values()
        own = load_recipe(self.recipe)
        recipe = own.with_augmentation(
            mirror=self.mirror, shift=self.shift, rotate_degrees=self.rotate_degrees, scale=self.scale
        )
        if self.global_batch_size is not None:
            recipe = recipe.with_global_batch_size(self.global_batch_size)
        recipe = set_fields(recipe, self._fields_to_set())
        _check_virtual_shards(self.virtual_shards, recipe.global_batch_size)
        if self.virtual_shards is not None and self.gradient_reduction not in ("auto", "vector"):
            raise ConfigError(
                f"--gradient-reduction {self.gradient_reduction} with --virtual-shards {self.virtual_shards}: virtual "
                "shards add up in a fixed order, which DDP does not keep; leave one of them out"
            )
        if self.grad_accumulation > recipe.global_batch_size:
            raise ConfigError(
                f"--grad-accumulation {self.grad_accumulation} of a global batch of {recipe.global_batch_size} images: "
                "use at most as many as images"
            )
        groups = {kind: replace(group, lr=group.lr * self.lr_scale) for kind, group in recipe.param_groups.items()}
        recipe = replace(
            recipe,
            dataset=full_name(self.dataset or recipe.dataset),
            network=self.network or recipe.network,
            weights=self.weights or recipe.weights,
            freeze_until=self.freeze_until or recipe.freeze_until,
            head_lr=recipe.head_lr if self.head_lr is None else self.head_lr,
            epochs=self.epochs or recipe.epochs,
            num_validation=recipe.num_validation if self.num_validation is None else self.num_validation,
            param_groups=groups,
            precision=self.precision or recipe.precision,
        )
        check_photographs(recipe)
        resolved = with_files(recipe)
        for kind, digest in own.file_sha256.items():  # of a run.toml
            is_own = getattr(self, kind, kind) is None
            if is_own and resolved.file_sha256.get(kind, digest) != digest:
                raise ConfigError(f"{getattr(resolved, kind)} has changed since {self.recipe} was written: restore it")
        return resolved

    def check_values(self) -> None:
        """Checks the values by themselves, without the recipe.

        Raises:
            ConfigError: one is impossible.
        """
        for name in ("epochs", "global_batch_size", "image_size", "grad_accumulation", "save_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag_of(name)} {value}: must be at least 1")
        for name in ("skip_bad_images", "num_validation"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{flag_of(name)} {value}: must be at least 0")
        self._check_augmentation()
        if not 0 < self.lr_scale < float("inf"):
            raise ConfigError(f"--lr-scale {self.lr_scale}: must be a positive number")
        if not self.save_every_s > 0:
            raise ConfigError(f"--save-every-s {self.save_every_s}: must be a positive number")
        if not 0 <= self.hang_timeout_s < float("inf"):
            raise ConfigError(f"--hang-timeout-s {self.hang_timeout_s}: must be a positive number, or 0 for never")
        if self.name is not None:
            check_model_name(self.name)
        self._check_metrics_address()

    def _check_metrics_address(self) -> None:
        if self.metrics_address is None:
            return
        host, _, port = self.metrics_address.rpartition(":")
        if not host or not port.isdecimal() or not int(port) < 65536:
            raise ConfigError(f"--metrics-address {self.metrics_address}: must be HOST:PORT, such as 0.0.0.0:8007")

    def _check_augmentation(self) -> None:
        limits = {
            "shift": (float("inf"), "0 or more pixels"),
            "rotate_degrees": (180, "0 to 180"),
            "scale": (0.9, "0 to 0.9"),
        }
        for name, (most, range_in_words) in limits.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise ConfigError(f"{flag_of(name)} {value}: must be {range_in_words}")

    def _fields_to_set(self) -> dict[str, str]:
        values = parse_assignments(self.set)
        for name in values:
            option = option_of_field(name)
            if option is None and hasattr(self, name):
                raise ConfigError(f"--set {name}={values[name]}: this is an option, {flag_of(name)} {values[name]}")
            if option is not None and (given := getattr(self, option)) is not None:
                is_switch = isinstance(given, bool)
                asked = flag_of(option if given or not is_switch else f"no_{option}")
                value = "" if is_switch else f" {given}"
                raise ConfigError(f"{asked}{value} and --set {name}={values[name]}: give one")
        return values

    def options_of_result(self) -> dict[str, str]:
        """Returns the options that decide the run's result, which must be the same on all ranks."""
        names = (option.name for option in fields(self) if option.name not in _DECIDE_NO_RESULT)
        return {flag_of(name): str(getattr(self, name)) for name in names}


CHANGE_RECIPE = {
    "set",
    "dataset",
    "network",
    "weights",
    "freeze_until",
    "head_lr",
    "epochs",
    "global_batch_size",
    "num_validation",
    "mirror",
    "shift",
    "rotate_degrees",
    "scale",
    "lr_scale",
    "precision",
}
"""Options of a training run that change its recipe, which a run's `run.toml` holds as changed."""
_DECIDE_NO_RESULT = {
    "config",
    "network",  # the recipe's name and digest of it, and those of the weights, are checked
    "weights",
    "data_dir",
    "run_dir",
    "save_every_s",
    "save_every_steps",
    "resume",
    "device",
    "allow_shared_gpu",
    "hang_timeout_s",
    "log_to",
    "metrics_address",
    "export",
    "model_repository",
    "name",
    "promote",
    "thorough",
    "export_views",
}
"""Options of a training run that may differ between ranks: they change where and how it runs, not its computation."""


_OPTIONS_OF_FIELDS = {
    "augment.flip": "mirror",
    "augment.shift": "shift",
    "augment.rotate_degrees": "rotate_degrees",
    "augment.scale": "scale",
}


def option_of_field(name: str) -> str | None:
    """Returns the option of a training run that sets a recipe's field, too; None if there is none."""
    option = _OPTIONS_OF_FIELDS.get(name, name)
    return option if option in CHANGE_RECIPE - {"set", "lr_scale"} else None


def flag_of(option: str) -> str:
    """Returns an option as the command line has it: `--global-batch-size`."""
    return f"--{option.replace('_', '-')}"


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
    """Evaluates a run's newest weights on its validation images, or on the test images."""

    run: Annotated[Path, tyro.conf.Positional, option("RUN")]
    """The run folder."""
    split: Literal["validation", "test"] = "validation"
    """Images to evaluate on. The ledger records each evaluation on test images; the same weights are evaluated once."""
    dataset: Annotated[str | None, option("folder:PATH", "where they were in training")] = None
    """The run's folder of images, if it was moved."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Folder in which data sets are kept."""
    device: DeviceChoice = "auto"
    """auto: GPUs if there are any, one for each rank."""
    allow_shared_gpu: bool = False
    """Let several ranks share a GPU if there are fewer GPUs than ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Exports a run's newest weights, checks every format, and publishes them as a model's next version."""

    run: Annotated[Path, tyro.conf.Positional, option("RUN")]
    """The run folder."""
    model_repository: Path = Path("models")
    """Folder of the models to serve."""
    name: Annotated[str | None, option("NAME", "as the training says, with -int8 after it for --int8")] = None
    """Name of the model in the repository."""
    int8: bool = False
    """Publish the model in int8, as a model of its own, if that costs at most 0.1 points of validation accuracy."""
    promote: bool = False
    """Publish the model even if it is clearly worse than the version that serves, or always predicts the same class."""
    thorough: bool = False
    """Check every exported file on 10,000 images at every batch size, instead of for less than a minute."""
    export_views: bool = False
    """Export the mean over the recipe's test-time views, which multiplies the computation, instead of one view."""
    device: DeviceChoice = "auto"
    """Computes the validation accuracy. auto: a GPU if there is one. Exported files are checked on the CPU."""
    dataset: Annotated[str | None, option("folder:PATH", "where they were in training")] = None
    """The run's folder of images, if it was moved."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Folder in which data sets are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """Compares finished runs, setting by setting: worst, median and best accuracy over all evaluated seeds."""

    runs: Annotated[list[Path], tyro.conf.Positional, option("RUN ...")]
    """Runs and studies, such as runs/*. All evaluated seeds of each setting must be given."""
