"""What a run directory says about its run; reads only, also beside a running training.

Nothing here imports jax, and nothing that a directory holds makes it fail: what is torn, foreign or
missing becomes a note.
"""

import functools
import json
import math
import os
import pathlib
import statistics
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lowdim_diffusion._files import is_locked, json_lines
from lowdim_diffusion._nested import dotted
from lowdim_diffusion.cli import toml
from lowdim_diffusion.cli.config import RunConfig, options_of

__all__ = ["Summary", "differing", "find", "last_loss", "losses", "summarize"]

_TAIL = 1 << 16


class Summary(NamedTuple):
    """One run."""

    path: pathlib.Path
    status: Literal["done", "running", "stopped", "failed"]
    """``stopped`` was saved at its last step; ``failed`` was not, or its loss is not finite."""
    step: int
    """The last one in ``metrics.jsonl``, or of the newest checkpoint."""
    num_steps: int | None
    """How many the config asks for."""
    loss: float | None
    """Mean of the last ones, see :func:`last_loss`."""
    images_per_s: float | None
    """Median of the last rows of ``stats.jsonl``."""
    num_params: int | None
    unix_time_s: float | None
    """When it was last written to."""
    config: dict[str, Any]
    """Dotted name to value, of what is set."""
    note: str = ""


def find(paths: Iterable[str]) -> tuple[list[pathlib.Path], list[str]]:
    """Return run directories, and a line for each thing that is none and has none inside.

    Args:
        paths: run directories, and folders that hold some, three levels deep at most.
    """
    runs: dict[pathlib.Path, None] = {}
    problems = []
    for path in map(pathlib.Path, paths):
        found = list(_inside(path, 3))
        runs |= dict.fromkeys(found)
        if not found:
            there = "a run, nor holds any" if path.exists() else "there"
            problems.append(f"{path} is not {there}")
        elif found != [path]:
            if empty := [p.name for p in _folders(path) if not any(_inside(p, 2))]:
                problems.append(f"no runs in these of {path}: {', '.join(empty)}")
    return list(runs), problems


def _is_run(path: pathlib.Path) -> bool:
    return any((path / name).is_file() for name in ("config.toml", "metrics.jsonl", ".lock"))


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    try:
        names = sorted(e.name for e in os.scandir(path) if e.is_dir(follow_symlinks=False))
    except OSError:
        return []
    return [path / name for name in names if not name.startswith(".")]


def _inside(path: pathlib.Path, depth: int) -> Iterator[pathlib.Path]:
    if _is_run(path):
        yield path
    elif depth:
        for folder in _folders(path):
            yield from _inside(folder, depth - 1)


def summarize(path: pathlib.Path) -> Summary:
    """Return what a run directory says."""
    notes: list[str] = []
    config = _config(path / "config.toml", notes)
    rows = _tail(path / "metrics.jsonl", notes)
    saved = _newest_checkpoint(path / "checkpoints")
    trained = [row["step"] for row in rows if isinstance(row.get("step"), int)]
    step = max([saved or 0, *trained[-1:]])
    wanted = config.get("train.steps")
    wanted = wanted if isinstance(wanted, int) else None
    known = [(row["step"], row["loss"]) for row in rows if _is_number(row.get("loss"))]
    loss = last_loss(known, step)
    if is_locked(path / ".lock"):
        status = "running"
    elif wanted is not None and saved is not None and saved >= wanted:
        status = "done"
    elif rows and rows[-1].get("loss", 0) is None:
        status, loss = "failed", None
        notes.append(f"loss not finite at step {step}")
    elif saved is not None and saved == step:
        status = "stopped"
    else:
        status = "failed"
        at = f"its newest checkpoint is of step {saved}" if saved else "it has no checkpoint"
        notes.append(f"ended without saving, {at}")
    stats = _tail(path / "stats.jsonl", [])
    speeds = [r["images_per_s"] for r in stats if _is_number(r.get("images_per_s"))]
    return Summary(
        path,
        status,
        step,
        wanted,
        None if loss is None else loss[0],
        statistics.median(speeds) if speeds else None,
        None if saved is None else _num_params(path / "checkpoints" / str(saved)),
        _changed(path),
        config,
        "; ".join(notes),
    )


def last_loss(
    losses: Sequence[tuple[int, float]], num_steps: int | None = None
) -> tuple[float, str] | None:
    """Return the mean loss of the last twentieth of training, at most 100 steps, and a note.

    Args:
        losses: ``(step, loss)``, in order; the last 100 are enough.
        num_steps: steps of the whole training; the number of ``losses`` if None.
    """
    length = len(losses) if num_steps is None else num_steps
    recent = [loss for _, loss in losses[-min(max(length // 20, 1), 100) :]]
    if not recent:
        return None
    return sum(recent) / len(recent), f"mean of the last {len(recent)} steps"


def losses(path: pathlib.Path, x: str = "step") -> tuple[list[float], list[float]]:
    """Return a column of a run's metrics, and the loss beside it, where both are numbers."""
    rows = (row for _, row in json_lines((path / "metrics.jsonl").read_bytes()))
    pairs = [(r[x], r["loss"]) for r in rows if _is_number(r.get(x)) and _is_number(r.get("loss"))]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names whose values are not the same in all configs, in the order of the first.

    Examples:
        >>> differing([{"seed": 0, "optim.lr": 0.1}, {"seed": 0, "optim.lr": 0.2, "model.rank": 3}])
        ['optim.lr', 'model.rank']
    """
    names = dict.fromkeys(name for config in configs for name in config)
    changed = lambda name: any(c.get(name) != configs[0].get(name) for c in configs)
    return [name for name in names if name != "out" and changed(name)]


# ---- files --------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tail(path: pathlib.Path, notes: list[str]) -> list[dict[str, Any]]:
    """The last hundreds of rows of a file; none if there is no such file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL, 0))
            data = file.read()
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{path.name}: {error.strerror}")
        return []
    found = [row for _, row in json_lines(data)]
    if data and not found:
        notes.append(f"{path.name} has no rows")
    return found


def _config(path: pathlib.Path, notes: list[str]) -> dict[str, Any]:
    try:
        read = dict(dotted(tomllib.loads(toml.text_of(path))))
        return {name: value for name, value in (_defaults() | read).items() if value is not None}
    except FileNotFoundError:
        notes.append("no config.toml")
    except OSError as error:
        notes.append(f"config.toml: {error.strerror}")
    except (ValueError, RecursionError):
        notes.append("config.toml is not valid TOML")
    return {}


@functools.cache
def _defaults() -> dict[str, Any]:
    """For options that are younger than a config; none of them is a list."""
    return {name: value for name, _, value in options_of(RunConfig())}


def _newest_checkpoint(path: pathlib.Path) -> int | None:
    """The newest committed step: what is named by a number alone was renamed when it was whole."""
    return max((int(p.name) for p in _folders(path) if p.name.isdecimal()), default=None)


def _num_params(checkpoint: pathlib.Path) -> int | None:
    try:
        described = json.loads((checkpoint / "leaves" / "metadata").read_bytes())
        leaves = described["content"]["leaves"].items()
        return sum(math.prod(v["shape"]) for k, v in leaves if k.startswith("params/"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _changed(path: pathlib.Path) -> float | None:
    times = []
    for name in ("metrics.jsonl", "config.toml", ".lock"):
        try:
            times.append((path / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)
