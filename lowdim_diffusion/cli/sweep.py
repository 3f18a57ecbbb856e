"""``lowdim sweep``: a grid of runs, each a process with its own directory; one table of all."""

import collections
import dataclasses
import hashlib
import itertools
import pathlib
import re
import shlex
import statistics
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lowdim_diffusion._files import write_atomic
from lowdim_diffusion._nested import dotted
from lowdim_diffusion.cli import executors, tables, toml
from lowdim_diffusion.cli.config import RunConfig, flag, option, options_of
from lowdim_diffusion.cli.errors import CommandError, ExitCode
from lowdim_diffusion.cli.help import plain_type
from lowdim_diffusion.cli.parse import check_options, parse, parse_run, show_help, wants_help
from lowdim_diffusion.cli.summary import Summary, summarize

__all__ = ["Cell", "SweepArguments", "cells", "main"]


@dataclass(frozen=True)
class SweepArguments:
    """What ``lowdim sweep`` is given."""

    out: str = ""
    """Folder of the sweep (required): a run directory and a log file per cell, results.csv."""
    grid: tuple[str, ...] = ()
    """An option of 'lowdim train' and its values, NAME=VALUE,VALUE,...; any number of them."""
    file: str | None = None
    """The same from a TOML file: a table [grid] of lists, and a list 'train' of options."""
    seeds: int | None = option(ge=1)
    """Every cell with so many seeds, 0, 1, ..."""
    jobs: int = option(1, ge=1)
    """How many run at the same time."""
    executor: Literal["local", "slurm"] = "local"
    """Processes of this machine, or jobs of a SLURM cluster (needs the 'slurm' extra)."""
    slurm: tuple[str, ...] = ()
    """Options of sbatch, NAME=VALUE, time in minutes: partition=gpu gpus-per-node=1 time=240."""
    dry_run: bool = False
    """Check and list the cells; start nothing."""


_DESCRIPTION = """\
Train every combination of some options. Cells that are done are skipped,
those that were stopped or failed are continued: the same command again, or
with --out alone, finishes what is left. Ctrl-C lets all cells save and ends
with exit code 75, a second one ends them at once."""
_EXAMPLES = """\
lowdim sweep --out sweeps/lr --grid optim.lr=1e-3,3e-4 model.width=64,128
    --seeds 3 --jobs 2 -- --preset molrg --model.name mlp --train.steps 2000
lowdim sweep --out sweeps/lr                            # continue it
lowdim sweep --out sweeps/m --grid "model.channel-mult=1 2,1 2 2" --dry-run
lowdim sweep --out sweeps/big --file sweep.toml --executor slurm --jobs 8
    --slurm partition=gpu gpus-per-node=1 time=240
lowdim runs sweeps/lr --sort loss --curves loss.html    # look at it"""


class Cell(NamedTuple):
    """One run of a sweep."""

    name: str
    values: dict[str, Any]
    """Option to value, of the axes of the grid."""
    argv: tuple[str, ...]
    """Arguments of ``lowdim train``."""
    config: RunConfig

    @property
    def path(self) -> pathlib.Path:
        """Its run directory."""
        return pathlib.Path(self.config.out)

    @property
    def log(self) -> pathlib.Path:
        """What it prints."""
        return self.path.with_name(f"{self.name}.log")


class _Sweep(NamedTuple):
    """What a sweep is of; kept in ``sweep.toml``."""

    grid: dict[str, list[tuple[str, ...]]]
    """Option to its values, each as words of a command line."""
    train: list[str]


def main(argv: Sequence[str]) -> int:
    """Check, run and tabulate the cells of a sweep; return the exit code."""
    prog = "lowdim sweep"
    head, train = _split(argv)
    if wants_help(head):
        show_help(
            f"{prog} --out DIR --grid NAME=VALUES ... [-- TRAIN OPTIONS]",
            _DESCRIPTION,
            [],
            SweepArguments(),
            "What follows -- goes to every 'lowdim train'; its --help lists the options.\n"
            'Values of a list are separated by spaces: "model.channel-mult=1 2,1 2 2".',
            _EXAMPLES,
        )
    given = parse(SweepArguments, _merged(head, "--grid"), default=SweepArguments(), prog=prog)
    check_options(given)
    if not given.out:
        raise CommandError("--out is missing; give the sweep a folder")
    out = pathlib.Path(given.out)
    if (out / "config.toml").is_file():
        raise CommandError(f"{out} is a run; give the sweep a folder of its own")
    wanted = _wanted(given, train, out)
    found = cells(wanted.grid, wanted.train, out)
    options = executors.slurm_options(given.slurm)
    if given.slurm and given.executor != "slurm":
        raise CommandError("--slurm needs --executor slurm")
    if given.dry_run:
        rows = [{"cell": c.name, **c.values, "status": _before(c)} for c in found]
        tables.write(rows, "table" if sys.stdout.isatty() else "plain")
        print(f"{len(found)} cells; the first one: {_command(found[0])}")
        return ExitCode.DONE
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "sweep.toml", _dumps(wanted))
    return _run(found, given, out, options)


# ---- what is wanted -----------------------------------------------------------------------------


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of the sweep, and those of training, which follow ``--``."""
    argv = list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def _merged(argv: Sequence[str], name: str) -> list[str]:
    """Arguments in which an option that was given several times has all its values once."""
    rest, values, inside = [], [], False
    for argument in argv:
        if argument.startswith("-"):
            inside = argument == name or argument.startswith(f"{name}=")
            values += [argument.partition("=")[2]] if argument.startswith(f"{name}=") else []
            rest += [] if inside else [argument]
        else:
            (values if inside else rest).append(argument)
    return [*rest, name, *values] if values else rest


def _wanted(given: SweepArguments, train: list[str], out: pathlib.Path) -> _Sweep:
    kept = out / "sweep.toml"
    if not given.grid and given.file is None and given.seeds is None:
        if train or not kept.is_file():
            raise CommandError("nothing to sweep over; give --grid NAME=VALUE,VALUE or --seeds N")
        return _load(kept)
    sweep = _Sweep({}, []) if given.file is None else _load(pathlib.Path(given.file))
    grid = dict(sweep.grid)
    for text in given.grid:
        name, equals, values = text.partition("=")
        if not equals:
            raise CommandError(f"--grid: expected NAME=VALUE,VALUE,..., got {text!r}")
        field = _field("--grid", name)
        words = [tuple(v.split()) if _several(field) else (v.strip(),) for v in values.split(",")]
        if not all(all(value) and value for value in words):
            raise CommandError(f"--grid {text}: a value is empty")
        if _plain(name) in grid:
            raise CommandError(f"--grid: {_plain(name)} is given twice")
        grid[_plain(name)] = words
    if given.seeds is not None:
        if "seed" in grid:
            raise CommandError("--seeds and a grid of seed exclude each other")
        grid["seed"] = [(str(seed),) for seed in range(given.seeds)]
    return _Sweep(grid, [*sweep.train, *train])


def _plain(name: str) -> str:
    return name.strip().removeprefix("--").replace("-", "_")


def _field(where: str, name: str) -> dataclasses.Field:
    fields = {known: f for known, f, _ in options_of(RunConfig())}
    plain = _plain(name)
    if plain == "out":
        raise CommandError(f"{where}: out is not for a grid; every cell has a directory")
    if plain not in fields:
        hint = toml.suggest(plain, fields) or "; lowdim train --help lists all"
        raise CommandError(f"{where}: unknown option {name!r}{hint}")
    return fields[plain]


def _several(field: dataclasses.Field) -> bool:
    return plain_type(field.type)[1]


def _load(path: pathlib.Path) -> _Sweep:
    text = toml.text_of(path)
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path}: not valid TOML: {error}") from None
    if unknown := set(tree) - {"grid", "train"}:
        raise CommandError(f"{path}: unknown key {sorted(unknown)[0]!r}; there are grid and train")
    grid: dict[str, list[tuple[str, ...]]] = {}
    table = tree.get("grid", {})
    for name, values in dotted(table if isinstance(table, dict) else {"": table}):
        _field(f"{path}: grid", name)
        if not isinstance(values, list) or not values:
            raise CommandError(f"{path}: grid.{name}: expected a list of values, got {values!r}")
        grid[_plain(name)] = [
            tuple(map(_word, value)) if isinstance(value, list) else (_word(value),)
            for value in values
        ]
    train = tree.get("train", [])
    if not isinstance(train, list) or not all(isinstance(word, str) for word in train):
        raise CommandError(f"{path}: train: expected a list of texts, got {train!r}")
    return _Sweep(grid, train)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _dumps(sweep: _Sweep) -> str:
    import tomli_w

    grid = {k: [v[0] if len(v) == 1 else list(v) for v in vs] for k, vs in sweep.grid.items()}
    return tomli_w.dumps({"train": sweep.train, "grid": grid})


# ---- cells --------------------------------------------------------------------------------------


def cells(
    grid: Mapping[str, Sequence[tuple[str, ...]]], train: Sequence[str], out: pathlib.Path
) -> list[Cell]:
    """Return all combinations of a grid, the last axis fastest, each checked as a config.

    Args:
        grid: option to its values, each as words of a command line.
        train: further arguments of ``lowdim train``.
        out: where their directories go.

    Raises:
        CommandError: in one line, for a wrong option or value, or two cells that are the same.
    """
    for word in train:
        if word.split("=")[0] in ("--out", "--dry-run", "--dry_run", "-h", "--help"):
            raise CommandError(f"{word} does not go to the cells; give it before --")
    fields = {name: _field("grid", name) for name in grid}
    last = collections.Counter(name.rsplit(".", 1)[-1] for name in grid)
    labels = {n: s if last[s := n.rsplit(".", 1)[-1]] == 1 else n for n in grid}
    found: dict[str, Cell] = {}
    for combination in itertools.product(*grid.values()):
        words = dict(zip(grid, combination, strict=True))
        name = _name({labels[k]: v for k, v in words.items()})
        own = [word for k, v in words.items() for word in _arguments(k, v, fields[k])]
        argv = (*train, *own, "--out", str(out / name))
        config = parse_run(argv, prog="lowdim sweep", description="", examples="").run
        known = {k: v for k, _, v in options_of(config)}
        cell = Cell(name, {k: known[k] for k in grid}, argv, config)
        same = [c for c in found.values() if c.name == name or c.values == cell.values]
        if same:
            both = " and ".join(" ".join(map(str, c.values.values())) for c in (same[0], cell))
            raise CommandError(f"two cells are the same: {both}")
        found[name] = cell
    return list(found.values())


def _name(words: Mapping[str, tuple[str, ...]]) -> str:
    safe = lambda text: re.sub(r"[^A-Za-z0-9._+-]", "-", text)
    name = ",".join(f"{label}={safe('-'.join(value))}" for label, value in words.items())
    if len(name) <= 150:
        return name
    return f"{name[:140]}-{hashlib.sha256(repr(words).encode()).hexdigest()[:8]}"


def _arguments(name: str, words: tuple[str, ...], field: dataclasses.Field) -> list[str]:
    """A value as arguments of the command line; a switch has none."""
    kind, _, optional = plain_type(field.type)
    if kind is not bool or optional:
        return [flag(name), *words]
    if words not in (("true",), ("false",)):
        raise CommandError(f"{flag(name)}: expected true or false, got {' '.join(words)!r}")
    section, _, last = name.rpartition(".")
    return [flag(name if words == ("true",) else f"{section}.no_{last}".lstrip("."))]


def _command(cell: Cell) -> str:
    return shlex.join(["lowdim", "train", *cell.argv])


def _before(cell: Cell) -> str:
    """What there is of a cell: its status, ``new``, or ``changed`` if it is done otherwise."""
    if not cell.path.exists():
        return "new"
    status = summarize(cell.path).status
    if status != "done":
        return status
    try:
        saved = dataclasses.replace(toml.load(cell.path / "config.toml"), out=cell.config.out)
    except (OSError, ValueError):
        return "changed"
    return "done" if saved == cell.config else "changed"


# ---- running ------------------------------------------------------------------------------------


def _run(
    found: Sequence[Cell], given: SweepArguments, out: pathlib.Path, options: Mapping[str, str]
) -> int:
    from lowdim_diffusion.training.preemption import StopSignal
    from lowdim_diffusion.training.progress import duration

    before = {cell.name: _before(cell) for cell in found}
    codes: dict[str, int | None] = {cell.name: None for cell in found}
    codes |= {name: ExitCode.DONE for name, status in before.items() if status == "done"}
    codes |= {name: ExitCode.LOCKED for name, status in before.items() if status == "running"}
    by_name = {cell.name: cell for cell in found if codes[cell.name] is None}
    done = sum(code == ExitCode.DONE for code in codes.values())
    print(
        f"{len(found)} cells in {out}: {done} done, {len(by_name)} to run, {given.jobs} at a time"
    )
    for name in (name for name, status in before.items() if status == "running"):
        print(f"{name} is running already, and left alone")
    run = (sys.executable, "-m", "lowdim_diffusion", "train")
    jobs = [executors.Job(c.name, (*run, *c.argv), c.log) for c in by_name.values()]
    begin = time.monotonic()
    with StopSignal() as stop:
        if given.executor == "local":
            ended = executors.local(jobs, at_once=given.jobs, stop=lambda: stop.requested)
        else:
            ended = executors.slurm(
                jobs,
                at_once=given.jobs,
                stop=lambda: stop.requested,
                options=options,
                folder=out / ".submitit",
            )
        for job, code in ended:
            codes[job.name] = code
            done += 1
            print(f"[{done}/{len(found)}] {job.name}: {_told(by_name[job.name], code)}", flush=True)
            write_atomic(out / "results.csv", tables.render(_results(found, codes), "csv"))
        stopped = stop.name
    rows = _results(found, codes)
    write_atomic(out / "results.csv", tables.render(rows, "csv"))
    print()
    kind = "table" if sys.stdout.isatty() else "plain"
    tables.write(rows, kind)
    if means := _over_seeds(rows, [name for name in found[0].values if name != "seed"]):
        print()
        tables.write(means, kind)
    print(f"\n{duration(time.monotonic() - begin)}; table {out / 'results.csv'}")
    bad = [code for code in codes.values() if code not in (ExitCode.DONE, None, ExitCode.PREEMPTED)]
    if stopped or (not bad and any(code != ExitCode.DONE for code in codes.values())):
        left = sum(code != ExitCode.DONE for code in codes.values())
        if left:
            print(f"{stopped or 'stopped'}: {left} cells left; lowdim sweep --out {out} continues")
            return ExitCode.PREEMPTED
    return bad[0] if bad else ExitCode.DONE


def _told(cell: Cell, code: int) -> str:
    """What became of a cell, in words."""
    if code == ExitCode.DONE:
        loss = summarize(cell.path).loss
        return "done" if loss is None else f"done, loss {loss:.4g}"
    if code == ExitCode.PREEMPTED:
        return "stopped and saved"
    try:
        *_, last = cell.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except (OSError, ValueError):
        last = "it printed nothing"
    last = last.removeprefix("lowdim train: error: ")
    return f"failed with exit code {code}: {last[:160]} ({cell.log})"


def _results(found: Sequence[Cell], codes: Mapping[str, int | None]) -> list[dict[str, Any]]:
    rows = []
    for cell in found:
        seen = summarize(cell.path) if cell.path.exists() else None
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in cell.values.items()}
        rows.append({"cell": cell.name, **values, **_outcome(seen), "exit_code": codes[cell.name]})
    return rows


def _over_seeds(rows: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and spread of the loss of cells that are done and differ in the seed alone."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "done" and row["loss"] is not None:
            groups.setdefault(repr([row[name] for name in axes]), []).append(row)
    means = []
    for group in groups.values():
        losses = [row["loss"] for row in group]
        std = statistics.stdev(losses) if len(losses) > 1 else None
        values = {name: group[0][name] for name in axes}
        means.append(
            {**values, "seeds": len(losses), "mean loss": statistics.mean(losses), "std": std}
        )
    return means if any(row["seeds"] > 1 for row in means) else []


def _outcome(seen: Summary | None) -> dict[str, Any]:
    if seen is None:
        names = ("step", "loss", "images_per_s", "num_params")
        return {"status": "not started", **dict.fromkeys(names)}
    return {
        "status": seen.status,
        "step": seen.step,
        "loss": seen.loss,
        "images_per_s": seen.images_per_s and round(seen.images_per_s, 1),
        "num_params": seen.num_params,
    }
