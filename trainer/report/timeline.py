"""Draws CIFAR-10 test accuracy by year (page 20 of the lecture), with a run among the published results."""

from matplotlib.figure import Figure

from trainer.report.figures import LIGHT, percent

PUBLISHED = (
    (2012.5, 89.0, "Krizhevsky\net al. 2012", (0, -14)),
    (2015.0, 96.53, "Graham 2015", (0, 7)),
    (2018.1, 97.87, "Real et al. 2018", (0, 7)),
)
"""Year, accuracy in percent (the papers give errors of 11, 3.47 and 2.13 %), name, offset of the name in points."""
HUMAN = 94.0
"""A. Karpathy's estimate of 2011, from labelling by hand: the dashed line in the lecture."""
_FLOOR = 75.0


def draw_cifar10_years(accuracy: float, year: float, name: str) -> Figure:
    """Returns the lecture's curve with a run's accuracy.

    Args:
        accuracy: on the test set, 0 to 1.
        year: when the run ended, with a fraction.
        name: of the recipe.
    """
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [point[0] for point in PUBLISHED],
        [point[1] for point in PUBLISHED],
        color=LIGHT["muted"],
        marker="o",
        linewidth=1.2,
    )
    for x, y, text, offset in PUBLISHED:
        axes.annotate(
            text,
            (x, y),
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="bottom" if offset[1] > 0 else "top",
            color=LIGHT["muted"],
        )
    axes.axhline(HUMAN, color=LIGHT["muted"], linewidth=0.9, linestyle=(0, (5, 4)))
    axes.text(2010.1, HUMAN + 0.25, "human performance", color=LIGHT["muted"], size=8.5)
    ours = max(_FLOOR, 100 * accuracy)
    axes.plot([year], [ours], color=LIGHT["wrong"], marker="o" if ours > _FLOOR else "v", markersize=7, clip_on=False)
    axes.annotate(
        f"{name}\n{percent(accuracy)}",
        (year, ours),
        xytext=(-9, 0 if ours > _FLOOR else 5),
        textcoords="offset points",
        ha="right",
        va="center" if ours > _FLOOR else "bottom",
        color=LIGHT["wrong"],
        weight="bold",
    )
    axes.set(xlim=(2010, max(2019.0, year + 0.6)), ylim=(_FLOOR, 100), xlabel="year")
    axes.set_title("CIFAR-10, test accuracy, %")
    axes.grid(axis="y")
    axes.tick_params(length=0, pad=6)
    return figure
