"""Under-fitting and over-fitting (pages 46 to 51 of the lecture): polynomials by degree, a network by width."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F

from convoy.options import option
from trainer.data import ImageSet, load_dataset
from trainer.data.order import generator
from trainer.data.split import stratified_split
from trainer.errors import ConfigError
from trainer.paths import default_data_dir
from trainer.ranks.world import World
from trainer.studies.capacity_page import NetworkErrors, PolynomialErrors, make_page
from trainer.studies.folder import StudyFolder
from trainer.studies.page import write_page

MAX_DEGREE = 9
NUM_TEST_POINTS = 10_000
NUM_HELD_OUT = 2_000
"""Training images of mnist-mini that serve as new images: a study needs no test image."""
_BATCH_SIZE = 50
_LR, _MOMENTUM = 0.03, 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityConfig:
    """Fits polynomials of degree 0 to 9 to noisy points, and networks of rising width to images with wrong labels."""

    num_points: int = 14
    """Points that a polynomial is fitted to."""
    noise: float = 0.15
    """Standard deviation of the points around the true function."""
    repeats: int = 200
    """Draws of points that errors are averaged over; the figure shows the first."""
    seed: int = 0
    """Seed of the points, the images, the wrong labels and the initial weights."""
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Hidden units of the networks."""
    num_images: int = 500
    """Images of mnist-mini that a network is trained on."""
    label_noise: float = 0.15
    """Share of those images that get a random label."""
    network_repeats: int = 3
    """Networks of each width, from different initial weights."""
    epochs: int = 120
    """Epochs of a network's training."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Folder in which data sets are kept."""
    run_dir: Annotated[Path | None, option("PATH", "runs/study-capacity-TIME")] = None
    """Folder of this study; an existing one is continued."""


def study_capacity(config: CapacityConfig) -> None:
    """Runs `python -m trainer study capacity`. The ranks of torchrun share the networks.

    Raises:
        ConfigError: a value is out of range.
    """
    _check(config)
    with World.join("cpu") as world, StudyFolder.open("capacity", config, world) as folder:
        torch.set_num_threads(1)  # the networks are too small for several threads
        if world.is_main:
            print(_describe(config, folder), flush=True)
        polynomials = fit_polynomials(config.num_points, config.noise, config.repeats, config.seed)
        networks = _train_networks(config, folder, world)
        if world.is_main:
            write_page(folder, make_page(polynomials, networks, config.label_noise))


def _check(config: CapacityConfig) -> None:
    if config.num_points < 2 or config.repeats < 1 or config.network_repeats < 1 or config.epochs < 1:
        raise ConfigError("--num-points must be at least 2, --repeats, --network-repeats and --epochs at least 1")
    if not (0 <= config.label_noise <= 1 and 0 <= config.noise < math.inf):
        raise ConfigError("--label-noise must lie between 0 and 1, --noise must be a number and not negative")
    if not config.widths or min(config.widths) < 1:
        raise ConfigError("--widths must be one or more numbers of at least 1")


def _describe(config: CapacityConfig, folder: StudyFolder) -> str:
    number = len(config.widths) * config.network_repeats
    return (
        f"{number} networks with {min(config.widths)} to {max(config.widths)} hidden units, each trained on "
        f"{config.num_images} images for {config.epochs} epochs; results in {folder.path}"
    )


def true_function(x: torch.Tensor) -> torch.Tensor:
    """Returns the function that the points are drawn from: on [0, 1], with values between -0.5 and 1.5."""
    return 0.5 + torch.cos(7.0 * x) * (1 - 0.6 * x) * 0.9


def vandermonde(x: torch.Tensor, degree: int) -> torch.Tensor:
    """Returns the powers 0 to `degree` of each x, float64 `[N, degree + 1]`."""
    return x[:, None] ** torch.arange(degree + 1)


def fit_polynomial(x: torch.Tensor, y: torch.Tensor, degree: int) -> torch.Tensor:
    """Returns the coefficients of least squares, float64 `[degree + 1]`; of smallest norm if they are not unique.

    The lecture's code calls `torch.gels`, which torch has removed; `torch.linalg.lstsq` replaces it.
    """
    solution: torch.Tensor = torch.linalg.lstsq(vandermonde(x, degree), y[:, None], driver="gelsd").solution
    return solution[:, 0]


def first_points(num_points: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x and y of the first draw of points, float64 `[num_points]`."""
    stream = generator("capacity-points", seed)
    _test_points(noise, stream)  # drawn before them
    return _points(num_points, noise, stream)


def _points(number: int, noise: float, stream: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(number, dtype=torch.float64, generator=stream)
    return x, true_function(x) + noise * torch.randn(number, dtype=torch.float64, generator=stream)


def _test_points(noise: float, stream: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(0, 1, NUM_TEST_POINTS, dtype=torch.float64)
    return x, true_function(x) + noise * torch.randn(NUM_TEST_POINTS, dtype=torch.float64, generator=stream)


def fit_polynomials(num_points: int, noise: float, repeats: int, seed: int) -> PolynomialErrors:
    """Returns mean square errors by degree, on the points and on many new ones, for `repeats` draws of points."""
    stream = generator("capacity-points", seed)
    test_x, test_y = _test_points(noise, stream)
    train, test = torch.zeros(repeats, MAX_DEGREE + 1), torch.zeros(repeats, MAX_DEGREE + 1)
    first: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]] | None = None
    for repeat in range(repeats):
        x, y = _points(num_points, noise, stream)
        fitted = [fit_polynomial(x, y, degree) for degree in range(MAX_DEGREE + 1)]
        for degree, coefficients in enumerate(fitted):
            train[repeat, degree] = (vandermonde(x, degree) @ coefficients - y).square().mean()
            test[repeat, degree] = (vandermonde(test_x, degree) @ coefficients - test_y).square().mean()
        first = first or (x, y, fitted)
    assert first is not None
    grid = test_x[:: NUM_TEST_POINTS // 400]
    return PolynomialErrors(
        x=first[0],
        y=first[1],
        grid=grid,
        truth=true_function(grid),
        curves=[vandermonde(grid, degree) @ coefficients for degree, coefficients in enumerate(first[2])],
        train=train,
        test=test,
        noise=noise,
    )


def _train_networks(config: CapacityConfig, folder: StudyFolder, world: World) -> NetworkErrors:
    """Trains the networks that the folder has no result for; returns the errors of all."""
    dataset = load_dataset("mnist-mini", config.data_dir, log=lambda line: None)
    rest, held_out = stratified_split(dataset.train.labels, NUM_HELD_OUT, config.seed)
    if config.num_images > len(rest):
        raise ConfigError(f"--num-images {config.num_images}: mnist-mini has at most {len(rest)} for this study")
    chosen = rest[torch.randperm(len(rest), generator=generator("capacity-images", config.seed))[: config.num_images]]
    labels = _randomize_labels(dataset.train.labels[chosen], config.label_noise, config.seed)
    train = ImageSet(_standardize(dataset.train.take(chosen)), labels)
    test = ImageSet(_standardize(dataset.train.take(held_out)), dataset.train.labels[held_out])
    known = world.broadcast_object(folder.results() if world.is_main else {})
    jobs = {
        f"width {width}, repeat {repeat}": (width, repeat)
        for width in config.widths
        for repeat in range(config.network_repeats)
    }
    todo = [key for key in jobs if key not in known]
    for start in range(0, len(todo), world.size):
        result = None
        if start + world.rank < len(todo):
            key = todo[start + world.rank]
            width, repeat = jobs[key]
            result = key, train_network(train, test, width=width, epochs=config.epochs, seed=config.seed + repeat)
        # Gathered after each network, so that an interruption loses at most one for each rank.
        for key, errors in filter(None, world.all_gather_object(result)):
            known[key] = errors
            if world.is_main:
                folder.add_result(key, errors)
                print(f"{key}: training error {100 * errors[0]:.1f} %, ", end="")
                print(f"error on new images {100 * errors[1]:.1f} %", flush=True)
    table = torch.tensor([known[key] for key in jobs], dtype=torch.float64)
    by_width = table.view(len(config.widths), config.network_repeats, 2)
    return NetworkErrors(widths=config.widths, train=by_width[..., 0], test=by_width[..., 1])


def train_network(train: ImageSet, test: ImageSet, *, width: int, epochs: int, seed: int) -> tuple[float, float]:
    """Trains a network with one hidden layer by SGD with momentum.

    Args:
        train: images float32 `[N, pixels]`.
        test: images float32 `[N, pixels]`.
        width: number of hidden units.

    Returns:
        The shares of misclassified images of `train` and of `test`.
    """
    stream = generator("capacity-weights", seed)
    num_pixels = train.images.shape[1]
    weights = [
        torch.randn(num_pixels, width, generator=stream) * (1 / num_pixels) ** 0.5,
        torch.zeros(width),
        torch.randn(width, 10, generator=stream) * (1 / width) ** 0.5,
        torch.zeros(10),
    ]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=stream)
        for batch in order.split(_BATCH_SIZE):
            loss = F.cross_entropy(_forward(weights, train.images[batch]), train.labels[batch])
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, momentum, gradient in zip(weights, momenta, gradients, strict=True):
                    momentum.mul_(_MOMENTUM).add_(gradient)
                    weight.sub_(_LR * (1 - epoch / epochs) * momentum)
    with torch.no_grad():
        predicted = [_forward(weights, images.images).argmax(dim=1) for images in (train, test)]
    errors = [float((p != images.labels).float().mean()) for p, images in zip(predicted, (train, test), strict=True)]
    return errors[0], errors[1]


def _forward(weights: list[torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    # tanh: with one or two hidden units, a ReLU that dies would decide the result.
    hidden = torch.tanh(images @ weights[0] + weights[1])
    return hidden @ weights[2] + weights[3]


def _standardize(images: torch.Tensor) -> torch.Tensor:
    """Returns uint8 `[N, 1, H, W]` as float32 `[N, pixels]` of about mean 0 and standard deviation 1."""
    return (images.flatten(1).float() - 33.0) / 79.0


def _randomize_labels(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    stream = generator("capacity-labels", seed)
    is_random = torch.rand(len(labels), generator=stream) < share
    return torch.where(is_random, torch.randint(10, (len(labels),), generator=stream), labels)
