"""Argument checks with one voice: who complains, what was expected, what came, what to do.

Checks on *shapes* and *types* hold while tracing. Checks on *values* look only at Python numbers
and at concrete arrays: inside ``jit`` a value is unknown, and the check lets it pass.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def fail(where: str, what: str, expected: Any, got: Any, fix: str = "") -> ValueError:
    """Return (not raise) the ``ValueError`` with the house's wording."""
    hint = f"; {fix}" if fix else ""
    return ValueError(f"{where}: {what}: expected {expected}, got {got}{hint}.")


def is_concrete(value: Any) -> bool:
    """Whether ``value`` is a number or an array whose entries can be looked at."""
    if isinstance(value, Tracer):
        return False
    return isinstance(value, bool | int | float | np.generic | np.ndarray | jax.Array)


def check_shape(
    where: str, name: str, x: Any, expected: Sequence[int | None], fix: str = ""
) -> None:
    """Raise unless ``x.shape`` equals ``expected``, where ``None`` stands for any length."""
    shape = tuple(np.shape(x))
    wanted = tuple(expected)
    same = len(shape) == len(wanted) and all(
        w is None or w == s for s, w in zip(shape, wanted, strict=True)
    )
    if not same:
        lengths = ["any" if w is None else str(w) for w in wanted]
        text = f"({lengths[0]},)" if len(lengths) == 1 else f"({', '.join(lengths)})"
        raise fail(where, f"wrong shape of {name}", text, shape, fix)


def check_time(where: str, t: Any, batch: int) -> None:
    """Raise unless ``t`` is a scalar or has shape ``[batch]``."""
    shape = tuple(np.shape(t))
    if shape not in ((), (batch,)):
        raise fail(
            where,
            "wrong shape of t",
            f"() or ({batch},)",
            shape,
            "give one time or one per example",
        )


def check_range(
    where: str,
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
    fix: str = "",
) -> None:
    """Raise unless every entry of a concrete ``value`` lies in the interval."""
    if not is_concrete(value):
        return
    array = np.asarray(value)
    ok = (array > low if low_open else array >= low) & (
        array < high if high_open else array <= high
    )
    if not bool(np.all(ok)):
        left, right = "(["[not low_open], ")]"[not high_open]
        got = value if np.ndim(array) == 0 else f"values from {array.min()} to {array.max()}"
        raise fail(where, f"{name} out of range", f"{left}{low:g}, {high:g}{right}", got, fix)


def check_int(where: str, name: str, value: Any, low: int = 1, fix: str = "") -> None:
    """Raise unless ``value`` is a whole Python number of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{where}: {name} must be an int, got {type(value).__name__} {value!r}.")
    if value < low:
        raise fail(where, f"{name} too small", f"at least {low}", value, fix)


def check_choice(where: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise fail(where, f"unknown {name}", "one of " + ", ".join(map(repr, choices)), repr(value))
