"""Command-line arguments to configs, by tyro; every mistake is one line with a suggestion.

Values come, later ones first, from the command line, ``--config FILE``, ``--preset NAME`` and the
defaults of the dataclasses. Without a preset and a file, a run that is there already
(``OUT/config.toml``) takes the place of the defaults, so ``lowdim train --out RUN`` continues it.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import pathlib
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from lowdim_diffusion.cli import help as helping
from lowdim_diffusion.cli import toml
from lowdim_diffusion.cli.config import RunConfig, check, check_ranges, flag, options_of, settle
from lowdim_diffusion.cli.errors import CommandError
from lowdim_diffusion.cli.presets import PRESETS, preset

__all__ = ["RunArguments", "parse", "parse_of_run", "parse_run"]

T = TypeVar("T")


class RunArguments(NamedTuple):
    """What a command that takes a whole run's config is given."""

    run: RunConfig
    dry_run: bool
    reset_optimizer: bool
    distributed: bool
    """Whether this process is one of several."""


_START = {
    "--preset NAME": "Start from a preset: " + ", ".join(PRESETS) + ".",
    "--config FILE": "Start from a config.toml, on top of the preset.",
    "--dry-run": "Show the resolved config, the network's size, the devices' shares; stop.",
    "--reset-optimizer": "Continue a run with its weights alone; the optimizer starts anew, and "
    "may be another one.",
    "--distributed": "One of several processes, which find each other: SLURM, TPU, Kubernetes, "
    "Open MPI. On one machine: 'lowdim launch'.",
    "--debug": "Show the traceback of an error.",
    "-h, --help": "Show this text.",
}


def parse_run(argv: Sequence[str], *, prog: str, description: str, examples: str) -> RunArguments:
    """Return the arguments of a command that takes a whole run's config.

    Raises:
        CommandError: in one line, for anything wrong with them.
        SystemExit: with 0 after ``--help``.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--config")
    first.add_argument("--dry-run", "--dry_run", action="store_true")
    first.add_argument("--reset-optimizer", "--reset_optimizer", action="store_true")
    first.add_argument("--distributed", action="store_true")
    try:
        start, rest = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        said = error.message.replace("expected one argument", "needs a value")
        raise CommandError(f"{error.argument_name} {said}") from None
    base = RunConfig()
    if start.preset is not None:
        if start.preset not in PRESETS:
            hint = toml.suggest(start.preset, PRESETS) or "; there are " + ", ".join(PRESETS)
            raise CommandError(f"--preset: unknown preset {start.preset!r}{hint}")
        base = preset(start.preset)
    try:
        if start.config is not None:
            base = settle(toml.load(start.config, base=base), base)
        if wants_help(rest):
            show_help(
                f"{prog} [--preset NAME] [--config FILE] [--OPTION VALUE ...]",
                description,
                ["start", *(helping.entry(k, v) for k, v in _START.items()), ""],
                base,
                "'unet:' and the like: only for that. [..] is the default; without it, unset.\n"
                "Switches have an opposite: --data.flip, --data.no-flip.",
                examples,
            )
        run = settle(parse(RunConfig, rest, default=base, prog=prog), base)
        saved = pathlib.Path(run.out) / "config.toml"
        if start.preset is None and start.config is None and saved.is_file():
            base = dataclasses.replace(toml.load(saved), out=run.out)
            run = settle(parse(RunConfig, rest, default=base, prog=prog), base)
        check(run)
    except ValueError as error:
        raise CommandError(str(error)) from None
    explicit = run.distributed.coordinator is not None
    return RunArguments(run, start.dry_run, start.reset_optimizer, start.distributed or explicit)


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the arguments ask for help."""
    return "--help" in argv or "-h" in argv


def show_help(
    usage: str, description: str, start: Sequence[str], config: Any, notes: str, examples: str
) -> typing.NoReturn:
    """Print a help text and end with ``SystemExit(0)``."""
    parts = [f"usage: {usage}", "", description, ""]
    parts += [*start, *helping.options(config, "options")]
    parts += [notes, ""] if notes else []
    parts += ["examples", *("  " + line for line in examples.strip().splitlines())]
    print("\n".join(parts))
    raise SystemExit(0)


def parse(kind: type[T], argv: Sequence[str], *, default: T, prog: str) -> T:
    """Return ``argv`` as an instance of the dataclass ``kind``, on top of ``default``.

    Raises:
        CommandError: in one line, for anything wrong with them.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            result, unknown = tyro.cli(
                kind,
                args=list(argv),
                default=default,
                prog=prog,
                return_unknown_args=True,
                add_help=False,
                registry=_registry(),
            )
    except SystemExit:
        raise CommandError(_one_line(said.getvalue(), prog)) from None
    if unknown:
        raise CommandError(_unknown(unknown[0], default, prog))
    return result


def parse_of_run(
    kind: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    examples: str,
    notes: str = "",
) -> T:
    """Return the arguments of a command about a run that is there, the directory ``--run``.

    Raises:
        CommandError: in one line, for anything wrong with them.
        SystemExit: with 0 after ``--help``.
    """
    default: Any = kind()
    if wants_help(argv):
        usage = f"{prog} --run DIR [--OPTION VALUE ...]"
        show_help(usage, description, [], default, notes, examples)
    given: Any = parse(kind, argv, default=default, prog=prog)
    check_options(given)
    if not given.run:
        raise CommandError(f"--run is needed: the directory of a run ({prog} --run DIR)")
    return given


def check_options(given: Any) -> None:
    """Raise ``CommandError`` in one line if a number is outside the range of its option."""
    try:
        check_ranges(given)
    except ValueError as error:
        raise CommandError(str(error)) from None


def _unknown(argument: str, default: Any, prog: str) -> str:
    if argument.lower() in ("true", "false"):
        return f"unexpected argument {argument!r}; a switch is --data.flip or --data.no-flip"
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}; options look like --seed 0 ({prog} --help)"
    name = argument.split("=", 1)[0]
    plain = [flag(n).removeprefix("--") for n, _, _ in options_of(default)]
    hint = toml.suggest(name.lstrip("-").replace("_", "-"), plain)
    hint = re.sub(r"(mean | or )", r"\1--", hint)
    return f"unknown option {name}{hint or f'; {prog} --help lists all'}"


def _one_line(box: str, prog: str) -> str:
    """Return what tyro says in its box, up to the first rule, as one line.

    The box is drawn with Unicode lines or, where the terminal has none, with hyphens.
    """
    body = []
    for line in box.splitlines()[1:]:
        line = line.strip("│| ")
        if line and not line.strip("─-╰╯"):
            if body:
                break
            continue
        body.append(line)
    text = " ".join(" ".join(body).split())
    text = re.sub(r"^Error parsing (\S+): ", r"\1: ", text)
    text = re.sub(r"^Missing value for argument '(\S+)'.*", r"\1 needs a value", text)
    return text.rstrip(".") or f"bad arguments; see {prog} --help"


# ---- values -------------------------------------------------------------------------------------


def _number(kind: Any, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        words = "a whole number" if kind is int else "a number"
        raise ValueError(f"expected {words}, got {text!r}") from None


def _choice(kind: Any, text: str) -> Any:
    choices = {str(c): c for c in typing.get_args(kind)}
    if text not in choices:
        hint = toml.suggest(text, choices)
        raise ValueError(f"expected one of {', '.join(choices)}, got {text!r}{hint}")
    return choices[text]


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _reader(kind: Any) -> Callable[[str], Any] | None:
    """Return the function from one argument to one value, with errors in plain words."""
    if kind in (int, float):
        return functools.partial(_number, kind)
    if typing.get_origin(kind) is typing.Literal:
        return functools.partial(_choice, kind)
    return {bool: _boolean, str: str}.get(kind)


def _value(read: Any, several: bool, optional: bool, texts: list[str]) -> Any:
    if optional and texts == ["None"]:
        return None
    return tuple(map(read, texts)) if several else read(texts[0])


def _texts(value: Any) -> list[str]:
    return list(map(str, value)) if isinstance(value, tuple) else [str(value)]


@functools.cache
def _registry() -> Any:
    """Return tyro's rules for our types: ``None`` unsets, lists end at the next option."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: Any) -> Any:
        one, several, optional = helping.plain_type(info.type)
        read = _reader(one)
        if read is None or (one is bool and not optional):
            return None  # switches stay tyro's: --data.flip, --data.no-flip
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*" if several else 1,
            metavar=helping.metavar(info.type),
            instance_from_str=functools.partial(_value, read, several, optional),
            is_instance=lambda value: True,
            str_from_instance=_texts,
        )

    return registry
