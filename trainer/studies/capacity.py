"""Under-fitting and over-fitting (pages 46 to 51 of the lecture): polynomials by degree, a network by width."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from trainer.data import ImageSet, load_dataset, split_validation
from trainer.data.order import generator
from trainer.errors import ConfigError
from trainer.paths import default_data_dir
from trainer.ranks.world import World
from trainer.report import figures
from trainer.studies.capacity_page import NetworkErrors, PolynomialErrors, make_page
from trainer.studies.folder import StudyFolder
from trainer.studies.page import write_page

MAX_DEGREE = 9
NUM_TEST_POINTS = 10_000
NUM_HELD_OUT = 2_000
"""Images that no width is taught; training images of mnist-mini, because a study needs no look at test images."""
_BATCH_SIZE = 50
_LR, _MOMENTUM = 0.03, 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityConfig:
    """Fit polynomials of degree 0 to 9 to noisy points, and networks of rising width to images with wrong labels."""

    num_points: int = 14
    """Points that a polynomial is fitted to."""
    noise: float = 0.15
    """Standard deviation of the points around the true curve."""
    repeats: int = 200
    """Draws of points over which errors are averaged; the first is the one drawn."""
    seed: int = 0
    """Of the points, the images, the wrong labels and the initial weights."""
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Hidden units of the networks."""
    num_images: int = 500
    """Images of mnist-mini that a network is taught."""
    label_noise: float = 0.15
    """Share of those that get a random label."""
    network_repeats: int = 3
    """Networks of each width, from different initial weights."""
    epochs: int = 120
    """Of a network's training."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Where data sets are kept."""
    run_dir: Path | None = None
    """Folder of this study; an existing one is continued. [default: runs/study-capacity-TIME]"""


def study_capacity(config: CapacityConfig) -> None:
    """`python -m trainer study capacity`. Widths are shared out over the ranks of torchrun.

    Raises:
        ConfigError: a value that makes no sense.
    """
    _check(config)
    with (
        World.join("cpu") as world,
        figures.style(),
        StudyFolder.enter("capacity", config, config.run_dir, world) as folder,
    ):
        torch.set_num_threads(1)  # the networks are too small to be shared by threads
        polynomials = fit_polynomials(config.num_points, config.noise, config.repeats, config.seed)
        networks = _train_networks(config, folder, world)
        if world.is_main:
            print(f"report: {write_page(folder, make_page(polynomials, networks, config.label_noise))}")


def _check(config: CapacityConfig) -> None:
    if config.num_points < 2 or config.repeats < 1 or config.network_repeats < 1 or config.epochs < 1:
        raise ConfigError("--num-points must be at least 2, --repeats, --network-repeats and --epochs at least 1")
    if not (0 <= config.label_noise <= 1 and 0 <= config.noise < math.inf):
        raise ConfigError("--label-noise must lie between 0 and 1, --noise must be a number and not negative")
    if not config.widths or min(config.widths) < 1:
        raise ConfigError("--widths must be one or more numbers of at least 1")


def true_curve(x: torch.Tensor) -> torch.Tensor:
    """The curve that the points come from: on [0, 1], with values between -0.5 and 1.5 as in the lecture."""
    return 0.5 + torch.cos(7.0 * x) * (1 - 0.6 * x) * 0.9


def powers(x: torch.Tensor, degree: int) -> torch.Tensor:
    """The Vandermonde matrix, float64 `[N, degree + 1]`: powers 0 to degree of x, without a loop over n."""
    return x[:, None] ** torch.arange(degree + 1)


def fit_polynomial(x: torch.Tensor, y: torch.Tensor, degree: int) -> torch.Tensor:
    """Coefficients float64 `[degree + 1]` of least squares (of smallest norm where the points leave a choice).

    The lecture's code calls `torch.gels`, which is gone from torch; this is today's name of it.
    """
    solution: torch.Tensor = torch.linalg.lstsq(powers(x, degree), y[:, None], driver="gelsd").solution
    return solution[:, 0]


def fit_polynomials(num_points: int, noise: float, repeats: int, seed: int) -> PolynomialErrors:
    """Mean square errors by degree on the points and on many new ones, over `repeats` draws of points."""
    stream = generator("capacity-points", seed)
    test_x = torch.linspace(0, 1, NUM_TEST_POINTS, dtype=torch.float64)
    test_y = true_curve(test_x) + noise * torch.randn(NUM_TEST_POINTS, dtype=torch.float64, generator=stream)
    train, test = torch.zeros(repeats, MAX_DEGREE + 1), torch.zeros(repeats, MAX_DEGREE + 1)
    first: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]] | None = None
    for repeat in range(repeats):
        x = torch.rand(num_points, dtype=torch.float64, generator=stream)
        y = true_curve(x) + noise * torch.randn(num_points, dtype=torch.float64, generator=stream)
        fitted = [fit_polynomial(x, y, degree) for degree in range(MAX_DEGREE + 1)]
        for degree, coefficients in enumerate(fitted):
            train[repeat, degree] = (powers(x, degree) @ coefficients - y).square().mean()
            test[repeat, degree] = (powers(test_x, degree) @ coefficients - test_y).square().mean()
        first = first or (x, y, fitted)
    assert first is not None
    grid = test_x[:: NUM_TEST_POINTS // 400]
    return PolynomialErrors(
        x=first[0],
        y=first[1],
        grid=grid,
        truth=true_curve(grid),
        curves=[powers(grid, degree) @ coefficients for degree, coefficients in enumerate(first[2])],
        train=train,
        test=test,
        noise=noise,
    )


def _train_networks(config: CapacityConfig, folder: StudyFolder, world: World) -> NetworkErrors:
    """Errors by width and repeat; what an earlier sitting found is not computed again."""
    dataset = load_dataset("mnist-mini", config.data_dir, say=lambda line: None)
    rest, held_out = split_validation(dataset.train, NUM_HELD_OUT, config.seed)
    if config.num_images > len(rest):
        raise ConfigError(f"--num-images {config.num_images}: mnist-mini leaves {len(rest)}")
    taught = rest[torch.randperm(len(rest), generator=generator("capacity-images", config.seed))[: config.num_images]]
    labels = _with_wrong_labels(dataset.train.labels[taught], config.label_noise, config.seed)
    train = ImageSet(_flat(dataset.train.images[taught]), labels)
    test = ImageSet(_flat(dataset.train.images[held_out]), dataset.train.labels[held_out])
    known = world.broadcast_object(folder.results() if world.is_main else {})
    jobs = {
        f"width {width}, repeat {repeat}": (width, repeat)
        for width in config.widths
        for repeat in range(config.network_repeats)
    }
    todo = [key for key in jobs if key not in known]
    for start in range(0, len(todo), world.size):
        found = None
        if start + world.rank < len(todo):
            key = todo[start + world.rank]
            width, repeat = jobs[key]
            found = key, train_network(train, test, width=width, epochs=config.epochs, seed=config.seed + repeat)
        # After each round, so that the main rank, which alone writes, keeps the others' too.
        for key, shares in filter(None, world.all_gather_object(found)):
            known[key] = shares
            if world.is_main:
                folder.add(key, shares)
                print(f"{key}: wrong on {100 * shares[0]:.1f} % of what it was taught, ", end="")
                print(f"{100 * shares[1]:.1f} % of new images", flush=True)
    table = torch.tensor([known[key] for key in jobs], dtype=torch.float64)
    errors = table.view(len(config.widths), config.network_repeats, 2)
    return NetworkErrors(widths=config.widths, train=errors[..., 0], test=errors[..., 1])


def train_network(train: ImageSet, test: ImageSet, *, width: int, epochs: int, seed: int) -> tuple[float, float]:
    """One hidden layer of that width, plain SGD with momentum: shares of wrong answers on `train` and on `test`."""
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
            loss = F.cross_entropy(_answer(weights, train.images[batch]), train.labels[batch])
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, momentum, gradient in zip(weights, momenta, gradients, strict=True):
                    momentum.mul_(_MOMENTUM).add_(gradient)
                    weight.sub_(_LR * (1 - epoch / epochs) * momentum)
    with torch.no_grad():
        wrong = [
            float((_answer(weights, part.images).argmax(dim=1) != part.labels).float().mean()) for part in (train, test)
        ]
    return wrong[0], wrong[1]


def _answer(weights: list[torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    # tanh, because of two ReLUs one dies now and then, and the narrowest widths would be about luck.
    hidden = torch.tanh(images @ weights[0] + weights[1])
    return hidden @ weights[2] + weights[3]


def _flat(images: torch.Tensor) -> torch.Tensor:
    """uint8 `[N, 1, H, W]` as float32 `[N, pixels]` of about mean 0 and deviation 1."""
    return (images.flatten(1).float() - 33.0) / 79.0


def _with_wrong_labels(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    stream = generator("capacity-labels", seed)
    chosen = torch.rand(len(labels), generator=stream) < share
    return torch.where(chosen, torch.randint(10, (len(labels),), generator=stream), labels)
