"""Sets of examples as the scores of this room take them: not empty, finite, of one shape."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import fail, is_concrete


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
