"""A perceptron, and a network of shared weights that tells T from C (pages 9 to 12 of the lecture).

Our notes of the lecture name both in its history, without data. The points and the letters here are our own. A
perceptron learns points that a line separates, and exclusive or, which none does. A T and a C of five pixels, in four
orientations at every place of a small image, are told apart by shared 3x3 weights, and by weights of each place's own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from convoy.options import option
from trainer.data.order import generator
from trainer.errors import ConfigError
from trainer.ranks.world import World
from trainer.studies.folder import StudyFolder
from trainer.studies.page import write_page
from trainer.studies.perceptron_page import Letters, Points, make_page

T_SHAPE = ((1, 1, 1), (0, 1, 0), (0, 1, 0))
C_SHAPE = ((1, 1, 0), (1, 0, 0), (1, 1, 0))
IMAGE_SIZE = 8
MARGIN = 0.04
_BATCH_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PerceptronConfig:
    """Trains a perceptron on points in a plane, and two networks to tell a T from a C wherever it is."""

    num_points: int = 60
    """Points of the perceptron."""
    passes: int = 20
    """Passes of the perceptron over its points, at most."""
    filters: int = 8
    """Sets of 3x3 weights of the network that shares them."""
    epochs: int = 60
    """Epochs of the two networks."""
    seed: int = 0
    """Seed of the points, of their order, of the places to train on and of the initial weights."""
    run_dir: Annotated[Path | None, option("PATH", "runs/study-perceptron-TIME")] = None
    """Folder of this study."""


def study_perceptron(config: PerceptronConfig) -> None:
    """Runs `python -m trainer study perceptron`.

    Raises:
        ConfigError: a value is out of range.
    """
    if min(config.num_points, config.passes, config.filters, config.epochs) < 1:
        raise ConfigError("--num-points, --passes, --filters and --epochs must be at least 1")
    with World.join("cpu") as world, StudyFolder.open("perceptron", config, world) as folder:
        if not world.is_main:
            return  # one rank suffices
        torch.set_num_threads(1)  # the networks are too small for several threads
        separable = train_perceptron(*make_separable(config.num_points, config.seed), passes=config.passes)
        exclusive_or = train_perceptron(*make_exclusive_or(), passes=config.passes)
        letters = train_on_letters(filters=config.filters, epochs=config.epochs, seed=config.seed)
        write_page(folder, make_page(separable, exclusive_or, letters))


def make_separable(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns points float64 `[N, 2]`, none near a certain line, and their sides of it, -1 or 1."""
    stream = generator("perceptron-points", seed)
    points = 2 * torch.rand(20 * number, 2, dtype=torch.float64, generator=stream) - 1
    distance = points @ torch.tensor([0.8, 0.6], dtype=torch.float64) - 0.3
    far = distance.abs() > MARGIN
    return points[far][:number], distance[far][:number].sign()


def make_exclusive_or() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the four points of exclusive or, whose sides no line separates."""
    points = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.float64)
    return points, -points.prod(dim=1)


def train_perceptron(points: torch.Tensor, sides: torch.Tensor, *, passes: int) -> Points:
    """Adds each point that is on the wrong side to the weights, until a pass finds none.

    Args:
        points: float64 `[N, 2]`.
        sides: -1 or 1 `[N]`.
    """
    inputs = torch.cat([points, torch.ones(len(points), 1, dtype=points.dtype)], dim=1)
    weights = torch.zeros(3, dtype=points.dtype)
    mistakes: list[int] = []
    lines = []
    while len(mistakes) < passes and (not mistakes or mistakes[-1]):
        mistakes.append(0)
        for row, side in zip(inputs, sides, strict=True):
            if side * (weights @ row) <= 0:
                weights = weights + side * row
                mistakes[-1] += 1
        lines.append(weights)
    return Points(points=points, sides=sides, mistakes=mistakes, lines=torch.stack(lines))


def make_letters() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns all images float32 `[N, 1, 8, 8]`, their letters (0: T, 1: C) and their places, numbered."""
    images, letters, places = [], [], []
    num_places = IMAGE_SIZE - 2
    for letter, shape in enumerate((T_SHAPE, C_SHAPE)):
        for turns in range(4):
            pattern = torch.tensor(shape, dtype=torch.float32).rot90(turns)
            for place in range(num_places**2):
                y, x = divmod(place, num_places)
                image = torch.zeros(1, IMAGE_SIZE, IMAGE_SIZE)
                image[0, y : y + 3, x : x + 3] = pattern
                images.append(image)
                letters.append(letter)
                places.append(place)
    return torch.stack(images), torch.tensor(letters), torch.tensor(places)


class SharedNet(nn.Module):
    """The same 3x3 weights at every place; of each set the largest answer counts, wherever it is."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.filters = nn.Conv2d(1, filters, kernel_size=3)
        self.output = nn.Linear(filters, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output(F.relu(self.filters(images)).amax(dim=(2, 3)))
        return logits


def train_on_letters(*, filters: int, epochs: int, seed: int) -> Letters:
    """Trains both networks on the letters at half of the places; tests them at the other half."""
    images, letters, places = make_letters()
    stream = generator("perceptron-letters", seed)
    shown = torch.randperm(int(places.max()) + 1, generator=stream)[: (int(places.max()) + 1) // 2]
    is_shown = torch.isin(places, shown)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shared = SharedNet(filters)
        own = nn.Sequential(nn.Flatten(), nn.Linear(IMAGE_SIZE**2, 16), nn.ReLU(), nn.Linear(16, 2))
    curves = {}
    for name, network in (("shared", shared), ("own", own)):
        curves[name] = _train(network, images, letters, is_shown, epochs=epochs, stream=stream)
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in (("shared", shared), ("own", own))}
    return Letters(curves=curves, num_weights=counts, filters=shared.filters.weight.detach()[:, 0])


def _train(
    network: nn.Module,
    images: torch.Tensor,
    letters: torch.Tensor,
    is_shown: torch.Tensor,
    *,
    epochs: int,
    stream: torch.Generator,
) -> torch.Tensor:
    """Trains by Adam; returns the accuracies at shown and at other places after each epoch, float32 `[epochs, 2]`."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    known = torch.nonzero(is_shown)[:, 0]
    accuracies = torch.zeros(epochs, 2)
    for epoch in range(epochs):
        for batch in known[torch.randperm(len(known), generator=stream)].split(_BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), letters[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            right = (network(images).argmax(dim=1) == letters).float()
        accuracies[epoch] = torch.stack([right[is_shown].mean(), right[~is_shown].mean()])
    return accuracies
