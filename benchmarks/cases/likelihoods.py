"""Log-densities along the probability flow: exact trace, Hutchinson's, and the bare calls."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.harness import Case, Variant, jitted
from lowdim_diffusion import likelihood, linalg, networks, schedules
from lowdim_diffusion.denoisers import from_network
from lowdim_diffusion.distributions import MoLRG

DIMS = {"smoke": 8, "small": 32, "medium": 64, "large": 192}
BATCH, STEPS = 64, 20


def _build(size: str) -> list[Variant]:
    schedule, key = schedules.VPLinear(), jax.random.key(0)
    dim = DIMS[size]
    p = MoLRG(linalg.random_frames(key, 2, dim, 4), noise_std=0.1)
    net = networks.make("mlp", data_shape=(dim,), width=256, depth=3)
    x, _ = p.sample(key, BATCH)
    params = jax.tree.map(lambda leaf: leaf + 0.01, net.init(key))
    denoise_fn = from_network(net, params, schedule)

    def value(trace: Literal["exact", "hutchinson"]) -> Any:
        return lambda x: likelihood.log_prob(
            key, denoise_fn, schedule, x, trace=trace, num_steps=STEPS
        )

    results = {"exact": value("exact"), "hutchinson": value("hutchinson")}
    nfe = int(results["hutchinson"](x).nfe)
    levels = jnp.full(nfe, 0.5)
    calls = lambda x: jax.lax.scan(lambda x, t: (denoise_fn(x, t), None), x, levels)[0]
    return [
        *(
            jitted(name, lambda x, f=f: f(x).log_prob, x, units=BATCH)
            for name, f in results.items()
        ),
        jitted(f"{nfe} bare calls", calls, x, units=BATCH, ours=False),
    ]


CASES = [Case("likelihood", "example", _build)]
