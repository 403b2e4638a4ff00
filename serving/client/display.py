"""How answers look on a terminal and elsewhere."""

import json
import sys
from collections.abc import Sequence

from serving.client.results import Classification

Row = tuple[str, ...]


def json_line(result: Classification) -> str:
    """`{"file": …, "predictions": [{"index", "label", "probability"}, …], "warning": … or null}`."""
    predictions = [
        {"index": found.index, "label": found.label, "probability": found.probability} for found in result.predictions
    ]
    return json.dumps({"file": result.name, "predictions": predictions, "warning": result.warning})


def show_table(header: Row, rows: Sequence[Row]) -> None:
    """To stdout: a table on a terminal, else aligned columns, one line a row. Nothing where there are no rows."""
    if not rows:
        return
    if sys.stdout.isatty():
        _show_rich(header, rows)
    else:
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        for row in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show_rich(header: Row, rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for title in header:
        table.add_column(title, overflow="fold")
    above = ""
    for row in rows:
        first = "" if row[0] == above else row[0]  # said once for the rows that belong together
        table.add_row(*(Text(cell) for cell in (first, *row[1:])))  # Text: names and labels are no markup
        above = row[0]
    Console().print(table)
