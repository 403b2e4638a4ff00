"""The page of the capacity study: its figures, tables and findings."""

from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure

from trainer.report.figures import LIGHT
from trainer.studies.page import CaptionedFigure, Column, Page, Table
from trainer.studies.plots import finish_axes, new_figure, use_log_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class PolynomialErrors:
    """Polynomials fitted to points.

    Args:
        x, y: float64 `[N]`, the points of the first draw.
        grid: float64 `[G]`, where the curves are evaluated.
        truth: float64 `[G]`, the true function there.
        curves: by degree, float64 `[G]`, fitted to the first draw.
        train, test: float32 `[repeats, degrees]`, mean square errors on the points and on new ones.
        noise: standard deviation of the points around the true function; its square is the irreducible error.
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
    """Shares of misclassified images, float64 `[widths, repeats]`."""

    widths: tuple[int, ...]
    train: torch.Tensor
    test: torch.Tensor


def make_page(polynomials: PolynomialErrors, networks: NetworkErrors, label_noise: float) -> Page:
    """Returns the page."""
    # Not Tensor.median, which is the lower one of two middle values.
    train, test = polynomials.train.quantile(0.5, dim=0), polynomials.test.quantile(0.5, dim=0)
    network_train, network_test = networks.train.mean(dim=1), networks.test.mean(dim=1)
    return Page(
        title="Capacity: under-fitting and over-fitting",
        findings=[
            _about_polynomials(train, test),
            _about_networks(networks, label_noise),
            f"Errors of polynomials are medians of {len(polynomials.train):,} draws of points. New images are training "
            "images of mnist-mini that were set aside; no test image was used.",
        ],
        figures=_figures(polynomials, networks),
        tables=[
            Table(
                name="polynomials",
                title="Polynomials, mean square errors (medians)",
                columns=(Column("degree"), Column("on the points", 4), Column("on new points", 4)),
                rows=[(degree, float(train[degree]), float(test[degree])) for degree in range(len(test))],
            ),
            Table(
                name="networks",
                title="Networks, errors in % (means)",
                columns=(Column("hidden units"), Column("on training images", 1), Column("on new images", 1)),
                rows=[
                    (width, 100 * float(a), 100 * float(b))
                    for width, a, b in zip(networks.widths, network_train, network_test, strict=True)
                ],
            ),
        ],
        result={
            "best_degree": int(test.argmin()),
            "train_mse": train.tolist(),
            "test_mse": test.tolist(),
            "widths": list(networks.widths),
            "train_error": network_train.tolist(),
            "new_error": network_test.tolist(),
        },
    )


def _figures(polynomials: PolynomialErrors, networks: NetworkErrors) -> list[CaptionedFigure]:
    return [
        CaptionedFigure(
            name="polynomials",
            title="Polynomials of degree 0 to 9",
            caption="The same points and the true function, with the polynomial of least squares of each degree: "
            "too stiff at first, then close to the truth, and bent towards single points in the end.",
            draw=partial(_draw_polynomials, polynomials),
        ),
        CaptionedFigure(
            name="errors-by-degree",
            title="Error by degree",
            caption="Mean square error on the points that were fitted and on new ones, by degree, on a logarithmic "
            "axis: medians, and bands that hold the middle half of the draws.",
            draw=partial(_draw_errors_by_degree, polynomials),
        ),
        CaptionedFigure(
            name="errors-by-width",
            title="Error of a network by width",
            caption="Share of misclassified images, by the number of hidden units: training images, some of which "
            "have wrong labels, and new images. A line through the means, a dot for each network.",
            draw=partial(_draw_errors_by_width, networks),
        ),
    ]


def _about_polynomials(train: torch.Tensor, test: torch.Tensor) -> str:
    best = int(test.argmin())
    overfits = float(test[-1]) > 1.05 * float(test.min())
    rise = f" and rises to {test[-1]:.2g} at degree {len(test) - 1}" if overfits else ""
    return (
        f"The error on the points falls with every degree, from {train[0]:.3f} to {train[-1]:.2g}. On new points it is "
        f"smallest at degree {best} ({test[best]:.3f}){rise}."
    )


def _about_networks(networks: NetworkErrors, label_noise: float) -> str:
    """Describes these widths only: after few epochs, no network has memorised its labels."""
    train, test, widths = networks.train.mean(dim=1), networks.test.mean(dim=1), networks.widths
    best = int(test.argmin())
    memorizes = float(train[-1]) < label_noise / 2
    found = (
        f"A network with one hidden layer {'memorises' if memorizes else 'does not memorise'} its labels, of which "
        f"{100 * label_noise:.0f} % were drawn at random: its training error is {100 * train[0]:.0f} % at width "
        f"{widths[0]} and {100 * train[-1]:.1f} % at width {widths[-1]}. The error on new images, whose labels are "
        "right, "
    )
    if best == 0:
        return f"{found}is smallest at width {widths[0]}, {100 * test[0]:.1f} %."
    found += f"falls from {100 * test[0]:.0f} % to {100 * test[best]:.1f} % at width {widths[best]}"
    if float(test[-1] - test.min()) > 0.01:
        return f"{found} and rises again to {100 * test[-1]:.1f} % at width {widths[-1]}."
    if memorizes:
        return (
            f"{found} and, unlike that of the polynomials, does not rise again: a network that can memorise its "
            "training images may still do well on new ones."
        )
    return f"{found}."


def _draw_polynomials(errors: PolynomialErrors, *, narrow: bool) -> Figure:
    figure = new_figure(10, 4.4, narrow=narrow, narrow_height=7.6)
    num_rows, num_columns = (5, 2) if narrow else (2, 5)
    for degree, axes in enumerate(figure.subplots(num_rows, num_columns, sharex=True, sharey=True).flat):
        axes.plot(errors.grid, errors.truth, color=LIGHT["muted"], linewidth=1, linestyle=(0, (3, 3)), label="truth")
        axes.plot(errors.grid, errors.curves[degree], color=LIGHT["wrong"], label="fitted")
        axes.scatter(errors.x, errors.y, s=12, color=LIGHT["train"], linewidths=0, zorder=3, label="points")
        axes.set_title(f"degree {degree}", size=9)
        axes.set(xlim=(0, 1), ylim=(-0.75, 1.75), xticks=[0, 0.5, 1], yticks=[-0.5, 0.5, 1.5])
        axes.set_xticklabels(["0", "0.5", "1"])
        axes.tick_params(length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _draw_errors_by_degree(errors: PolynomialErrors, *, narrow: bool) -> Figure:
    figure = new_figure(6.4, 3.9, narrow=narrow)
    axes = figure.subplots()
    degrees = list(range(errors.train.shape[1]))
    for values, name, colour, marker in (
        (errors.train, "on the points fitted", "train", "o"),
        (errors.test, "on new points", "wrong", "s"),
    ):
        low, middle, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75]), dim=0)
        axes.fill_between(degrees, low, high, color=LIGHT[colour], alpha=0.15, linewidth=0)
        axes.plot(degrees, middle, color=LIGHT[colour], marker=marker, label=name)
    if errors.noise > 0:
        axes.axhline(errors.noise**2, color=LIGHT["muted"], linewidth=0.9, linestyle=(0, (5, 4)))
        axes.text(9, errors.noise**2 * 0.94, "noise", ha="right", va="top", color=LIGHT["muted"], size=8.5)
    use_log_scale(axes, "y")
    top = 2 * float(errors.test.median(dim=0).values.max())
    axes.set_ylim(bottom=max(1e-4, float(errors.train.median(dim=0).values.min()) / 2), top=top)
    axes.set(xticks=degrees, xlabel="degree")
    axes.set_title("Mean square error")
    finish_axes(axes)
    axes.legend(loc="upper center")
    return figure


def _draw_errors_by_width(errors: NetworkErrors, *, narrow: bool) -> Figure:
    figure = new_figure(6.4, 3.9, narrow=narrow)
    axes = figure.subplots()
    for values, name, colour, marker in (
        (errors.train, "on training images", "train", "o"),
        (errors.test, "on new images", "wrong", "s"),
    ):
        for column in values.T:
            axes.plot(errors.widths, 100 * column, color=LIGHT[colour], marker=".", linestyle="", alpha=0.45)
        axes.plot(errors.widths, 100 * values.mean(dim=1), color=LIGHT[colour], marker=marker, label=name)
    use_log_scale(axes, "x", ticks=list(errors.widths))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("hidden units")
    axes.set_title("Errors, %")
    finish_axes(axes)
    axes.legend()
    return figure
