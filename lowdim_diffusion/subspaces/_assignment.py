"""Optimal one-to-one assignment inside a compiled program."""

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import fail
from lowdim_diffusion._types import Array, Float, Int


def assign(cost: Float[Array, "rows cols"]) -> Int[Array, " rows"]:
    r"""Return the column given to each row so that the summed cost is smallest.

    Shortest augmenting paths with dual potentials (the Hungarian method as Jonker and Volgenant run
    it), O(rows^2 cols): rows enter one at a time, each along the cheapest alternating path. Works
    under ``jit`` and ``vmap``. Costs that are not finite count as worse than any finite choice.

    Args:
        cost: ``[rows, cols]``, rows <= cols; with more columns than rows some stay free.

    References:
        Jonker & Volgenant 1987, doi:10.1007/BF02278710.
    """
    rows, cols = cost.shape
    if rows > cols:
        raise fail("assign", "more rows than columns", f"at most {cols} rows", rows)
    finite = jnp.isfinite(cost)
    cost = jax.lax.stop_gradient(jnp.where(finite, cost, 0))
    spread = jnp.max(jnp.abs(cost), initial=0)
    cost = jnp.where(finite, cost, (spread + 1) * (2 * rows + 1))

    # Column 0 is the root of every path; row_of[j] is the row matched to column j, 0 for none.
    def augment(row: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        u, v, row_of = state
        row_of = row_of.at[0].set(row + 1)
        slack = jnp.full(cols + 1, jnp.inf, cost.dtype) + 0 * v
        came_from = jnp.zeros_like(row_of)
        used = jnp.zeros(cols + 1, bool) & (row_of > 0)

        def grow(carry):
            u, v, slack, came_from, used, j = carry
            used = used.at[j].set(True)
            i = row_of[j]
            reduced = jnp.pad(cost[i - 1] - u[i], (1, 0)) - v
            closer = ~used & (reduced < slack)
            slack = jnp.where(closer, reduced, slack)
            came_from = jnp.where(closer, j, came_from)
            open_slack = jnp.where(used, jnp.inf, slack)
            nearest = jnp.argmin(open_slack).astype(j.dtype)
            delta = open_slack[nearest]
            u = u.at[jnp.where(used, row_of, rows + 1)].add(delta, mode="drop")
            v = jnp.where(used, v - delta, v)
            slack = jnp.where(used, slack, slack - delta)
            return u, v, slack, came_from, used, nearest

        root = jnp.zeros_like(row_of[0])
        start = grow((u, v, slack, came_from, used, root))
        u, v, _, came_from, _, j = jax.lax.while_loop(lambda c: row_of[c[-1]] > 0, grow, start)

        def flip(carry):
            row_of, j = carry
            return row_of.at[j].set(row_of[came_from[j]]), came_from[j]

        row_of, _ = jax.lax.while_loop(lambda c: c[1] > 0, flip, (row_of, j))
        return u, v, row_of

    zero = 0 * cost[0, 0]
    u, v = jnp.zeros(rows + 1, cost.dtype) + zero, jnp.zeros(cols + 1, cost.dtype) + zero
    row_of = jnp.zeros(cols + 1, jnp.int32) + zero.astype(jnp.int32)
    _, _, row_of = jax.lax.fori_loop(0, rows, augment, (u, v, row_of))
    matched = jnp.where(row_of[1:] > 0, row_of[1:] - 1, rows)
    return (
        jnp.zeros(rows, jnp.int32).at[matched].set(jnp.arange(cols, dtype=jnp.int32), mode="drop")
    )
