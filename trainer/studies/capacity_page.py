"""The capacity study's figures, tables and findings."""

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from trainer.report.figures import LIGHT
from trainer.studies.page import Page, Picture, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class PolynomialErrors:
    """Polynomials fitted to points.

    Args:
        x, y: float64 `[N]`, the first draw's points.
        grid: float64 `[G]`, where the curves are evaluated.
        truth: float64 `[G]`, the true curve there.
        curves: by degree, float64 `[G]`, fitted to the first draw.
        train, test: float32 `[repeats, degrees]`, mean square errors.
        noise: deviation around the true curve; its square is the error that nothing can avoid.
    """

    x: torch.Tensor
    y: torch.Tensor
    grid: torch.Tensor
    truth: torch.Tensor
    curves: list[torch.Tensor]
    train: torch.Tensor
    test: torch.Tensor
    noise: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkErrors:
    """Shares of wrong answers, float64 `[widths, repeats]`."""

    widths: tuple[int, ...]
    train: torch.Tensor
    test: torch.Tensor


def make_page(polynomials: PolynomialErrors, networks: NetworkErrors, label_noise: float) -> Page:
    """Everything that the study says."""
    train, test = polynomials.train.median(dim=0).values, polynomials.test.median(dim=0).values
    best_degree = int(test.argmin())
    network_train, network_test = networks.train.mean(dim=1), networks.test.mean(dim=1)
    overfits = float(test[-1]) > 1.05 * float(test.min())
    rise = f" and rises to {test[-1]:.2g} at degree {len(test) - 1}" if overfits else ""
    repeats = len(polynomials.train)
    return Page(
        title="Capacity: under-fitting and over-fitting",
        findings=[
            f"The error on the points always falls with the degree, from {train[0]:.3f} to {train[-1]:.2g}; on "
            f"new points it is least at degree {best_degree} ({test[best_degree]:.3f}){rise}.",
            _about_networks(networks, label_noise),
            f"Errors of polynomials are medians of {repeats} draws of points. New images are training images of "
            "mnist-mini set aside: no test image was looked at.",
        ],
        pictures=[
            Picture(
                name="polynomials",
                title="Polynomials of degree 0 to 9",
                text="The same points and the true curve they come from, with the polynomial of least squares of each "
                "degree: too stiff at first, close to the truth between, and bent towards single points in the end.",
                figure=_draw_polynomials(polynomials),
            ),
            Picture(
                name="errors-by-degree",
                title="Error by degree",
                text="Mean square error on the points that were fitted and on new ones, by degree, logarithmic axis; "
                "medians, with the middle half of the draws as bands.",
                figure=_draw_errors_by_degree(polynomials),
            ),
            Picture(
                name="errors-by-width",
                title="The same for a network, by width",
                text="Share of wrong answers on the images that were taught, some of them with wrong labels, and on "
                "new images, by the number of hidden units; a line through the means, a dot for each network.",
                figure=_draw_errors_by_width(networks),
            ),
        ],
        tables=[
            Table(
                name="polynomials",
                title="Polynomials, mean square errors (medians)",
                header=("degree", "on the points", "on new points"),
                rows=[(degree, float(train[degree]), float(test[degree])) for degree in range(len(test))],
            ),
            Table(
                name="networks",
                title="Networks, errors in % (means)",
                header=("hidden units", "on what was taught", "on new images"),
                rows=[
                    (width, 100 * float(a), 100 * float(b))
                    for width, a, b in zip(networks.widths, network_train, network_test, strict=True)
                ],
            ),
        ],
        result={
            "best_degree": best_degree,
            "train_mse": train.tolist(),
            "test_mse": test.tolist(),
            "widths": list(networks.widths),
            "train_error": network_train.tolist(),
            "new_error": network_test.tolist(),
        },
    )


def _about_networks(networks: NetworkErrors, label_noise: float) -> str:
    """What the widths show, and no more than that: with few epochs nothing is learnt by heart."""
    train, test, widths = networks.train.mean(dim=1), networks.test.mean(dim=1), networks.widths
    best = int(test.argmin())
    by_heart = float(train[-1]) < label_noise / 2
    learns = "learns labels by heart" if by_heart else "does not learn labels by heart here"
    found = (
        f"A network with one hidden layer {learns}, of which {100 * label_noise:.0f} % were drawn at random: "
        f"{100 * train[0]:.0f} % errors on what it was taught at width {widths[0]}, {100 * train[-1]:.1f} % at "
        f"{widths[-1]}. Errors on new images, rightly labelled, "
    )
    if best == 0:
        return f"{found}are least at width {widths[0]}, {100 * test[0]:.1f} %."
    found += f"fall from {100 * test[0]:.0f} to {100 * test[best]:.1f} % at width {widths[best]}"
    if float(test[-1] - test.min()) > 0.01:
        return f"{found}, and rise again to {100 * test[-1]:.1f} % at {widths[-1]}."
    if by_heart:
        return (
            f"{found}, and, unlike the polynomials', do not rise again with more: a network that can learn anything by "
            "heart need not be a bad one."
        )
    return f"{found}."


def _draw_polynomials(errors: PolynomialErrors) -> Figure:
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for degree, axes in enumerate(figure.subplots(2, 5, sharex=True, sharey=True).flat):
        axes.plot(errors.grid, errors.truth, color=LIGHT["muted"], linewidth=1, linestyle=(0, (3, 3)), label="truth")
        axes.plot(errors.grid, errors.curves[degree], color=LIGHT["wrong"], label="fitted")
        axes.scatter(errors.x, errors.y, s=12, color=LIGHT["train"], linewidths=0, zorder=3, label="points")
        axes.set_title(f"degree {degree}", size=9)
        axes.set(xlim=(0, 1), ylim=(-0.75, 1.75), xticks=[0, 0.5, 1], yticks=[-0.5, 0.5, 1.5])
        axes.set_xticklabels(["0", "0.5", "1"])
        axes.tick_params(length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _draw_errors_by_degree(errors: PolynomialErrors) -> Figure:
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.subplots()
    degrees = list(range(errors.train.shape[1]))
    for values, name, colour, mark in (
        (errors.train, "on the points fitted", "train", "o"),
        (errors.test, "on new points", "wrong", "s"),
    ):
        low, middle, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75]), dim=0)
        axes.fill_between(degrees, low, high, color=LIGHT[colour], alpha=0.15, linewidth=0)
        axes.plot(degrees, middle, color=LIGHT[colour], marker=mark, label=name)
    if errors.noise > 0:
        axes.axhline(errors.noise**2, color=LIGHT["muted"], linewidth=0.9, linestyle=(0, (5, 4)))
        axes.text(9, errors.noise**2 * 0.94, "noise", ha="right", va="top", color=LIGHT["muted"], size=8.5)
    axes.set_yscale("log")
    top = 2 * float(errors.test.median(dim=0).values.max())
    axes.set_ylim(bottom=max(1e-4, float(errors.train.median(dim=0).values.min()) / 2), top=top)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xticks=degrees, xlabel="degree")
    axes.set_title("Mean square error")
    _finish(axes)
    axes.legend(loc="upper center")
    return figure


def _draw_errors_by_width(errors: NetworkErrors) -> Figure:
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.subplots()
    for values, name, colour, mark in (
        (errors.train, "on what was taught", "train", "o"),
        (errors.test, "on new images", "wrong", "s"),
    ):
        for column in values.T:
            axes.plot(errors.widths, 100 * column, color=LIGHT[colour], marker=".", linestyle="", alpha=0.45)
        axes.plot(errors.widths, 100 * values.mean(dim=1), color=LIGHT[colour], marker=mark, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks(errors.widths)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("hidden units")
    axes.set_title("Errors, %")
    _finish(axes)
    axes.legend()
    return figure


def _finish(axes: Axes) -> None:
    axes.grid(axis="y")
    axes.tick_params(which="both", length=0)
