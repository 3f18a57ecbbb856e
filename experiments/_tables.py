"""Tidy tables of results: rows of one sweep, and their file."""

import csv
import pathlib
from typing import Any

import numpy as np


def rows_of(table: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return the rows of a table of columns, as plain numbers."""
    columns = (column.tolist() for column in table.values())
    return [dict(zip(table, row, strict=True)) for row in zip(*columns, strict=True)]


def write_csv(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Write tidy rows."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
