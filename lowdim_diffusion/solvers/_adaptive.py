"""Steps that adapt to a tolerance: diffrax, for whoever has it installed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowdim_diffusion._types import Array, PyTree

MAX_STEPS = 4096


def integrate(
    where: str,
    field: Callable[[Array, PyTree], PyTree],
    start: PyTree,
    first: Array,
    last: Array,
    *,
    tol: float,
) -> tuple[PyTree, Array]:
    """Return the solution at ``last`` of ``dy/du = field(u, y)``, and the evaluations of the field.

    Tsitouras' method of order 5 with ``tol`` as relative and absolute
    tolerance. If ``MAX_STEPS`` steps, accepted and refused, do not get there, the solution is NaN.
    """
    try:
        import diffrax
    except ImportError:
        raise ModuleNotFoundError(
            f"{where}: steps that adapt need diffrax, which is not installed: "
            "pip install 'lowdim-diffusion[diffrax]'"
        ) from None
    found = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda u, y, args: field(jnp.asarray(u), y)),
        diffrax.Tsit5(),
        first,
        last,
        dt0=None,
        y0=start,
        stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
        max_steps=MAX_STEPS,
        throw=False,
    )
    done = found.result == diffrax.RESULTS.successful
    end = jax.tree.map(lambda y: jnp.where(done, y[-1], jnp.nan), found.ys)
    return end, 6 * found.stats["num_steps"] + 1
