"""Low-dimensional structure of diffusion models, in JAX.

A **denoiser** is a plain function ``(x_t, t) -> x0_hat``, the posterior mean ``E[x_0 | x_t]``.
Exact distributions, trained networks, guided and edited models are all denoisers; samplers,
likelihoods, Jacobian tools, metrics and edits all take one.

Submodules load on first use, so that ``import lowdim_diffusion`` is instant and touches no device::

    import lowdim_diffusion as ld
    p = ld.distributions.MoLRG(bases)
    denoise_fn = p.denoiser(schedule)
    x = ld.sampling.sample(key, denoise_fn, schedule, ts, (64, 48), solver=ld.solvers.heun()).x
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lowdim_diffusion import (
        corruption,
        data,
        denoisers,
        distributions,
        generalization,
        linalg,
        losses,
        networks,
        reporting,
        sampling,
        schedules,
        sharding,
        solvers,
        subspaces,
        training,
    )

__all__ = [
    "corruption",
    "data",
    "denoisers",
    "distributions",
    "generalization",
    "linalg",
    "losses",
    "networks",
    "reporting",
    "sampling",
    "schedules",
    "sharding",
    "solvers",
    "subspaces",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
