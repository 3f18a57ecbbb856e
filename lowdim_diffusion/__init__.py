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
import importlib.metadata
import os
import re
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lowdim_diffusion import (
        corruption,
        data,
        denoisers,
        distributions,
        editing,
        generalization,
        guidance,
        likelihood,
        linalg,
        losses,
        networks,
        reporting,
        safety,
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
    "editing",
    "generalization",
    "guidance",
    "likelihood",
    "linalg",
    "losses",
    "networks",
    "reporting",
    "safety",
    "sampling",
    "schedules",
    "sharding",
    "solvers",
    "subspaces",
    "training",
]


def _spare_threads() -> None:
    """Keep jaxlib before 0.11 from hanging on CPUs with few cores.

    There, a batched QR, SVD or Cholesky holds a thread of XLA's CPU pool while its parts wait for
    threads of the same pool: as many such calls at once as there are cores, from one program or
    from several emulated devices, wait for ever. XLA takes the size of the pool from NPROC.
    """
    if "NPROC" in os.environ:
        return
    try:
        version = importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return
    if [int(n) for n in re.findall(r"\d+", version)[:2]] < [0, 11]:
        flags = os.environ.get("XLA_FLAGS", "")
        emulated = re.search(r"host_platform_device_count=(\d+)", flags)
        devices = int(emulated.group(1)) if emulated else 1
        os.environ["NPROC"] = str((os.cpu_count() or 1) + 4 * devices)


_spare_threads()


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
