"""Frameworks then and now (page 39 of the lecture): the lecture's calls today, and its net by four means.

Our notes of page 39 say that frameworks are compared there, and not how. So this study compares what can be checked:
which of the lecture's calls the installed torch still has, and the time of one forward pass of the net of page 42.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

from convoy.options import option
from trainer.errors import ConfigError
from trainer.models import Classifier
from trainer.models.lecture import LectureNet
from trainer.ranks.world import World
from trainer.report.figures import LIGHT
from trainer.studies.folder import StudyFolder
from trainer.studies.latency import Runtime, measure, prepare
from trainer.studies.page import CaptionedFigure, Cell, Column, Page, Table, write_page
from trainer.studies.plots import finish_axes, new_figure

IMAGE_SIZE = 32
Floats = npt.NDArray[np.float32]
RUNTIMES: dict[Runtime, str] = {"eager": "PyTorch", "torchscript": "TorchScript", "onnxruntime": "ONNX Runtime"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameworksConfig:
    """Checks the lecture's calls in today's torch; times its net in PyTorch, TorchScript, ONNX Runtime and NumPy."""

    batch_size: int = 16
    """Images of a forward pass."""
    seconds: float = 1.0
    """Time to measure each."""
    run_dir: Annotated[Path | None, option("PATH", "runs/study-frameworks-TIME")] = None
    """Folder of this study."""


def study_frameworks(config: FrameworksConfig) -> None:
    """Runs `python -m trainer study frameworks`.

    Raises:
        ConfigError: a value is out of range.
    """
    if config.batch_size < 1 or config.seconds <= 0:
        raise ConfigError("--batch-size must be at least 1, --seconds more than 0")
    with World.join("cpu") as world, StudyFolder.open("frameworks", config, world) as folder:
        if world.is_main:
            page = make_page(check_calls(), *time_forward(config.batch_size, config.seconds), config.batch_size)
            write_page(folder, page)


def check_calls() -> list[tuple[str, bool, str]]:
    """Returns the lecture's calls, whether the installed packages still have them, and what replaces them."""
    from torch.autograd import Variable
    from torchvision.datasets import MNIST

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variable = Variable(torch.ones(1))
    is_tensor = type(variable) is torch.Tensor
    return [
        ("torch.gels(b, A) (page 48)", hasattr(torch, "gels"), "torch.linalg.lstsq(A, b)"),
        ("Variable(tensor)", True, "the tensor itself" + (", which Variable returns" if is_tensor else "")),
        ("MNIST(…).train_data", "train_data" in vars(MNIST), "MNIST(…).data"),
        ("MNIST(…).train_labels", "train_labels" in vars(MNIST), "MNIST(…).targets"),
    ]


def time_forward(batch_size: int, seconds: float) -> tuple[dict[str, float], float]:
    """Returns the seconds of a forward pass by each means, and the largest difference of NumPy's logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = LectureNet(num_channels=3, image_size=IMAGE_SIZE, num_classes=10)
        images = torch.randint(256, (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    model = Classifier(net, torch.full((3,), 120.0), torch.full((3,), 60.0)).eval()
    times = {}
    for runtime, name in RUNTIMES.items():
        work = prepare(runtime, model, IMAGE_SIZE)
        times[name] = measure(lambda work=work: work(images), seconds)  # type: ignore[misc]
    forward = numpy_forward(net)
    pixels = (images.numpy().astype(np.float32) - 120.0) / 60.0
    times["NumPy, by hand"] = measure(lambda: forward(pixels), seconds)
    with torch.inference_mode():
        gap = float((model(images) - torch.from_numpy(forward(pixels))).abs().max())
    return times, gap


def numpy_forward(net: LectureNet) -> Callable[[Floats], Floats]:
    """Returns the net's forward pass, of normalised images float32 `[B, C, H, W]`, in NumPy alone."""
    weights = {name: value.detach().numpy() for name, value in net.named_parameters()}

    def convolve(x: Floats, layer: str) -> Floats:
        kernel, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], axis=(2, 3))
        found: Floats = np.einsum("bchwij,ocij->bohw", windows, kernel, optimize=True) + bias[:, None, None]
        return found

    def pool(x: Floats, size: int) -> Floats:
        height, width = x.shape[2] // size, x.shape[3] // size
        tiles = x[:, :, : height * size, : width * size].reshape(*x.shape[:2], height, size, width, size)
        found: Floats = tiles.max(axis=(3, 5))
        return found

    def run(images: Floats) -> Floats:
        x = np.maximum(pool(convolve(images, "conv1"), 3), 0)
        x = np.maximum(pool(convolve(x, "conv2"), 2), 0).reshape(len(images), -1)
        x = np.maximum(x @ weights["fc1.weight"].T + weights["fc1.bias"], 0)
        logits: Floats = x @ weights["fc2.weight"].T + weights["fc2.bias"]
        return logits

    return run


def make_page(calls: list[tuple[str, bool, str]], times: dict[str, float], gap: float, batch_size: int) -> Page:
    """Returns the page."""
    rows: list[tuple[Cell, ...]] = [(name, "there" if is_there else "gone", now) for name, is_there, now in calls]
    gone = sum(not is_there for _, is_there, _ in calls)
    fastest = min(times, key=times.__getitem__)
    return Page(
        title="Frameworks, then and now",
        findings=[
            f"{gone} of {len(calls)} of the lecture's calls {'is' if gone == 1 else 'are'} gone from torch "
            f"{torch.__version__} and its torchvision; the others have other names today.",
            f"The net of page 42 on {batch_size} images of 3x{IMAGE_SIZE}x{IMAGE_SIZE}: {fastest} is the fastest here, "
            f"with {1000 * times[fastest]:.2f} ms. NumPy's logits differ from torch's by at most {gap:.1g}.",
        ],
        figures=[
            CaptionedFigure(
                name="times",
                title="One net, four means",
                caption=f"Milliseconds of a forward pass of {batch_size} images, on the CPU; medians.",
                draw=partial(_draw, times),
            )
        ],
        tables=[
            Table(
                name="calls",
                title="The lecture's calls",
                columns=(Column("then"), Column("today"), Column("instead")),
                rows=rows,
            ),
            Table(
                name="times",
                title="Forward pass",
                columns=(Column("by"), Column("ms", 3)),
                rows=[(name, 1000 * seconds) for name, seconds in times.items()],
            ),
        ],
        result={"seconds": times, "largest_difference": gap, "calls": {name: there for name, there, _ in calls}},
    )


def _draw(times: dict[str, float], *, narrow: bool) -> Figure:
    figure = new_figure(6.4, 2.4, narrow=narrow)
    axes = figure.subplots()
    names = list(times)[::-1]
    values = [1000 * times[name] for name in names]
    axes.barh(names, values, color=LIGHT["train"], height=0.55)
    for place, value in enumerate(values):
        axes.annotate(f" {value:.2f}", (value, place), va="center", color=LIGHT["ink"])
    axes.set(xlim=(0, 1.15 * max(values)), xlabel="milliseconds")
    finish_axes(axes, "x")
    return figure
