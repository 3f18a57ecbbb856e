"""Numerical rank of the Jacobian of the exact posterior mean against 1/sigma, on MoLRG.

n = 48, K = 2 mutually orthogonal subspaces of rank d = 6: below the noise level at which the
subspace is certain the rank is d, above it is K d. The published curves of a trained low-rank
autoencoder and of a U-Net are drawn beside it.

References:
    Wang et al. 2024, arXiv 2409.02426, the figure of Jacobian ranks (values read off the plot).
"""

import argparse
import csv
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion import corruption, linalg, reporting, schedules, subspaces
from lowdim_diffusion.distributions import MoLRG

DIM, NUM_COMPONENTS, RANK = 48, 2, 6
INVERSE_SIGMA = (500, 125, 50, 10, 1.67, 0.91, 0.3, 0.12, 0.08, 0.04, 0.02, 0.01)
PUBLISHED = {
    "low-rank DAE (published)": (0.125,) * 5 + (0.23,) + (0.25,) * 6,
    "U-Net (published)": ((0.98, 0.96, 0.94, 0.22, 0.125, 0.19, 0.485, 0.667) + (0.668,) * 4),
}
NUM_POINTS = {"smoke": 16, "cpu": 512, "paper": 4096}


def rank_ratios(num_points: int, seed: int = 0) -> np.ndarray:
    """Return ``[levels, num_points]`` rank / n of the exact Jacobian at ``x_0 + sigma eps``."""
    frame_key, data_key, noise_key = jax.random.split(jax.random.key(seed), 3)
    p = MoLRG(linalg.random_frames(frame_key, NUM_COMPONENTS, DIM, RANK, orthogonal=True))
    x0, _ = p.sample(data_key, num_points)
    schedule = schedules.VE(1e-3, 200.0)
    sigmas = 1 / jnp.asarray(INVERSE_SIGMA)

    def at(sigma: jax.Array) -> jax.Array:
        x_t, _ = corruption.perturb(noise_key, schedule, x0, sigma)

        def rank(x: jax.Array) -> jax.Array:
            jacobian = p.posterior_jacobian(x[None], 1.0, sigma)[0]
            return subspaces.numerical_rank(jnp.linalg.svd(jacobian, compute_uv=False))

        return jax.lax.map(rank, x_t, batch_size=64) / DIM

    return np.asarray(jax.jit(lambda s: jax.lax.map(at, s))(sigmas))


def main() -> int:
    """Write ``jacobian_rank.csv``, the figure and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.jacobian_rank")
    parser.add_argument("--preset", choices=NUM_POINTS, default="cpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/jacobian_rank"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ratios = rank_ratios(NUM_POINTS[options.preset], options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    columns = ["1/sigma", "exact mean", "exact std", *PUBLISHED]
    means, stds = ratios.mean(1).tolist(), ratios.std(1).tolist()
    rows = list(zip(INVERSE_SIGMA, means, stds, *PUBLISHED.values(), strict=True))
    with open(options.out / "jacobian_rank.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    sigmas = 1 / np.asarray(INVERSE_SIGMA)
    figure = reporting.figures.rank_curve(
        sigmas,
        ratios,
        exact=np.asarray(PUBLISHED["low-rank DAE (published)"]),
        label="exact posterior mean",
        exact_label="low-rank DAE (published)",
    )
    figure.savefig(options.out / "jacobian_rank.png", dpi=150)
    report = reporting.Report(
        "Jacobian rank on MoLRG", f"n = {DIM}, K = {NUM_COMPONENTS}, d = {RANK}"
    )
    report.section("Rank over dimension against 1/sigma")
    report.figure(figure, caption="Exact posterior mean beside the published low-rank DAE.")
    text = [[f"{row[0]:g}", *(f"{value:.3f}" for value in row[1:])] for row in rows]
    report.table(columns, text)
    report.write(options.out / "report.html")
    for row in text:
        print("  ".join(f"{cell:>8}" for cell in row))
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
