"""What accuracy costs (page 37 of the lecture, after Canziani et al. 2016): multiply-adds, parameters, time.

Accuracies of the ImageNet-size networks are torchvision's published ones, read from its metadata without a download;
those of our small-image networks come from the finished runs beside this study. Times are measured here, with random
weights, which cost the same.
"""

import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from trainer.data.datasets import named_set
from trainer.errors import ConfigError
from trainer.evaluation.ledger import Ledger
from trainer.models import Classifier, build_network
from trainer.models.cost import Cost, count_cost
from trainer.models.originals import build_original
from trainer.ranks.world import World
from trainer.recipes import RECIPES
from trainer.report import figures
from trainer.studies.folder import StudyFolder
from trainer.studies.page import write_page
from trainer.studies.zoo_page import ZooEntry, make_page

Runtime = Literal["eager", "torchscript", "onnxruntime"]
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
"""Names of networks, or of a recipe where the network has widths to choose."""
_ORIGINAL_SIZES = {"inception_v3": 299}
_MIN_REPEATS, _MAX_REPEATS, _MAX_WARM_UPS = 3, 50, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooConfig:
    """Accuracy against multiply-adds and parameters, and time an image by batch size and runtime."""

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Images a forward pass."""
    runtimes: tuple[Runtime, ...] = ("eager", "torchscript", "onnxruntime")
    """What computes."""
    originals: tuple[str, ...] = _ORIGINALS
    """torchvision's networks to measure; all have their accuracy and cost shown."""
    small: tuple[str, ...] = _SMALL
    """Our networks for 32x32 images to measure."""
    seconds: float = 1.0
    """How long to measure each, at least three passes."""
    limit_s: float = 15.0
    """Batches whose pass would take longer than this are left out."""
    runs: Path = Path("runs")
    """Where finished runs are, for the accuracies of our networks on CIFAR-10."""
    run_dir: Path | None = None
    """Folder of this study; an existing one is continued. [default: runs/study-zoo-TIME]"""


def study_zoo(config: ZooConfig) -> None:
    """`python -m trainer study zoo`.

    Raises:
        ConfigError: an unknown network, or a batch size that makes no sense.
    """
    _check(config)
    with (
        World.join("cpu") as world,
        figures.style(),
        StudyFolder.enter("zoo", config, config.run_dir, world) as folder,
    ):
        if not world.is_main:
            return  # times of several at once would be nobody's
        originals = [_original_entry(name) for name in _ORIGINALS]
        finished = _finished(config.runs)
        small = [_small_entry(name, finished) for name in _SMALL]
        num_looks = len(Ledger(config.runs / "ledger.jsonl").entries(named_set("cifar10").sha256))
        for name in config.originals:
            size = _ORIGINAL_SIZES.get(name, 224)
            _measure_all(folder, config, f"original {name}", partial(build_original, name), size)
        for name in config.small:
            _measure_all(folder, config, f"small {name}", partial(_build_small, name), 32)
        times = {key: value for key, value in folder.results().items() if value is not None}
        print(f"report: {write_page(folder, make_page(originals, small, num_looks, times, list(config.runtimes)))}")


def _check(config: ZooConfig) -> None:
    for kind, asked, known in (("original", config.originals, _ORIGINALS), ("small", config.small, _SMALL)):
        for name in asked:
            if name not in known:
                raise ConfigError(f"--{kind} {name}: there are {', '.join(known)}")
    if not config.batch_sizes or min(config.batch_sizes) < 1 or list(config.batch_sizes) != sorted(config.batch_sizes):
        raise ConfigError("--batch-sizes must be rising numbers of at least 1")


def _original_entry(name: str) -> ZooEntry:
    from torchvision import models

    meta = models.get_model_weights(name)["IMAGENET1K_V1"].meta
    cost = count_cost(lambda: build_original(name), num_channels=3, image_size=_ORIGINAL_SIZES.get(name, 224))
    return ZooEntry(name=name, cost=cost, accuracy=meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100)


def _finished(runs: Path) -> list[dict[str, Any]]:
    """The results of all finished runs on CIFAR-10, those inside of studies of seeds included."""
    found = []
    for path in sorted([*runs.glob("*/result.json"), *runs.glob("*/seed-*/result.json")]):
        try:
            result: dict[str, Any] = json.loads(path.read_text())
        except ValueError:
            continue
        if result.get("dataset") == "cifar10" and "test_accuracy" in result:
            found.append(result)
    return found


def _small_entry(name: str, finished: list[dict[str, Any]]) -> ZooEntry:
    """With the median test accuracy of all its finished runs, whatever their seeds and settings."""
    mine = [result for result in finished if name in (result["model"], result["recipe"])]
    accuracy = statistics.median(float(result["test_accuracy"]) for result in mine) if mine else None
    epochs = dict.fromkeys(_epochs(result) for result in mine)
    return ZooEntry(
        name=name, cost=_small_cost(name), accuracy=accuracy, num_runs=len(mine), epochs="; ".join(epochs) or None
    )


def _epochs(result: dict[str, Any]) -> str:
    recipe = RECIPES.get(result["recipe"])
    if recipe is None or result["epochs"] >= recipe.epochs:
        return str(result["epochs"])
    return f"{result['epochs']}, fewer epochs than the recipe's {recipe.epochs}"


def _small_cost(name: str) -> Cost:
    return count_cost(lambda: _build_small(name), num_channels=3, image_size=32)


def _build_small(name: str) -> nn.Module:
    network, widths = (RECIPES[name].network, RECIPES[name].widths) if name in RECIPES else (name, ())
    return build_network(network, num_channels=3, image_size=32, num_classes=10, widths=widths)


def _measure_all(
    folder: StudyFolder, config: ZooConfig, key: str, build: Callable[[], nn.Module], image_size: int
) -> None:
    """Measure a network in each runtime and batch size that has no result yet."""
    known = folder.results()
    todo = [runtime for runtime in config.runtimes if f"{key} {runtime} {config.batch_sizes[-1]}" not in known]
    if not todo:
        return
    torch.manual_seed(0)
    model = Classifier(build(), torch.full((3,), 120.0), torch.full((3,), 60.0)).eval()
    for runtime in todo:
        predict = _PREPARE[runtime](model, image_size)
        last_s = 0.0
        for batch_size in config.batch_sizes:
            name = f"{key} {runtime} {batch_size}"
            if name in known:
                last_s = (known[name] or 0) * batch_size / 1000
                continue
            if 2 * last_s > config.limit_s:
                folder.add(name, None)
                continue
            images = torch.zeros(batch_size, 3, image_size, image_size, dtype=torch.uint8)
            last_s = _measure(partial(predict, images), config.seconds)
            folder.add(name, 1000 * last_s / batch_size)
        print(f"{key}, {runtime}: measured, up to batch {batch_size} in {last_s:.3f} s a pass", flush=True)


def _measure(work: Callable[[], object], seconds: float) -> float:
    """The median seconds of a pass, after the first ones, in which TorchScript still specialises its code."""
    began = time.perf_counter()
    for _ in range(_MAX_WARM_UPS):
        work()
        if time.perf_counter() - began > seconds:
            break
    took: list[float] = []
    while len(took) < _MIN_REPEATS or (sum(took) < seconds and len(took) < _MAX_REPEATS):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


Predict = Callable[[torch.Tensor], object]


def _eager(model: Classifier, image_size: int) -> Predict:
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # `to` would change it for the next runtime too

    def predict(images: torch.Tensor) -> object:
        with torch.inference_mode():
            return model(images)

    return predict


def _torchscript(model: Classifier, image_size: int) -> Predict:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and says so at each step
        example = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
        traced = torch.jit.freeze(torch.jit.trace(model, (example,)))

    def predict(images: torch.Tensor) -> object:
        with torch.inference_mode():
            return traced(images)

    return predict


def _onnxruntime(model: Classifier, image_size: int) -> Predict:
    import onnxruntime

    example = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        dynamic = {"pixels": {0: torch.export.Dim("batch")}}
        torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})


_PREPARE: dict[Runtime, Callable[[Classifier, int], Predict]] = {
    "eager": _eager,
    "torchscript": _torchscript,
    "onnxruntime": _onnxruntime,
}
