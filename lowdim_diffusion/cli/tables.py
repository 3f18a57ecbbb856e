"""Records as a table to read, or as CSV or JSON for other programs."""

import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

__all__ = ["Format", "cell", "date", "fitting", "render", "write"]

_WIDEST = 40

Format = Literal["table", "plain", "csv", "json"]


def cell(value: Any) -> str:
    """Return a value as a person reads it.

    Examples:
        >>> cell(216673), cell(0.123456), cell(7297.6), cell(None), cell([1, 2, 2]), cell(True)
        ('216,673', '0.1235', '7,298', '-', '1 2 2', 'true')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= _WIDEST else f"…{text[1 - _WIDEST :]}"


def date(unix_time_s: float | None) -> str | None:
    """Return the local date and time, to the minute."""
    if unix_time_s is None:
        return None
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_time_s))


def fitting(rows: Sequence[Mapping[str, Any]], names: Sequence[str], width: int) -> list[str]:
    """Return those of the named columns that fit into a width beside all the others."""
    widths = {
        name: 2 + max(len(cell(text)) for text in (name, *(r[name] for r in rows)))
        for name in rows[0]
    }
    left = width - sum(w for name, w in widths.items() if name not in names)
    kept = []
    for name in names:
        if widths[name] <= left:
            left -= widths[name]
            kept.append(name)
    return kept


def render(rows: Sequence[Mapping[str, Any]], kind: Literal["plain", "csv", "json"]) -> str:
    """Return records as text; names are those of the first one, and None is an empty field.

    Examples:
        >>> print(render([{"run": "a", "loss": 0.5}, {"run": "b", "loss": None}], "csv"), end="")
        run,loss
        a,0.5
        b,
        >>> print(render([{"run": "a", "loss": 0.5}], "plain"), end="")
        run  loss
        a     0.5
    """
    if kind == "json":
        return json.dumps([dict(row) for row in rows], indent=1) + "\n"
    if kind == "csv":
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([{k: _plain(v) for k, v in row.items()} for row in rows])
        return stream.getvalue()
    names = list(rows[0])
    columns = {name: [name, *(cell(row[name]) for row in rows)] for name in names}
    lines = []
    for i in range(len(rows) + 1):
        parts = []
        for name, texts in columns.items():
            width = max(map(len, texts))
            right = _is_numeric(rows, name)
            parts.append(texts[i].rjust(width) if right else texts[i].ljust(width))
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def write(rows: Sequence[Mapping[str, Any]], kind: Format) -> None:
    """Print records."""
    if kind != "table":
        print(render(rows, kind), end="")
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colors = {"done": "green", "running": "cyan", "failed": "red", "stopped": "yellow"}
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in rows[0]:
        right = _is_numeric(rows, name)
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        texts = [Text(cell(v), colors.get(v, "") if k == "status" else "") for k, v in row.items()]
        table.add_row(*texts)
    Console(highlight=False).print(table)


def _is_numeric(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row[name] for row in rows if row[name] is not None]
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
