"""Tests of a study's page: number formats, tables, and figures for screens and phones."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from trainer.studies.folder import StudyFolder
from trainer.studies.page import CaptionedFigure, Cell, Column, Page, Table, format_cell, to_markdown, write_page
from trainer.studies.plots import NARROW_WIDTH, new_figure, use_log_scale

TABLE = Table(
    name="costs",
    title="Costs",
    columns=(Column("network"), Column("parameters, millions", 2), Column("runs")),
    rows=[("LeNet-5", 0.062006, 3), ("VGG-19", 143.66724, None), ("huge", 12345.6, 1200)],
)


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (None, 2, "–"),
        ("diverged", 2, "diverged"),
        (7, 0, "7"),
        (12345, 0, "12,345"),
        (0.5, 3, "0.500"),
        (1234.5678, 2, "1,234.57"),
        (0, 2, "0.00"),
        (1e-5, 2, "<0.01"),
        (-1e-5, 2, ">-0.01"),
        (2e6, 1, "2,000,000.0"),
    ],
)
def test_numbers_have_fixed_decimals_and_separators(value: Cell, decimals: int, text: str) -> None:
    assert format_cell(value, decimals) == text


def test_all_numbers_of_a_column_have_the_same_decimals() -> None:
    assert to_markdown(TABLE) == (
        "| network | parameters, millions | runs |\n"
        "|---|---:|---:|\n"
        "| LeNet-5 | 0.06 | 3 |\n"
        "| VGG-19 | 143.67 | – |\n"
        "| huge | 12,345.60 | 1,200 |\n"
    )


def test_the_page_has_a_wide_and_a_narrow_image_of_each_figure(tmp_path: Path) -> None:
    machine = {"device": "an abacus", "cpus": 1, "torch": "2"}
    description = {"study": "zoo", "asked": {}, "git_commit": None, "world_size": 1, "machine": machine}
    (tmp_path / "study.json").write_text(json.dumps(description))
    drawn: list[Figure] = []

    def draw(*, narrow: bool) -> Figure:
        drawn.append(new_figure(7.2, 3.8, narrow=narrow))
        return drawn[-1]

    figure = CaptionedFigure(name="empty", title="Empty", caption="Nothing.", draw=draw)
    write_page(
        StudyFolder(tmp_path, "zoo"),
        Page(title="A page", findings=["none"], figures=[figure], tables=[TABLE], result={}),
    )
    html = (tmp_path / "report.html").read_text()
    assert [figure.get_figwidth() for figure in drawn] == [7.2, NARROW_WIDTH]
    assert html.count("data:image/svg+xml") == 4  # for light and dark pages each
    assert html.count("max-width: 40rem) and (prefers-color-scheme: dark)") == 1
    assert "<td>12,345.60</td>" in html
    assert (tmp_path / "costs.csv").read_text().splitlines()[1] == "LeNet-5,0.062006,3"  # unrounded


@pytest.mark.parametrize("values", [(21.0, 48.0), (120.0, 480.0), (0.01, 200.0)])
def test_logarithmic_axes_have_plain_numbers(values: tuple[float, float]) -> None:
    figure = new_figure(4, 3, narrow=False)
    axes = figure.subplots()
    axes.plot(values, values)
    use_log_scale(axes, "y")
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    ticks = [*axes.yaxis.get_ticklabels(minor=False), *axes.yaxis.get_ticklabels(minor=True)]
    labels = [tick.get_text() for tick in ticks if low <= tick.get_position()[1] <= high]
    assert len(labels) >= 2
    assert all(float(label) > 0 for label in labels)
