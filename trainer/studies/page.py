"""What a study leaves for people: figures and tables as files, and one page that needs nothing else."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from trainer.errors import writing
from trainer.files import write_atomically, write_json
from trainer.report import figures
from trainer.report.page import groups, shades, write_figure
from trainer.studies.folder import StudyFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure. `name` is its file's; `text` says what it shows, for the page and for those who cannot see it."""

    name: str
    title: str
    text: str
    figure: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text and numbers, written as `name.csv` and `name.md`. The first column names the row."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str | float | int | None, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A study's page.

    Args:
        findings: what came out, a sentence each; the first is the most important.
        result: the same for programs, written to `result.json`.
    """

    title: str
    findings: list[str]
    pictures: list[Picture]
    tables: list[Table]
    result: dict[str, Any]


def write_page(folder: StudyFolder, page: Page) -> Path:
    """Write everything; the page's path. Call it within `figures.style()`, in which the figures were drawn.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing(folder.path):
        return _write(folder, page)


def _write(folder: StudyFolder, page: Page) -> Path:
    drawn = []
    (folder.path / "figures").mkdir(exist_ok=True)
    for picture in page.pictures:
        write_figure(folder.path / "figures" / picture.name, picture.figure)
        drawn.append((picture, shades(picture.figure)))
    for table in page.tables:
        write_atomically(folder.path / f"{table.name}.csv", _as_csv(table).encode())
        write_atomically(folder.path / f"{table.name}.md", as_markdown(table).encode())
    description = folder.description()
    others = description.get("continued_on", [])
    origin = {name: description[name] for name in ("git_commit", "world_size", "machine")}
    origin |= {f"continued_on_{number}": machine for number, machine in enumerate(others, start=1)}
    values = {
        "page": page,
        "pictures": drawn,
        "colours": {"light": figures.LIGHT, "dark": figures.DARK},
        "asked": groups(description["asked"]),
        "origin": groups(origin),
        "machines": [description["machine"], *others],
        "command": f"python -m trainer study {folder.name}",
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": write_number}
    template = Path(__file__).with_name("study.html.j2").read_text(encoding="utf-8")
    path = folder.path / "report.html"
    write_atomically(path, environment.from_string(template).render(values).encode())
    result = {"study": folder.name, **page.result, "machine": description["machine"]}
    write_json(folder.path / "result.json", result | ({"continued_on": others} if others else {}))
    return path


def write_number(value: str | float | int | None) -> str:
    """A cell for people: four significant digits, whole numbers whole."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if 1e4 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    if value != 0 and not 1e-3 <= abs(value) < 1e9:
        return f"{value:.3g}"
    return f"{value:.4g}"


def as_markdown(table: Table) -> str:
    """The table for a README."""
    lines = [f"| {' | '.join(table.header)} |", f"|{'|'.join(['---', *['---:'] * (len(table.header) - 1)])}|"]
    lines += [f"| {' | '.join(write_number(cell) for cell in row)} |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _as_csv(table: Table) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows(table.rows)
    return file.getvalue()
