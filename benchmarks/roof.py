"""What this machine can do: the rate of its matrix products, and of its memory.

Measured, not looked up, so that a share of it means the same on any device.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SIDE = {"cpu": 1536}
"""Of the matrices; other backends take 8192."""
MEGABYTES = {"cpu": 128}
"""Of the array that is read and written; other backends take 2048."""


class Roof(NamedTuple):
    """Rates of one device."""

    gemm_flops: float
    """FLOP/s of a square product in float32, at jax's default precision."""
    bytes_per_s: float
    """Read and written by ``x + 1``."""


def measure() -> Roof:
    """Return the best of a few tries; under two seconds."""
    backend = jax.default_backend()
    side, size = SIDE.get(backend, 8192), MEGABYTES.get(backend, 2048) * 250_000
    a = jnp.ones((side, side), jnp.float32)
    x = jnp.zeros(size, jnp.float32)
    return Roof(
        2 * side**3 / _least(jax.jit(jnp.matmul), a, a),
        2 * 4 * size / _least(jax.jit(lambda x: x + 1), x),
    )


def _least(fn: Callable[..., Any], *args: Any, tries: int = 6) -> float:
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - begin)
    return min(times)
