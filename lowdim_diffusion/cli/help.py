"""Help texts from the dataclasses themselves: one line per option, grouped by section."""

import ast
import dataclasses
import functools
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Any

__all__ = ["metavar", "options"]

_COLUMN = 33


@functools.cache
def _texts(kind: type) -> dict[str, str]:
    """Return the text under each field of a dataclass."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for item, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[item.target.id] = " ".join(str(after.value.value).split())
    return found


def plain_type(kind: Any) -> tuple[Any, bool, bool]:
    """Return ``(type of one value, takes several, may be unset)`` of a field's type."""
    optional = several = False
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        optional = types.NoneType in typing.get_args(kind)
        (kind,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        several, kind = True, typing.get_args(kind)[0]
    return kind, several, optional


def metavar(kind: Any) -> str:
    """Return the placeholder of a value: ``INT``, ``INT ...``, ``a|b``, nothing for a switch."""
    one, several, optional = plain_type(kind)
    if one is bool:
        return "true|false" if optional else ""
    if typing.get_origin(one) is typing.Literal:
        name = "|".join(map(str, typing.get_args(one)))
    else:
        name = {int: "INT", float: "FLOAT", str: "TEXT"}[one]
    return f"{name} ..." if several else name


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns, 64), 100) - 1


def entry(option: str, text: str) -> str:
    """Return an option and its help in two columns, wrapped to the terminal."""
    body = textwrap.wrap(text, _width() - _COLUMN, break_on_hyphens=False) or [""]
    head = f"  {option}"
    lines = [head] if len(head) >= _COLUMN else [f"{head:<{_COLUMN}}{body.pop(0)}"]
    return "\n".join([*lines, *(" " * _COLUMN + line for line in body)]).rstrip()


def options(config: Any, title: str = "options", prefix: str = "") -> Sequence[str]:
    """Return the lines of a help text for a config's options, its sections after its own fields."""
    texts, lines, sections = _texts(type(config)), [], []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            heading = inspect.getdoc(type(value)) or ""
            sections += options(value, f"{f.name}: {heading}", f"{prefix}{f.name}.")
            continue
        kind = typing.get_type_hints(type(config))[f.name]
        placeholder = metavar(kind)
        text, choices = texts.get(f.name, ""), ""
        if "|" in placeholder and placeholder != "true|false":
            placeholder, choices = f.name.upper().replace("_", "-"), placeholder.replace("|", ", ")
            text = f"{text} One of {choices}."
        shown = "" if value in (None, False, "", ()) else _show(value)
        name = "--" + f"{prefix}{f.name}".replace("_", "-")
        lines.append(entry(f"{name} {placeholder}".strip(), f"{text} {shown}".strip()))
    return [*textwrap.wrap(title, _width()), *lines, "", *sections]


def _show(value: Any) -> str:
    if value is True:
        return "[on]"
    return "[" + (" ".join(map(str, value)) if isinstance(value, tuple) else str(value)) + "]"
