"""What runs in either direction share: coefficients in the dtype of the start."""

from typing import Any

import jax
import jax.numpy as jnp

from lowdim_diffusion.solvers import Plan


def cast(made: Plan, dtype: Any) -> Plan:
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), made)
