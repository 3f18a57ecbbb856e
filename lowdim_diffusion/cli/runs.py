"""``lowdim runs``: run directories side by side, as a table and as curves."""

import os
import pathlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowdim_diffusion.cli import tables
from lowdim_diffusion.cli.errors import CommandError, ExitCode
from lowdim_diffusion.cli.parse import parse, show_help, wants_help
from lowdim_diffusion.cli.summary import Summary, differing, find, losses, summarize

__all__ = ["RunsArguments", "main"]

_PICTURES = (".png", ".svg", ".pdf", ".html")


@dataclass(frozen=True)
class RunsArguments:
    """What ``lowdim runs`` is given."""

    format: tables.Format | None = None
    """How to print; unset: a table on a terminal, plain text elsewhere."""
    keys: tuple[str, ...] = ()
    """Options to show, 'all' for all that differ; unset: those that differ, as many as fit."""
    sort: Literal["name", "status", "step", "loss", "date"] = "name"
    """Order of the rows."""
    curves: str | None = None
    """Also draw the loss curves into this file: .png, .svg, .pdf or .html."""
    x: Literal["step", "images"] = "step"
    """What the curves are drawn against."""


_EXAMPLES = """\
lowdim runs                                   # all in runs/
lowdim runs runs/mnist runs/mnist-wide --curves loss.png
lowdim runs sweeps/lr --sort loss --curves loss.html
lowdim runs sweeps/lr --format csv > runs.csv"""


def main(argv: Sequence[str]) -> int:
    """Compare runs; return the exit code."""
    prog = "lowdim runs"
    if wants_help(argv):
        show_help(
            f"{prog} [RUN or DIR ...] [--OPTION VALUE ...]",
            "Compare runs: status, step, loss, speed, and the options in which they differ.\n"
            "'done', 'running', 'stopped' (saved, can be continued), 'failed' (ended without\n"
            "saving, or a loss that is not finite). Reads only, also beside a training.",
            [],
            RunsArguments(),
            "The loss is the mean of the last twentieth of the steps, at most 100.",
            _EXAMPLES,
        )
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    given = parse(RunsArguments, argv[first:], default=RunsArguments(), prog=prog)
    if given.curves and pathlib.Path(given.curves).suffix not in _PICTURES:
        raise CommandError(f"--curves {given.curves}: expected a file {', '.join(_PICTURES)}")
    return run(argv[:first] or ["runs"], given)


def run(paths: Sequence[str], given: RunsArguments) -> int:
    """Print the table, draw the curves; return the exit code."""
    found, problems = find(paths)
    if not found:
        raise CommandError("; ".join(problems))
    names = dict(zip(found, _names(found), strict=True))
    runs = _sorted([summarize(path) for path in found], given.sort)
    keys, whole = _keys(runs, given), given.format in ("csv", "json")
    rows = records(runs, names, keys, whole=whole)
    kind = given.format or ("table" if sys.stdout.isatty() else "plain")
    if kind == "table" and not given.keys:
        kept = tables.fitting(rows, keys, shutil.get_terminal_size().columns)
        if left := len(keys) - len(kept):
            problems.append(f"{left} more options differ: --keys all, or --format csv")
        keys = kept
        rows = records(runs, names, keys, whole=False)
    tables.write(rows, kind)
    if not whole:
        problems = [*(f"{names[r.path]}: {r.note}" for r in runs if r.note), *problems]
    for problem in problems:
        print(f"lowdim runs: note: {problem}", file=sys.stderr)
    if given.curves:
        _draw(pathlib.Path(given.curves), runs, names, keys, given.x)
        print(f"curves {given.curves}", file=sys.stderr)
    return ExitCode.DONE


def records(
    runs: Sequence[Summary], names: Any, keys: Sequence[str], *, whole: bool
) -> list[dict[str, Any]]:
    """Return one record per run; ``whole`` for programs, else for people."""
    rows = []
    for r in runs:
        row: dict[str, Any] = {"run": names[r.path], "status": r.status}
        speed = r.images_per_s
        if whole:
            row |= {"step": r.step, "num_steps": r.num_steps, "loss": r.loss, "images_per_s": speed}
            row |= {"num_params": r.num_params, "unix_time_s": r.unix_time_s}
        else:
            step = f"{r.step}/{'?' if r.num_steps is None else r.num_steps}"
            row |= {"step": step, "loss": r.loss, "images/s": speed and round(speed)}
            row |= {"parameters": r.num_params, "written": tables.date(r.unix_time_s)}
        row |= {key: r.config.get(key) for key in keys}
        rows.append(row | {"note": r.note} if whole else row)
    return rows


def _keys(runs: Sequence[Summary], given: RunsArguments) -> list[str]:
    """The options to show."""
    if given.keys and given.keys != ("all",):
        return [key.removeprefix("--").replace("-", "_") for key in given.keys]
    return differing([r.config for r in runs if r.config] or [{}])


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """Paths without what all of them have in common."""
    whole = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [os.path.relpath(path, common) for path in whole]


def _sorted(runs: list[Summary], by: str) -> list[Summary]:
    if by == "name":
        return runs
    order = {
        "status": lambda r: r.status,
        "step": lambda r: -r.step,
        "loss": lambda r: float("inf") if r.loss is None else r.loss,
        "date": lambda r: -(r.unix_time_s or 0),
    }[by]
    return sorted(runs, key=order)


def _draw(
    path: pathlib.Path, runs: Sequence[Summary], names: Any, keys: Sequence[str], x: str
) -> None:
    from lowdim_diffusion import reporting

    lines = {}
    for r in runs:
        try:
            lines[names[r.path]] = losses(r.path, x)
        except OSError as error:
            print(f"lowdim runs: note: {r.path}: {error.strerror}", file=sys.stderr)
    label = "images seen" if x == "images" else "training step"
    figure = reporting.figures.loss_curves(lines, x_label=label)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".html":
        figure.savefig(path, dpi=200)
        return
    rows = records(runs, names, keys, whole=False)
    report = reporting.Report("Runs", f"{len(runs)} runs, {tables.date(max_time(runs)) or ''}")
    report.section("Training loss").figure(
        figure, "Each step faint, the running mean on top.", alt="Training losses", wide=True
    )
    report.section("Runs").table(list(rows[0]), [list(row.values()) for row in rows])
    report.write(path)


def max_time(runs: Sequence[Summary]) -> float | None:
    """Return when the newest run was written to."""
    return max((r.unix_time_s for r in runs if r.unix_time_s is not None), default=None)
