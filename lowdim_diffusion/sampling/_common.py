"""What runs in either direction share: checked starts and coefficients in their dtype."""

from typing import Any

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import fail
from lowdim_diffusion._types import Array
from lowdim_diffusion.solvers import Plan


def floating(where: str, x: Any) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{where}: x must be a floating array [b, *data], got dtype {x.dtype}.")
    if x.ndim < 2:
        raise fail(where, "wrong shape of x", "[b, *data]", x.shape, "add a batch axis")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def cast(made: Plan, dtype: Any) -> Plan:
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), made)
