"""A scan whose gradient recomputes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], start: Any, inputs: Any, remat: bool | int
) -> tuple[Any, Any]:
    """Return ``lax.scan(step, start, inputs)``; ``remat`` says what its gradient keeps.

    False: all that each step computed. True or 1: the carries, and computes every step again. k:
    every k-th carry, and computes every step twice again, the first time to have k carries.
    """
    if remat is False:
        return jax.lax.scan(step, start, inputs)
    step, every = jax.checkpoint(step, prevent_cse=False), int(remat)
    run = lambda start, inputs: jax.lax.scan(step, start, inputs)
    length = len(jax.tree.leaves(inputs)[0])
    whole = length - length % every
    if every == 1 or whole == 0:
        return run(start, inputs)
    blocks = jax.tree.map(lambda a: a[:whole].reshape(-1, every, *a.shape[1:]), inputs)
    carry, out = jax.lax.scan(jax.checkpoint(run, prevent_cse=False), start, blocks)
    out = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), out)
    if whole == length:
        return carry, out
    carry, rest = run(carry, jax.tree.map(lambda a: a[whole:], inputs))
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)
