"""What the scores of this room take: examples, not empty, finite, of one shape; labels; times."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_range, check_shape, fail, is_concrete
from lowdim_diffusion._types import Array, Schedule
from lowdim_diffusion.solvers._base import as_times


def check_examples(where: str, **sets: Any) -> None:
    """Raise unless every set holds finite examples, and all of them the shape of the last.

    Args:
        where: who complains.
        sets: name to ``[b, *data]``. NaN inside ``jit`` passes: scores then come out NaN.
    """
    (last, wanted) = list(sets.items())[-1]
    for name, x in sets.items():
        shape = jnp.shape(x)
        if len(shape) < 1 or shape[0] == 0:
            fix = "a score of nothing is not 0"
            raise fail(where, f"no examples in {name}", "[b, *data] with b >= 1", shape, fix)
        if shape[1:] != jnp.shape(wanted)[1:]:
            expected = f"the shape of {last}'s, {jnp.shape(wanted)[1:]}"
            raise fail(where, f"wrong shape of an example of {name}", expected, shape[1:])
        check_finite(where, name, x)


def check_finite(where: str, name: str, x: Any) -> None:
    """Raise if an entry of a concrete ``x`` is NaN or infinite."""
    x = x if hasattr(x, "dtype") else np.asarray(x)
    if not is_concrete(x) or not jnp.issubdtype(x.dtype, jnp.inexact):
        return
    with jax.ensure_compile_time_eval():  # a known array may be met while another is traced
        module: Any = np if isinstance(x, np.ndarray) else jnp  # large ones stay where they are
        bad = int((~module.isfinite(x).reshape(len(x), -1).all(axis=1)).sum())
    if bad:
        fix = "leave them out, or find where they come from"
        raise fail(
            where, f"{name} not finite", "numbers", f"{bad} of {len(x)} with NaN or inf", fix
        )


def check_pairs(where: str, a: Any, b: Any) -> None:
    """Raise unless ``a[i]`` and ``b[i]`` can be compared one by one."""
    if jnp.shape(a) != jnp.shape(b):
        raise fail(where, "shape of b", f"that of a, {jnp.shape(a)}", jnp.shape(b))
    check_examples(where, a=a, b=b)


def flat_features(where: str, name: str, h: Any) -> Array:
    """Return ``h`` as floats ``[b, p]``; raise without an axis of features."""
    h = jnp.asarray(h)
    if h.ndim < 2 or 0 in h.shape:
        raise fail(where, f"wrong shape of {name}", "[b, *features] with b >= 1", h.shape)
    check_finite(where, name, h)
    return h.reshape(len(h), -1).astype(jnp.promote_types(h.dtype, jnp.float32))


def check_labels(where: str, labels: Any, num: int, num_classes: int) -> None:
    """Raise unless there is one label for each of ``num`` examples, in ``0 .. num_classes - 1``."""
    check_shape(where, "labels", labels, (num,), "give one class per example")
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        got = jnp.result_type(labels)
        raise TypeError(f"{where}: labels must be integer classes, got {got}.")
    fix = "num_classes counts the classes, from 0 on"
    check_range(where, "labels", labels, 0, num_classes - 1, fix=fix)


def level_times(where: str, schedule: Schedule, ts: Any, dtype: Any) -> Array:
    """The times, refused if one has no noise or lies beyond the schedule."""
    ts = as_times(ts)
    if np.ndim(ts) > 1 or 0 in np.shape(ts):
        raise fail(where, "wrong shape of ts", "() or (T,) with T >= 1", np.shape(ts))
    if is_concrete(schedule.t_max):
        high = float(schedule.t_max) * (1 + 1e-5)  # times found from noise levels are rounded
        fix = "leave out t = 0, where a sampler's grid ends"
        check_range(where, "ts", ts, 0, high, low_open=True, fix=fix)
    return jnp.asarray(ts, dtype)
