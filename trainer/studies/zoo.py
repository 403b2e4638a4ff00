"""The cost of accuracy (page 37 of the lecture, after Canziani et al. 2016): multiply-adds, parameters, time.

Accuracies of the ImageNet-size networks are those that torchvision publishes, read from its metadata without a
download. Those of our small-image networks come from the finished runs in the same folder of runs. The study measures
times on this machine with random weights, which take the same time.
"""

import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from convoy.options import option
from trainer.data.datasets import DATASETS
from trainer.errors import CheckpointError, ConfigError
from trainer.evaluation.ledger import Ledger
from trainer.evaluation.views import NUM_VIEWS, is_headline_averaged
from trainer.models import Classifier, build_network
from trainer.models.cost import Cost, count_cost
from trainer.models.pretrained import build_original
from trainer.paths import LEDGER_FILE
from trainer.ranks.world import World
from trainer.recipes import RECIPES
from trainer.records.result import Result
from trainer.studies.folder import StudyFolder
from trainer.studies.latency import Runtime, measure, prepare
from trainer.studies.page import write_page
from trainer.studies.zoo_figures import ZooEntry
from trainer.studies.zoo_page import make_page

_ORIGINALS = (
    "alexnet",
    "vgg16",
    "vgg19",
    "googlenet",
    "inception_v3",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
)
_SMALL = (
    "lecture",
    "lenet5",
    "alexnet",
    "bn-alexnet",
    "bn-nin",
    "vgg16",
    "vgg19",
    "googlenet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "cifar10-small",
    "cifar10",
)
"""Names of networks, or of recipes where a network's widths can be chosen."""
_ORIGINAL_SIZES = {"inception_v3": 299}
"""Image sizes of the originals, where not 224."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooConfig:
    """Shows accuracy by multiply-adds and parameters, and measures the time per image by batch size and runtime."""

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Images per forward pass."""
    runtimes: tuple[Runtime, ...] = ("eager", "torchscript", "onnxruntime")
    """Runtimes to measure."""
    originals: tuple[str, ...] = _ORIGINALS
    """torchvision's networks to measure; accuracy and cost are shown for all of them."""
    small: tuple[str, ...] = _SMALL
    """Our networks for 32x32 images to measure."""
    seconds: float = 1.0
    """Seconds to measure each; at least three passes."""
    limit_s: float = 15.0
    """Leave out batch sizes whose pass would take longer than this."""
    runs: Path = Path("runs")
    """Folder of the finished runs, for the accuracies of our networks on CIFAR-10."""
    run_dir: Annotated[Path | None, option("PATH", "runs/study-zoo-TIME")] = None
    """Folder of this study; an existing one is continued."""


def study_zoo(config: ZooConfig) -> None:
    """Runs `python -m trainer study zoo`.

    Raises:
        ConfigError: a network is unknown, or the batch sizes do not rise.
    """
    _check(config)
    with World.join("cpu") as world, StudyFolder.open("zoo", config, world) as folder:
        if not world.is_main:
            return  # ranks that measure at the same time would slow each other down
        print(_describe(config, folder), flush=True)
        originals = [_original_entry(name) for name in _ORIGINALS]
        finished = _finished_results(config.runs)
        small = [_small_entry(name, finished) for name in _SMALL]
        num_evaluations = len(Ledger(config.runs / LEDGER_FILE).entries(DATASETS["cifar10"].sha256))
        for name in config.originals:
            size = _ORIGINAL_SIZES.get(name, 224)
            _measure_all(folder, config, f"original {name}", partial(build_original, name), size)
        for name in config.small:
            _measure_all(folder, config, f"small {name}", partial(_build_small, name), 32)
        times = {key: value for key, value in folder.results().items() if value is not None}
        page = make_page(originals, small, num_evaluations, times, list(config.runtimes))
        write_page(folder, page)


def _check(config: ZooConfig) -> None:
    for kind, names, known in (("originals", config.originals, _ORIGINALS), ("small", config.small, _SMALL)):
        for name in names:
            if name not in known:
                raise ConfigError(f"--{kind} {name}: choose from {', '.join(known)}")
    if not config.batch_sizes or min(config.batch_sizes) < 1 or list(config.batch_sizes) != sorted(config.batch_sizes):
        raise ConfigError("--batch-sizes must be one or more rising numbers of at least 1")


def _describe(config: ZooConfig, folder: StudyFolder) -> str:
    number = len(config.originals) + len(config.small)
    minutes = number * len(config.runtimes) * len(config.batch_sizes) * config.seconds / 60
    each = f"{config.seconds:g} s or three passes each"
    return (
        f"{number} networks in {len(config.runtimes)} runtimes at {len(config.batch_sizes)} batch sizes, {each}: "
        f"{minutes:.0f} minutes or more; results in {folder.path}"
    )


def _original_entry(name: str) -> ZooEntry:
    from torchvision import models

    meta = models.get_model_weights(name)["IMAGENET1K_V1"].meta
    cost = count_cost(lambda: build_original(name), num_channels=3, image_size=_ORIGINAL_SIZES.get(name, 224))
    return ZooEntry(name=name, cost=cost, accuracy=meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100)


def _finished_results(runs: Path) -> list[Result]:
    """Returns the results of all finished runs on CIFAR-10, those inside studies of seeds included."""
    found = []
    for path in sorted([*runs.glob("*/result.json"), *runs.glob("*/seed-*/result.json")]):
        with suppress(CheckpointError):  # a study's own result, or a damaged file
            result = Result.read(path)
            if result is not None and result.dataset == "cifar10":
                found.append(result)
    return found


def _small_entry(name: str, finished: list[Result]) -> ZooEntry:
    """Returns a network with the median test accuracy of all its finished runs, whatever their seeds and settings."""
    matching = [result for result in finished if name in (result.model, result.recipe)]
    accuracy = statistics.median(result.test_accuracy for result in matching) if matching else None
    epochs = dict.fromkeys(_epochs(result) for result in matching)
    return ZooEntry(
        name=name, cost=_small_cost(name), accuracy=accuracy, num_runs=len(matching), epochs="; ".join(epochs) or None
    )


def _epochs(result: Result) -> str:
    recipe = RECIPES.get(result.recipe)
    if recipe is None:
        return str(result.epochs)
    views = recipe.test_time_views
    fewer = f", fewer epochs than the recipe's {recipe.epochs}" if result.epochs < recipe.epochs else ""
    is_averaged = is_headline_averaged(views, result.test_errors_with_views)
    return f"{result.epochs}{fewer}{f', {NUM_VIEWS[views]} views averaged' if is_averaged else ''}"


def _small_cost(name: str) -> Cost:
    return count_cost(lambda: _build_small(name), num_channels=3, image_size=32)


def _build_small(name: str) -> nn.Module:
    network, widths = (RECIPES[name].network, RECIPES[name].widths) if name in RECIPES else (name, ())
    return build_network(network, num_channels=3, image_size=32, num_classes=10, widths=widths)


def _measure_all(
    folder: StudyFolder, config: ZooConfig, key: str, build: Callable[[], nn.Module], image_size: int
) -> None:
    """Measures a network in each runtime and batch size that has no result yet.

    Results are milliseconds per image, or None for batch sizes that would exceed `--limit-s`.
    """
    known = folder.results()
    todo = [runtime for runtime in config.runtimes if f"{key} {runtime} {config.batch_sizes[-1]}" not in known]
    if not todo:
        return
    torch.manual_seed(0)
    model = Classifier(build(), torch.full((3,), 120.0), torch.full((3,), 60.0)).eval()
    for runtime in todo:
        run = prepare(runtime, model, image_size)
        ms = 0.0  # per image, of the largest batch so far
        for batch_size in config.batch_sizes:
            name = f"{key} {runtime} {batch_size}"
            if name not in known:
                is_too_long = ms * batch_size / 1000 > config.limit_s
                images = torch.zeros(batch_size, 3, image_size, image_size, dtype=torch.uint8)
                measured = None if is_too_long else 1000 * measure(partial(run, images), config.seconds) / batch_size
                folder.add_result(name, measured)
                known[name] = measured
            ms = known[name] or ms
        print(f"{key}, {runtime}: {ms:.2f} ms per image at the largest batch size measured", flush=True)
