"""Numerical rank of the denoiser's Jacobian against 1/sigma, on a mixture of low-rank Gaussians.

n = 48, K = 2 mutually orthogonal subspaces of rank d = 6: below the noise level at which the
subspace is certain the rank is d, above it is K d. Three denoisers at ``x_0 + sigma eps``: the
exact posterior mean, the low-rank autoencoder trained on noise, and a residual MLP. The published
curves of the low-rank autoencoder and of a U-Net are drawn beside them.

References:
    Wang et al. 2024, arXiv 2409.02426, the figure of Jacobian ranks (values read off the plot).
"""

import argparse
import csv
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowdim_diffusion import (
    corruption,
    denoisers,
    linalg,
    losses,
    networks,
    reporting,
    schedules,
    subspaces,
    training,
)
from lowdim_diffusion.distributions import MoLRG

DIM, NUM_COMPONENTS, RANK = 48, 2, 6
INVERSE_SIGMA = (500, 125, 50, 10, 1.67, 0.91, 0.3, 0.12, 0.08, 0.04, 0.02, 0.01)
PUBLISHED = {
    "low-rank DAE (published)": (0.125,) * 5 + (0.23,) + (0.25,) * 6,
    "U-Net (published)": ((0.98, 0.96, 0.94, 0.22, 0.125, 0.19, 0.485, 0.667) + (0.668,) * 4),
}


class Preset(NamedTuple):
    """Sizes of the experiment."""

    num_points: int
    num_train: int
    fit_steps: int
    network_steps: int
    width: int


PRESETS = {
    "smoke": Preset(16, 64, 100, 50, 16),
    "cpu": Preset(512, 600, 1000, 6000, 256),
    "paper": Preset(4096, 4096, 3000, 50000, 512),
}


def mixture(seed: int = 0) -> MoLRG:
    """Return the distribution."""
    key = jax.random.key(seed)
    return MoLRG(linalg.random_frames(key, NUM_COMPONENTS, DIM, RANK, orthogonal=True))


def rank_ratios(
    num_points: int, seed: int = 0, *, denoise_fn: Any = None, p: MoLRG | None = None
) -> np.ndarray:
    """Return ``[levels, num_points]`` rank / n of the Jacobian at ``x_0 + sigma eps``.

    Args:
        num_points: how many points.
        seed: decides the mixture and the points.
        denoise_fn: the denoiser; the exact posterior mean, in closed form, if None.
        p: the mixture; None for that of the seed.
    """
    data_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1))
    p = mixture(seed) if p is None else p
    x0, _ = p.sample(data_key, num_points)
    schedule = schedules.VE(1e-3, 200.0)
    sigmas = 1 / jnp.asarray(INVERSE_SIGMA)

    def at(sigma: jax.Array) -> jax.Array:
        x_t, _ = corruption.perturb(noise_key, schedule, x0, sigma)

        def rank(x: jax.Array) -> jax.Array:
            if denoise_fn is None:
                jacobian = p.posterior_jacobian(x[None], 1.0, sigma)[0]
                values = jnp.linalg.svd(jacobian, compute_uv=False)
            else:
                values = subspaces.jacobian_spectrum(lambda y: denoise_fn(y, sigma), x[None])[0]
            return subspaces.numerical_rank(values)

        return jax.lax.map(rank, x_t, batch_size=64) / DIM

    return np.asarray(jax.jit(lambda s: jax.lax.map(at, s))(sigmas))


def trained_denoisers(preset: Preset, p: MoLRG, seed: int) -> dict[str, Any]:
    """Return the low-rank autoencoder and the MLP, trained on draws of the mixture."""
    data_key, fit_key, init_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 2), 3)
    x, _ = p.sample(data_key, preset.num_train)
    schedule = schedules.VE(1e-3, 200.0)
    found = jax.jit(
        lambda key, x: (
            training.fit_subspaces(
                key,
                x,
                NUM_COMPONENTS,
                RANK,
                orthogonal=True,
                num_steps=preset.fit_steps,
                num_restarts=4,
                start="mixed",
            ).bases
        )
    )(fit_key, x)
    lowrank = networks.make(
        "lowrank", data_shape=(DIM,), num_components=NUM_COMPONENTS, rank=RANK, orthonormal="none"
    )
    mlp = networks.make("mlp", data_shape=(DIM,), width=preset.width, depth=3)
    data_std = (RANK / DIM) ** 0.5
    loss_fn = losses.make_loss(mlp, schedule, data_std=data_std)
    draw = lambda key, step: {"x": p.sample(jax.random.fold_in(key, step), 256)[0]}
    params, _ = jax.jit(
        lambda key: training.fit(
            key,
            mlp.init(init_key),
            loss_fn,
            optax.adam(1e-3),
            draw,
            preset.network_steps,
            ema=training.ema.classic(0.999),
        )
    )(fit_key)
    return {
        "low-rank DAE": denoisers.from_network(lowrank, {"bases": found}, schedule),
        "MLP": denoisers.from_network(mlp, params, schedule, data_std=data_std),
    }


def add_to(report: reporting.Report, preset_name: str, out: pathlib.Path, seed: int) -> None:
    """Measure; write ``jacobian_rank.csv`` and ``.png`` to ``out`` and a section to the report."""
    preset, p = PRESETS[preset_name], mixture(seed)
    found = {"exact posterior mean": rank_ratios(preset.num_points, seed, p=p)}
    for name, denoise_fn in trained_denoisers(preset, p, seed).items():
        found[name] = rank_ratios(preset.num_points, seed, denoise_fn=denoise_fn, p=p)
    columns = ["1/sigma"]
    for name in found:
        columns += [f"{name} mean", f"{name} std"]
    columns += PUBLISHED
    parts = [part for values in found.values() for part in (values.mean(1), values.std(1))]
    rows = list(zip(INVERSE_SIGMA, *parts, *PUBLISHED.values(), strict=True))
    with open(out / "jacobian_rank.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    figure = reporting.figures.curves(
        {name: (INVERSE_SIGMA, values.mean(1)) for name, values in found.items()},
        dashed={name: (INVERSE_SIGMA, values) for name, values in PUBLISHED.items()},
        xlabel="1/σ (signal to noise)",
        ylabel="numerical rank / dimension",
        xscale="log",
    )
    figure.savefig(out / "jacobian_rank.png", dpi=150)
    report.section("Rank of the Jacobian against 1/σ")
    report.figure(figure, caption="Dashed: published, read off the plot.")
    text = [[f"{row[0]:g}", *(f"{value:.3f}" for value in row[1:])] for row in rows]
    report.table(columns, text)
    for row in [
        ["1/sigma", *found],
        *([f"{r[0]:g}", *(f"{v:.3f}" for v in r[1:7:2])] for r in rows),
    ]:
        print("  ".join(f"{cell:>20}" for cell in row))


def main() -> int:
    """Write ``jacobian_rank.csv``, the figure and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.jacobian_rank")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/jacobian_rank"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = reporting.Report(
        "Jacobian rank on MoLRG", f"n = {DIM}, K = {NUM_COMPONENTS}, d = {RANK}"
    )
    add_to(report, options.preset, options.out, options.seed)
    report.write(options.out / "report.html")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
