"""Prints results as a table or as lines of JSON."""

import json
import re
import sys
from collections.abc import Sequence

from serving.client.results import Classification

Row = tuple[str, ...]

_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and bytes that are not UTF-8, which names of files may have."""


def json_line(result: Classification) -> str:
    """Returns `{"file": …, "predictions": [{"index", "label", "probability"}, …], "warning": … or null}`."""
    predictions = [
        {"index": prediction.index, "label": prediction.label, "probability": prediction.probability}
        for prediction in result.predictions
    ]
    return json.dumps({"file": result.name, "predictions": predictions, "warning": result.warning})


def show_table(header: Row, rows: Sequence[Row]) -> None:
    """Prints a table on a terminal, else aligned columns, one line per row. Prints nothing without rows."""
    if not rows:
        return
    rows = [tuple(_NO_TEXT.sub(lambda found: repr(found[0])[1:-1], cell) for cell in row) for row in rows]
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
    previous = ""
    for row in rows:
        first = "" if row[0] == previous else row[0]  # shown once for consecutive rows
        table.add_row(*(Text(cell) for cell in (first, *row[1:])))  # Text: names may look like rich's markup
        previous = row[0]
    Console().print(table)
