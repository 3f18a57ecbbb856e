"""When do Jacobians tell the subspace of the data? Gauge fields, trained networks, objectives.

*Gauge* (``--part gauge``). The exact denoiser of a Gaussian of rank 5 in 10 dimensions with a field
added that changes no marginal: samples and the dimension stay, the subspace read off the Jacobian
turns, and its asymmetry tells.

*Networks*. An MLP trained on the same Gaussian, looked at along its training: asymmetry, angle to
the true subspace by the right, left and symmetrized singular vectors, dimension estimates; and
whether what separates its score from the true one is a gauge field.

*Objective*. How many dimensions of a random subspace of the parameters the training needs for 90 %
of what full training gains (Li et al. 2018), for data of several ranks: the intrinsic dimension of
the objective beside that of the data.

References:
    Horvat & Pfister 2024, arXiv 2402.03845; Li, Farkhoor, Liu, Yosinski 2018, arXiv 1804.08838.
"""

import argparse
import itertools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._tables import write_csv
from lowdim_diffusion import (
    corruption,
    denoisers,
    distributions,
    linalg,
    losses,
    networks,
    reporting,
    sampling,
    schedules,
    solvers,
    subspaces,
    training,
)

PARTS = ("gauge", "networks", "objective")
DIM, RANK = 10, 5
SCHEDULE = schedules.VE()
REFERENCE = {
    0.0: ("0", "0"),
    0.1: (".08 - .10", ".04 - .05"),
    0.3: (".23 - .31", ".12 - .16"),
    1.0: (".43 - .49", ".24 - .28"),
}
"""Sine of the angle and asymmetry, measured elsewhere with a matrix whose scale is not known."""


class Preset(NamedTuple):
    """Sizes of the experiment."""

    strengths: tuple[float, ...]
    num_samples: int
    width: int
    checkpoints: tuple[int, ...]
    sigmas: tuple[float, ...]
    num_points: int
    ranks: tuple[int, ...]
    dims: tuple[int, ...]
    small_width: int
    small_steps: int


PRESETS = {
    "smoke": Preset((0.0, 0.3), 500, 16, (20, 60), (0.1, 1.0), 8, (1, 4), (4, 32), 16, 60),
    "cpu": Preset(
        (0.0, 0.03, 0.1, 0.3, 1.0),
        20_000,
        128,
        (250, 1000, 4000),
        (0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0),
        64,
        (1, 2, 4, 8),
        (16, 32, 64, 128, 256, 512, 1024, 2048),
        16,
        1000,
    ),
    "paper": Preset(
        (0.0, 0.03, 0.1, 0.3, 1.0),
        200_000,
        512,
        (250, 1000, 4000, 16_000, 64_000),
        (0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0),
        1000,
        (1, 2, 4, 8),
        (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
        64,
        20_000,
    ),
}


def law(seed: int) -> distributions.Gaussian:
    """Return the standard Gaussian of a random subspace."""
    basis = linalg.random_frames(jax.random.key(seed), 1, DIM, RANK)[0]
    return distributions.Gaussian(jnp.zeros(DIM), basis)


def look(
    key: Any, denoise_fn: Any, basis: jax.Array, x: jax.Array, sigma: Any
) -> dict[str, jax.Array]:
    """Return what a denoiser's Jacobians say about the subspace, means over noisy points."""
    x_key, svd_key = jax.random.split(key)
    x_t = x + sigma * jax.random.normal(x_key, x.shape)
    at = lambda x: denoise_fn(x, sigma)
    frames = jnp.broadcast_to(basis[None], (len(x), *basis.shape))
    sine = lambda v: jnp.sin(subspaces.principal_angles(v, frames)[:, -1]).mean()
    u, _, vt = subspaces.jacobian_svd(at, x_t, RANK, key=svd_key)
    half, *_ = subspaces.jacobian_svd(at, x_t, RANK, key=svd_key, symmetric=True)
    rank = lambda **options: subspaces.dimension.jacobian_rank(
        denoise_fn, SCHEDULE, x, sigma, rule="above", **options
    )
    return {
        "sine_right": sine(jnp.swapaxes(vt, 1, 2)),
        "sine_left": sine(u),
        "sine_symmetric": sine(half),
        "asymmetry": subspaces.jacobian_asymmetry(key, at, x_t).mean(),
        "rank": rank().mean(),
        "rank_symmetric": rank(symmetric=True).mean(),
        "normal_bundle": subspaces.dimension.normal_bundle(
            svd_key, denoise_fn, SCHEDULE, x, sigma
        ).mean(),
        "flipd": subspaces.dimension.flipd(denoise_fn, SCHEDULE, x, sigma).mean(),
    }


# ---- gauge --------------------------------------------------------------------------------------


def turning(seed: int) -> np.ndarray:
    """Return a random antisymmetric matrix with all singular values 1."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(DIM, DIM)))[0]
    return q @ np.kron(np.eye(DIM // 2), [[0, 1], [-1, 0]]) @ q.T


def run_gauge(preset: Preset, seed: int) -> list[dict[str, Any]]:
    """Return a row per strength."""
    p, matrix, key = law(seed), turning(seed), jax.random.key(seed + 1)
    x, _ = p.sample(key, preset.num_points)
    ts = schedules.karras_grid(160)  # fewer are too few for the turning at c = 1

    @jax.jit
    def at(strength: Any) -> dict[str, jax.Array]:
        fn = subspaces.gauged(p.denoiser(SCHEDULE), SCHEDULE, matrix, strength=strength)
        shape = (preset.num_samples, DIM)
        drawn = sampling.sample(key, fn, SCHEDULE, ts, shape, solver=solvers.heun()).x
        cov = jnp.matmul(drawn.T, drawn, precision="highest") / len(drawn)
        return {
            "covariance_error": jnp.linalg.norm(cov - p.moments()[1]),
            **look(key, fn, p.basis, x, 0.05),
        }

    found = [(c, at(jnp.asarray(c))) for c in preset.strengths]
    return [{"strength": c, **{k: float(v) for k, v in f.items()}} for c, f in found]


def report_gauge(report: Any, rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """The table, and the angles against the strength."""
    report.section(
        "A gauge field on an exact denoiser",
        "Rank 5 in 10 dimensions, sigma = .05; the field is c A Sigma^-1 x, A antisymmetric with "
        "all singular values 1. Covariance: distance of that of the samples from the true one.",
    )
    columns = ["covariance_error", "rank", "normal_bundle", "flipd", "sine_right", "sine_left"]
    columns += ["sine_symmetric", "asymmetry"]
    report.table(
        ["c", *(c.replace("_", " ") for c in columns), "reference: sine, asymmetry"],
        [
            [
                f"{r['strength']:g}",
                *(f"{r[c]:.3f}" for c in columns),
                ", ".join(REFERENCE.get(r["strength"], ("",))),
            ]
            for r in rows
        ],
        caption="Sine of the largest angle between the true subspace and that of the five leading "
        "singular vectors: right, left, and of the symmetric part of the Jacobian.",
    )
    strengths = [r["strength"] for r in rows]
    kinds = ("sine_right", "sine_symmetric", "sine_left", "asymmetry")
    figure = reporting.figures.curves(
        {k.replace("_", ", "): (strengths, [r[k] for r in rows]) for k in kinds},
        xlabel="strength of the gauge c",
        ylabel="sine of the angle, asymmetry",
    )
    figure.savefig(out / "gauge.png", dpi=150)
    report.figure(figure, caption="What turns, and what tells.")


# ---- networks -----------------------------------------------------------------------------------


def train(net: Any, loss_fn: Any, draw: Callable[[Any], Any], at: tuple[int, ...], key: Any) -> Any:
    """Return the averaged parameters after each number of steps."""
    init_key, batch_key, loss_key = jax.random.split(key, 3)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, max(at)))
    average = training.ema.classic(0.999)
    step = training.make_train_step(loss_fn, optimizer, ema=average)

    def update(state: Any) -> Any:
        batch = {"x": draw(jax.random.fold_in(batch_key, state.step))}
        return step(state, batch, jax.random.fold_in(loss_key, state.step))[0]

    def until(state: Any, stop: Any) -> tuple[Any, Any]:
        state = jax.lax.while_loop(lambda state: state.step < stop, update, state)
        return state, state.averaged

    start = training.init_state(net.init(init_key), optimizer, ema=average)
    return jax.lax.scan(until, start, jnp.asarray(at))[1]


def run_networks(preset: Preset, seed: int) -> list[dict[str, Any]]:
    """Return a row per checkpoint and noise level."""
    p, key = law(seed), jax.random.key(seed + 2)
    data_std = (RANK / DIM) ** 0.5
    net = networks.make("mlp", data_shape=(DIM,), width=preset.width, depth=3)
    level = losses.log_uniform(0.02, 40.0)
    loss_fn = losses.make_loss(net, SCHEDULE, data_std=data_std, level=level)
    averaged = jax.jit(
        lambda key: train(net, loss_fn, lambda k: p.sample(k, 256)[0], preset.checkpoints, key)
    )(key)
    x, _ = p.sample(jax.random.fold_in(key, 1), preset.num_points)
    many, _ = p.sample(jax.random.fold_in(key, 2), preset.num_samples)

    @jax.jit
    def at(params: Any, sigma: Any) -> dict[str, jax.Array]:
        fn = denoisers.from_network(net, params, SCHEDULE, data_std=data_std)
        noisy, _ = corruption.perturb(key, SCHEDULE, many, sigma)
        true = p.score(noisy, 1.0, sigma)
        rest = denoisers.score_fn(fn, SCHEDULE)(noisy, sigma) - true
        scores = subspaces.gauge_scores(key, rest, noisy)
        size = lambda a: jnp.sqrt(jnp.mean(jnp.sum(a**2, axis=1)))
        return {
            **look(key, fn, p.basis, x, sigma),
            "score_error": size(rest) / size(true),
            "gauge_score": jnp.abs(scores).mean(),
        }

    rows = []
    for i, count in enumerate(preset.checkpoints):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], averaged)
        for sigma in preset.sigmas:
            found = {k: float(v) for k, v in at(params, jnp.asarray(sigma)).items()}
            rows.append({"steps": count, "sigma": sigma, **found})
    return rows


def report_networks(report: Any, rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Curves along the noise level, one line per checkpoint, and the last checkpoint's table."""
    report.section(
        "A trained network",
        "The MLP at clean points with noise. The score of the Gaussian is known, so what the "
        "network adds can be tested: a gauge field has standard scores of about .8 in the mean.",
    )
    counts = sorted({r["steps"] for r in rows})
    of = lambda count, name: [r[name] for r in rows if r["steps"] == count]
    sigmas = of(counts[0], "sigma")
    panels = {
        title: {f"{count} steps": (sigmas, of(count, name)) for count in counts}
        for title, name in (
            ("asymmetry of the Jacobian", "asymmetry"),
            ("right singular vectors", "sine_right"),
            ("symmetric part", "sine_symmetric"),
        )
    }
    figure = reporting.figures.curve_panels(
        panels,
        xlabel="noise level σ",
        ylabels=["asymmetry", "sine of the angle", "sine of the angle"],
        xscale="log",
        yscale="log",
    )
    figure.savefig(out / "networks.png", dpi=150)
    report.figure(figure, caption="Angles to the true subspace.")
    columns = ["sine_right", "sine_left", "sine_symmetric", "asymmetry", "rank", "rank_symmetric"]
    columns += ["normal_bundle", "flipd", "score_error", "gauge_score"]
    report.table(
        ["sigma", *(c.replace("_", " ") for c in columns)],
        [
            [f"{r['sigma']:g}", *(f"{r[c]:.3f}" for c in columns)]
            for r in rows
            if r["steps"] == counts[-1]
        ],
        caption=f"After {counts[-1]} steps; the true dimension is {RANK}. Score error: relative, "
        "root mean square.",
    )


# ---- objective ----------------------------------------------------------------------------------

WIDE = 16
"""Dimension of the data whose rank varies."""


def run_objective(preset: Preset, seed: int) -> list[dict[str, Any]]:
    """Return a row per rank and dimension of the subspace, and one (dim = D) of full training."""
    most, key = max(preset.dims), jax.random.key(seed + 3)
    frame = linalg.random_frames(key, 1, WIDE, max(preset.ranks))[0]
    net = networks.make("mlp", data_shape=(WIDE,), width=preset.small_width, depth=1)
    loss_fn = losses.make_loss(net, SCHEDULE)
    start = net.init(jax.random.fold_in(key, 1))
    size = sum(leaf.size for leaf in jax.tree.leaves(start))
    most = min(most, size)
    expand = training.random_subspace(jax.random.fold_in(key, 2), start, most, kind="fastfood")
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, preset.small_steps))

    def draw(rank: Any, key: Any, num: int) -> dict[str, jax.Array]:
        z = (
            jax.random.normal(key, (num, frame.shape[1]))
            * (jnp.arange(frame.shape[1]) < rank)[None]
        )
        return {"x": 0.5 * jnp.sqrt(WIDE / rank) * z @ frame.T}

    def final(rank: Any, loss: Any, params: Any) -> tuple[jax.Array, jax.Array]:
        batch_fn = lambda key, step: draw(rank, jax.random.fold_in(key, step), 128)
        trained, _ = training.fit(key, params, loss, optimizer, batch_fn, preset.small_steps)
        held = draw(rank, jax.random.fold_in(key, 3), 8192)
        value = lambda params: jnp.mean(loss(params, held, jax.random.fold_in(key, 4)))
        return value(params), value(trained)

    def within(case: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
        rank, dim = case
        inside = jnp.arange(most) < dim
        loss = lambda theta, batch, key: loss_fn(expand(jnp.where(inside, theta, 0)), batch, key)
        return final(rank, loss, jnp.zeros(most))

    dims = [d for d in preset.dims if d <= most]
    cases = [(r, d) for r in preset.ranks for d in dims]
    grid = tuple(jnp.asarray(column, jnp.float32) for column in zip(*cases, strict=True))
    _, inside = jax.jit(lambda grid: jax.lax.map(within, grid))(grid)
    ranks = jnp.asarray(preset.ranks, jnp.float32)
    first, full = jax.jit(
        lambda ranks: jax.lax.map(lambda rank: final(rank, loss_fn, start), ranks)
    )(ranks)
    rows = []
    for i, rank in enumerate(preset.ranks):
        gain = float(first[i] - full[i])
        reached = [(dims[j], float(inside[i * len(dims) + j])) for j in range(len(dims))]
        for dim, value in [*reached, (size, float(full[i]))]:
            share = (float(first[i]) - value) / gain
            rows.append({"rank": rank, "dim": dim, "loss": value, "share": share})
    return rows


def needed(rows: list[dict[str, Any]], rank: int, share: float = 0.9) -> float:
    """Dimension at which the share is reached, between grid points by the logarithm of d."""
    mine = sorted((r["dim"], r["share"]) for r in rows if r["rank"] == rank)
    for (d0, s0), (d1, s1) in itertools.pairwise(mine):
        if s0 < share <= s1:
            return math.exp(math.log(d0) + (share - s0) / (s1 - s0) * math.log(d1 / d0))
    return float(mine[0][0])


def report_objective(report: Any, rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Share of the gain against d, and the dimension needed against the rank."""
    ranks = sorted({r["rank"] for r in rows})
    size = max(r["dim"] for r in rows)
    report.section(
        "The intrinsic dimension of the objective",
        f"Denoising data of several ranks in {WIDE} dimensions, with the same variance, by an MLP "
        f"of {size} parameters trained in random subspaces of them (Fastfood, nested). Published "
        "for classifiers: 750 of MNIST with a fully connected network, 290 with LeNet.",
    )
    figure = reporting.figures.curves(
        {
            f"rank {rank}": tuple(
                np.array([(r["dim"], r["share"]) for r in rows if r["rank"] == rank]).T
            )
            for rank in ranks
        },
        xlabel="dimension d of the random subspace",
        ylabel="share of full training's gain",
        xscale="log",
        level=0.9,
    )
    figure.savefig(out / "objective.png", dpi=150)
    report.figure(figure, caption="The last point of each curve is full training.")
    report.table(
        ["rank of the data", "d for 90 %", "loss of full training"],
        [
            [
                rank,
                f"{needed(rows, rank):.0f}",
                f"{next(r['loss'] for r in rows if (r['rank'], r['dim']) == (rank, size)):.3f}",
            ]
            for rank in ranks
        ],
    )


def main() -> int:
    """Run the parts; write .csv, figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.jacobian_trust")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/jacobian_trust"))
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    preset, out = PRESETS[options.preset], options.out
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    report = reporting.Report("Trust in Jacobian subspaces", f"preset {options.preset}")
    work: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "gauge": (run_gauge, report_gauge),
        "networks": (run_networks, report_networks),
        "objective": (run_objective, report_objective),
    }
    for part in options.part:
        run, write = work[part]
        rows = run(preset, options.seed)
        write_csv(out / f"{part}.csv", rows)
        write(report, rows, out)
    report.write(out / "report.html")
    print(f"written to {out} in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
