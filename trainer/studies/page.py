"""Writes the output of a study: figures and tables as files, and one self-contained HTML page."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from trainer.errors import writing
from trainer.files import write_atomically, write_json
from trainer.report import figures
from trainer.report.page import both_color_schemes, groups, write_figure
from trainer.studies.folder import StudyFolder

Cell = str | float | int | None


class Draw(Protocol):
    """Draws a figure: wide, or narrow for phones."""

    def __call__(self, *, narrow: bool) -> Figure: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedFigure:
    """A figure of the page.

    Args:
        name: the name of its files, without a suffix.
        caption: describes the figure on the page, and to readers who cannot see it.
    """

    name: str
    title: str
    caption: str
    draw: Draw


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. All its numbers have the same number of decimals."""

    name: str
    decimals: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text and numbers, written as `name.csv` and `name.md`. The first column names the row."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: list[tuple[Cell, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A study's page.

    Args:
        findings: the results as sentences; the first is the most important.
        result: the results for programs, written to `result.json`.
    """

    title: str
    findings: list[str]
    figures: list[CaptionedFigure]
    tables: list[Table]
    result: dict[str, Any]


def write_page(folder: StudyFolder, page: Page) -> None:
    """Draws and writes all figures, tables, `report.html` and `result.json`, and prints the most important finding.

    Raises:
        CheckpointError: a file cannot be written.
    """
    with writing(folder.path):
        with figures.style():
            drawings = [(figure, _write_figure(folder, figure)) for figure in page.figures]
        for table in page.tables:
            write_atomically(folder.path / f"{table.name}.csv", _to_csv(table).encode())
            write_atomically(folder.path / f"{table.name}.md", to_markdown(table).encode())
        path = folder.path / "report.html"
        write_atomically(path, _to_html(folder, page, drawings).encode())
        _write_result(folder, page)
    print(f"{page.findings[0]}\nreport: {path}")


def _write_figure(folder: StudyFolder, figure: CaptionedFigure) -> dict[str, dict[str, str]]:
    """Writes the files of a figure; returns the images of the page, by width and by colour scheme."""
    (folder.path / "figures").mkdir(exist_ok=True)
    wide = figure.draw(narrow=False)
    write_figure(folder.path / "figures" / figure.name, wide)
    return {"wide": both_color_schemes(wide), "narrow": both_color_schemes(figure.draw(narrow=True))}


def _to_html(folder: StudyFolder, page: Page, drawings: list[tuple[CaptionedFigure, dict[str, dict[str, str]]]]) -> str:
    description = folder.description()
    others = description.get("continued_on", [])
    origin = {name: description[name] for name in ("git_commit", "world_size", "machine")}
    origin |= {f"continued_on_{number}": machine for number, machine in enumerate(others, start=1)}
    values = {
        "page": page,
        "drawings": drawings,
        "colours": {"light": figures.LIGHT, "dark": figures.DARK},
        "options": groups(description["asked"]),
        "origin": groups(origin),
        "machines": [description["machine"], *others],
        "command": f"convoy study {folder.name}",
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": format_cell}
    template = Path(__file__).with_name("study.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(values)


def _write_result(folder: StudyFolder, page: Page) -> None:
    description = folder.description()
    others = description.get("continued_on", [])
    result = {"study": folder.name, **page.result, "machine": description["machine"]}
    write_json(folder.path / "result.json", result | ({"continued_on": others} if others else {}))


def format_cell(value: Cell, decimals: int) -> str:
    """Formats a cell for display: numbers with fixed decimals and separators of thousands, as in `12,345.60`.

    A number that would round to zero becomes `<0.01`, and None becomes a dash.
    """
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    text = f"{value:,.{decimals}f}"
    if value != 0 and not text.strip("-0."):
        return f"<{10.0**-decimals:.{decimals}f}" if value > 0 else f">-{10.0**-decimals:.{decimals}f}"
    return text


def to_markdown(table: Table) -> str:
    """Returns the table in Markdown."""
    names = [column.name for column in table.columns]
    lines = [f"| {' | '.join(names)} |", f"|{'|'.join(['---', *['---:'] * (len(names) - 1)])}|"]
    for row in table.rows:
        cells = (format_cell(cell, column.decimals) for cell, column in zip(row, table.columns, strict=True))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _to_csv(table: Table) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([column.name for column in table.columns])
    writer.writerows(table.rows)
    return file.getvalue()
