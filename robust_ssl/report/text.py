"""Rows as text: Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from robust_ssl import words

Rows = Sequence[Mapping[str, str]]  # heading to text


def markdown_table(rows: Rows) -> str:
    """Returns rows as a Markdown table; a cell is shown as it is, unless it is `words.Markup`."""
    columns = list(rows[0])
    lines = [[*map(words.markdown, columns)], ["---"] * len(columns)]
    lines += [[words.markdown(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Returns rows as CSV, in the order of `columns`, else of the first row; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: words.csv_cell(cell) for name, cell in row.items()})
    return text.getvalue()
