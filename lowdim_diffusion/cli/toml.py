"""Configs as TOML: strict in, exact out.

Reading never guesses: a number in quotes, 12.7 or true for a whole number, an unknown key, each
is an error of one line that names the file, the key and what was expected. Only data is read, no
code.
"""

import dataclasses
import difflib
import functools
import pathlib
import tomllib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

import cattrs
import tomli_w
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn

from lowdim_diffusion.cli.config import RunConfig, options_of

__all__ = ["dumps", "load", "loads", "suggest", "text_of"]

_MAX_BYTES = 10**6


def suggest(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` for the nearest of some dotted names, or an empty string."""
    names = list(names)
    last = name.rsplit(".", 1)[-1]
    near = [n for n in names if n.rsplit(".", 1)[-1] == last]
    near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    near = near or [
        n
        for m in difflib.get_close_matches(last, {n.rsplit(".", 1)[-1] for n in names}, n=1)
        for n in names
        if n.rsplit(".", 1)[-1] == m
    ]
    return f"; did you mean {' or '.join(near[:2])}?" if near else ""


def loads(text: str, *, base: RunConfig | None = None, source: str = "config") -> RunConfig:
    """Return the config of a TOML text on top of ``base``: keys that are not there keep its values.

    Args:
        text: TOML.
        base: where absent keys take their values; the defaults if None.
        source: what to call the text in an error, its path.

    Raises:
        ValueError: in one line, for what is not TOML, an unknown key or a value of another type.
    """
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers and nests beyond all measure
        raise ValueError(f"{source}: not valid TOML: {error}") from None
    base = RunConfig() if base is None else base
    try:
        return _converter().structure(_merge(dataclasses.asdict(base), tree), RunConfig)
    except (ClassValidationError, _WrongType) as error:
        raise ValueError(f"{source}: {_explain(error)}") from None


def load(path: str | pathlib.Path, *, base: RunConfig | None = None) -> RunConfig:
    """Return the config in a TOML file on top of ``base``; see :func:`loads`."""
    return loads(text_of(path), base=base, source=str(path))


def text_of(path: str | pathlib.Path) -> str:
    """Return the text of a TOML file; ``ValueError`` if it is none, or is absurdly large."""
    with open(path, "rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{path}: not a config: larger than {_MAX_BYTES // 10**6} MB")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a TOML file: {error.reason} at byte {error.start}") from None
    return text.replace("\r\n", "\n")


def dumps(config: RunConfig) -> str:
    """Return a config as TOML that :func:`loads` reads back exactly; unset options are absent."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(config)))


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    plain = {
        k: _without_none(v) if isinstance(v, dict) else list(v) if isinstance(v, tuple) else v
        for k, v in tree.items()
    }
    return {k: v for k, v in plain.items() if v is not None and v != {}}


def _merge(base: Any, new: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(new, dict)):
        return new
    return {**base, **{k: _merge(base.get(k), v) for k, v in new.items()}}


# ---- strict construction ------------------------------------------------------------------------


class _WrongType(ValueError):
    """A value of another type than its key's."""

    def __init__(self, expected: str, got: Any):
        name = {dict: "a table", list: "a list", str: "text", bool: "true or false"}
        kind = name.get(type(got), type(got).__name__)
        super().__init__(f"expected {expected}, got {kind} {got!r}")


def _whole(value: Any, _: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _WrongType("a whole number", value)
    return value


def _real(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _WrongType("a number", value)
    return float(value)


def _exactly(kind: type, words: str) -> Any:
    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, kind):
            raise _WrongType(words, value)
        return value

    return hook


def _one_of(value: Any, kind: Any) -> Any:
    choices = typing.get_args(kind)
    if isinstance(value, bool) or value not in choices:
        raise _WrongType("one of " + ", ".join(map(repr, choices)), value)
    return value


@functools.cache
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)

    def several(value: Any, kind: Any) -> tuple:
        item = typing.get_args(kind)[0]
        if not isinstance(value, list | tuple):
            raise _WrongType("a list", value)
        return tuple(converter.structure(v, item) for v in value)

    def optional(value: Any, kind: Any) -> Any:
        if value is None or value == "None":
            return None
        (inner,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
        return converter.structure(value, inner)

    def table(kind: Any) -> Any:
        fill = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)

        def hook(value: Any, _: Any) -> Any:
            if not isinstance(value, dict):
                raise _WrongType("a table", value)
            return fill(value, kind)

        return hook

    converter.register_structure_hook(int, _whole)
    converter.register_structure_hook(float, _real)
    converter.register_structure_hook(str, _exactly(str, "text in quotes"))
    converter.register_structure_hook(bool, _exactly(bool, "true or false"))
    is_kind = lambda origin: lambda kind: typing.get_origin(kind) is origin
    converter.register_structure_hook_func(is_kind(Literal), _one_of)
    converter.register_structure_hook_func(is_kind(tuple), several)
    converter.register_structure_hook_func(
        lambda kind: (
            typing.get_origin(kind) in (typing.Union, types.UnionType)
            and types.NoneType in typing.get_args(kind)
        ),
        optional,
    )
    converter.register_structure_hook_factory(dataclasses.is_dataclass, table)
    return converter


def _explain(error: Any, path: str = "") -> str:
    """Return one line for the first thing that is wrong."""
    if isinstance(error, ClassValidationError):
        noted, other = error.group_exceptions()
        for inner, note in noted:
            return _explain(inner, f"{path}.{note.name}" if path else note.name)
        return _explain(other[0], path)
    if isinstance(error, ForbiddenExtraKeysError):
        key = sorted(error.extra_fields)[0]
        name = f"{path}.{key}" if path else key
        known = [n for n, _, _ in options_of(RunConfig())]
        sections = [f.name for f in dataclasses.fields(RunConfig)]
        hint = ("" if path else suggest(name, sections)) or suggest(name, known)
        return f"unknown key {name!r}{hint}"
    return f"{path or 'config'}: {error}"
