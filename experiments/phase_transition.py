"""Where learning switches on: N_k >= d samples per subspace, for every way to learn them.

Three parts (``--part`` takes some of them):

- ``maps``: success rate over the subspace dimension d and the samples per subspace N_k, n = 48, for
  principal components (K = 1), K-subspaces with mutually orthogonal frames (K = 2, 3; several
  starts, and one random start) and low-rank denoisers trained on noise (K = 1, 2, 3; soft and hard
  assignment), for noise of standard deviation 0, .01 and .1. Success: every component within .5 of
  its match (projector distance). Theory puts the boundary at N_k = d.
- ``collapse``: a neural denoiser (``--network``: an MLP, or a U-Net that takes the 48 numbers for
  a 4x4 picture of three colours) trained on N_k samples of each of two subspaces. Its
  generalization score against N_k / d is one curve for all d. The score here is GL_synth: distance
  of generated samples to the nearest training point, over the same for fresh true samples. Nothing
  is augmented: flips and rotations of such pictures, as the released code has them, leave the
  subspaces.
- ``ranks``: the figure of ``experiments.jacobian_rank``.

References:
    Wang et al. 2024, arXiv 2409.02426, theorems 1-4 and the figures on phase transitions.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import jacobian_rank
from experiments._tables import rows_of, write_csv
from lowdim_diffusion import (
    denoisers,
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

DIM = 48
SUCCESS = 0.5
PARTS = ("maps", "collapse", "ranks")
SHAPES = {"mlp": (DIM,), "unet": (4, 4, 3)}
"""What each network takes an example for."""


class Preset(NamedTuple):
    """Sizes of the experiment."""

    ranks: tuple[int, ...]
    counts: tuple[int, ...]
    noises: tuple[float, ...]
    num_seeds: int
    num_seeds_clusters: int
    num_steps: int
    num_restarts: int
    ratios: tuple[int, ...]
    network_steps: int
    width: int
    channels: int
    num_samples: int
    num_models: int
    networks: tuple[str, ...]


PRESETS = {
    "smoke": Preset(
        (2, 3), (1, 2, 3, 4), (0.0,), 2, 2, 60, 2, (2, 15), 40, 16, 8, 32, 1, ("mlp", "unet")
    ),
    "cpu": Preset(
        tuple(range(2, 9)),
        tuple(range(2, 17)),
        (0.0, 0.01, 0.1),
        20,
        5,
        1000,
        4,
        (2, 6, 15, 30, 60, 120, 400),
        3000,
        256,
        16,
        1000,
        1,
        ("mlp",),
    ),
    "paper": Preset(
        tuple(range(2, 9)),
        tuple(range(2, 17)),
        (0.0, 0.01, 0.1),
        100,
        20,
        2000,
        16,
        (2, 4, 6, 10, 15, 30, 60, 120, 400),
        12000,
        256,
        64,
        1000,
        5,
        ("mlp", "unet"),
    ),
}


# ---- success maps -------------------------------------------------------------------------------

Learner = Callable[[Any, jax.Array, int, int, Any], jax.Array]
"""``(key, x, K, largest rank, rank) -> bases [K, n, largest rank]``."""


def pca(key: Any, x: jax.Array, num_components: int, rank: int, active: Any) -> Any:
    """Principal components (one subspace), without those that no sample lies along."""
    del key, num_components
    basis = subspaces.pca(x, rank)
    held = jnp.linalg.norm(jnp.matmul(x, basis, precision="highest"), axis=0)
    used = (jnp.arange(rank) < active) & (held > 1e-5 * held[0])
    return (basis * used[None, :])[None]


def k_subspaces(
    key: Any, x: jax.Array, num_components: int, rank: int, active: Any, *, start: str, count: int
) -> Any:
    """K-subspaces with jointly orthonormal frames."""
    found = subspaces.k_subspaces(
        key,
        x,
        num_components,
        rank,
        orthogonal=True,
        start=start,  # pyright: ignore[reportArgumentType]
        num_restarts=count,
        active_rank=active,
    )
    return found.bases


def denoiser(
    key: Any,
    x: jax.Array,
    num_components: int,
    rank: int,
    active: Any,
    *,
    assignment: str,
    start: str,
    count: int,
    num_steps: int,
) -> Any:
    """A low-rank denoiser trained on drawn noise."""
    found = training.fit_subspaces(
        key,
        x,
        num_components,
        rank,
        assignment=assignment,  # pyright: ignore[reportArgumentType]
        orthogonal=num_components > 1,
        start=start,  # pyright: ignore[reportArgumentType]
        num_restarts=count,
        num_steps=num_steps,
        active_rank=active,
    )
    return found.bases


def recovery_error(
    point: dict[str, Any], learn: Learner, num_components: int, max_rank: int, max_count: int
) -> dict[str, jax.Array]:
    """Largest projector distance between a true subspace and its match, for one random problem.

    It is taken as ``sqrt(2) ||(I - U U^T) U*||``, in which directions that were not learned count
    as orthogonal to the truth.
    """
    rank, count = point["rank"], point["count"]
    key = jax.random.key(point["seed"])
    key = jax.random.fold_in(jax.random.fold_in(key, rank), count)
    frame_key, inner_key, noise_key, learn_key = jax.random.split(key, 4)
    used = (jnp.arange(max_rank) < rank).astype(jnp.float32)
    bases = linalg.random_frames(frame_key, num_components, DIM, max_rank, orthogonal=True)
    bases = bases * used[None, None, :]
    inner = jax.random.normal(inner_key, (num_components, max_count, max_rank))
    x = jnp.einsum("knd,kbd->kbn", bases, inner, precision="highest")
    x = x + point["noise"] * jax.random.normal(noise_key, x.shape)
    x = jnp.where((jnp.arange(max_count) < count)[None, :, None], x, 0)
    found = learn(learn_key, x.reshape(-1, DIM), num_components, max_rank, rank)
    matched = found[subspaces.match_components(bases, found).perm]
    mm = lambda a, b: jnp.matmul(a, b, precision="highest")
    outside = bases - mm(matched, mm(jnp.swapaxes(matched, 1, 2), bases))
    return {"error": jnp.sqrt(2 * jnp.sum(outside**2, axis=(1, 2))).max()}


def learners(preset: Preset) -> dict[str, tuple[int, Learner]]:
    """Name to ``(K, learner)``."""
    fit = functools.partial(denoiser, num_steps=preset.num_steps)
    found: dict[str, tuple[int, Learner]] = {
        "PCA, K = 1": (1, pca),
        "denoiser, K = 1": (
            1,
            functools.partial(fit, assignment="soft", start="random", count=1),
        ),
    }
    several = preset.num_restarts
    for k in (2, 3):
        found |= {
            f"K-subspaces, K = {k}": (
                k,
                functools.partial(k_subspaces, start="mixed", count=several),
            ),
            f"K-subspaces, one random start, K = {k}": (
                k,
                functools.partial(k_subspaces, start="random", count=1),
            ),
            f"denoiser, K = {k}": (
                k,
                functools.partial(fit, assignment="soft", start="mixed", count=several),
            ),
            f"denoiser, hard, K = {k}": (
                k,
                functools.partial(fit, assignment="hard", start="mixed", count=several),
            ),
            f"denoiser, random starts, K = {k}": (
                k,
                functools.partial(fit, assignment="soft", start="random", count=several),
            ),
            f"denoiser, one random start, K = {k}": (
                k,
                functools.partial(fit, assignment="soft", start="random", count=1),
            ),
        }
    return found


def success_maps(preset: Preset, out: pathlib.Path, seed: int, mesh: Any) -> list[dict[str, Any]]:
    """Run every learner over the grid; return tidy rows."""
    rows = []
    for name, (num_components, learn) in learners(preset).items():
        seeds = preset.num_seeds if num_components == 1 else preset.num_seeds_clusters
        grid = {
            "noise": preset.noises,
            "rank": preset.ranks,
            "count": preset.counts,
            "seed": seed + np.arange(seeds),
        }
        fn = functools.partial(
            recovery_error,
            learn=learn,
            num_components=num_components,
            max_rank=max(preset.ranks),
            max_count=max(preset.counts),
        )
        slug = "".join(c if c.isalnum() else "-" for c in name.lower()).replace("--", "-")
        small = num_components == 1
        table = training.table(
            training.sweep(
                fn,
                grid,
                batch_size=64 if small else 16,
                chunk=1024 if small else 128,
                mesh=mesh,
                path=out / "chunks" / slug,
                progress=name,
            )
        )
        rows += [{"method": name, "K": num_components, **row} for row in rows_of(table)]
    return rows


def rate(rows: list[dict[str, Any]], method: str, noise: float, preset: Preset) -> np.ndarray:
    """Success rates ``[ranks, counts]``."""
    found = np.full((len(preset.ranks), len(preset.counts)), np.nan)
    mine = [r for r in rows if r["method"] == method and np.isclose(r["noise"], noise)]
    for i, rank in enumerate(preset.ranks):
        for j, count in enumerate(preset.counts):
            errors = [r["error"] for r in mine if r["rank"] == rank and r["count"] == count]
            found[i, j] = np.mean(np.asarray(errors) < SUCCESS) if errors else np.nan
    return found


# ---- generalization of a neural denoiser --------------------------------------------------------


def neural(name: str, preset: Preset) -> networks.Network:
    """The network of a name, for 48 numbers."""
    if name == "unet":
        mult = (2, 2, 2)
        return networks.make(
            "unet", data_shape=SHAPES[name], channels=preset.channels, channel_mult=mult
        )
    return networks.make("mlp", data_shape=SHAPES[name], width=preset.width, depth=3)


def generalization(
    point: dict[str, Any], preset: Preset, network: str = "mlp"
) -> dict[str, jax.Array]:
    """Train a network on N_k = ratio d samples of each of two subspaces; score what it makes."""
    max_rank, num_components = 6, 2
    rank, ratio = point["rank"], point["ratio"]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(point["seed"]), rank), ratio)
    frame_key, data_key, fresh_key, init_key, fit_key, sample_key = jax.random.split(key, 6)
    used = (jnp.arange(max_rank) < rank).astype(jnp.float32)
    bases = linalg.random_frames(frame_key, num_components, DIM, max_rank, orthogonal=True)
    bases = bases * used[None, None, :]
    total = num_components * rank * ratio
    most = num_components * max_rank * max(preset.ratios)

    def draw(key: Any, count: int) -> jax.Array:
        inner = jax.random.normal(key, (count, max_rank))
        return jnp.einsum("bnd,bd->bn", bases[jnp.arange(count) % num_components], inner)

    x = draw(data_key, most)
    schedule = schedules.VE()
    data_std = jnp.sqrt(rank / DIM)
    net = neural(network, preset)
    loss_fn = losses.make_loss(net, schedule, data_std=data_std)

    def batch(key: Any, step: Any) -> dict[str, jax.Array]:
        rows = jax.random.randint(jax.random.fold_in(key, step), (256,), 0, total)
        return {"x": x[rows].reshape(-1, *net.data_shape)}

    params, metrics = training.fit(
        fit_key,
        net.init(init_key),
        loss_fn,
        optax.adam(1e-3),
        batch,
        preset.network_steps,
        ema=training.ema.classic(0.999),
    )
    denoise_fn = denoisers.from_network(net, params, schedule, data_std=data_std)
    ts = schedules.karras_grid(18)
    shape = (preset.num_samples, *net.data_shape)
    generated = sampling.sample(
        sample_key, denoise_fn, schedule, ts, shape, solver=solvers.heun()
    ).x.reshape(-1, DIM)

    def nearest(samples: jax.Array) -> jax.Array:
        """Distances to the nearest two training points."""

        def one(s: jax.Array) -> jax.Array:
            squared = jnp.sum((x - s[None, :]) ** 2, axis=1)
            squared = jnp.where(jnp.arange(most) < total, squared, jnp.inf)
            return -jax.lax.top_k(-squared, 2)[0]

        return jnp.sqrt(jax.lax.map(one, samples, batch_size=50))

    near, fresh = nearest(generated), nearest(draw(fresh_key, preset.num_samples))
    return {
        "gl": near[:, 0].mean() / fresh[:, 0].mean(),
        "memorized": jnp.mean(near[:, 0] < near[:, 1] / 3),
        "off_span": jnp.median(subspaces.off_span_energy(generated, bases)),
        "off_union": jnp.median(subspaces.off_union_energy(generated, bases)),
        "loss": metrics["loss"][-200:].mean(),
    }


def collapse(
    preset: Preset, names: Sequence[str], out: pathlib.Path, seed: int
) -> list[dict[str, Any]]:
    """Run the neural denoisers; return tidy rows."""
    grid = {
        "rank": (3, 6),
        "ratio": preset.ratios,
        "seed": seed + np.arange(preset.num_models),
    }
    rows = []
    for name in names:
        found = training.sweep(
            functools.partial(generalization, preset=preset, network=name),
            grid,
            batch_size=1,
            chunk=1,
            path=out / "chunks" / f"collapse-{name}",
            progress=f"neural denoisers ({name})",
        )
        rows += [{"network": name, **row} for row in rows_of(training.table(found))]
    return rows


# ---- the command --------------------------------------------------------------------------------


def report_maps(report: Any, rows: list[dict[str, Any]], preset: Preset, out: pathlib.Path) -> None:
    """Figures and tables of the success maps."""
    report.section("Success maps", "Orange: N = d, where theory puts the boundary.")
    names = list(dict.fromkeys(r["method"] for r in rows))
    for noise in preset.noises:
        panels = {name: rate(rows, name, noise, preset) for name in names}
        figure = reporting.figures.success_maps(
            panels,
            preset.counts,
            preset.ranks,
            xlabel="samples per subspace N",
            ylabel="dimension d",
            line=preset.ranks,
        )
        figure.savefig(out / f"success_noise_{noise:g}.png", dpi=150)
        report.figure(figure, caption=f"Noise of standard deviation {noise:g}.", wide=True)
    report.table(
        ["method", "noise", "N = d - 1", "N = d", "N = d + 1", "N = 2 d"],
        [
            [name, f"{noise:g}", *around(rows, name, noise)]
            for name in names
            for noise in preset.noises
        ],
    )


def around(rows: list[dict[str, Any]], method: str, noise: float) -> list[str]:
    """Success rates over all d just below, at and above the boundary."""
    mine = [r for r in rows if r["method"] == method and np.isclose(r["noise"], noise)]
    cells = []
    for wanted in (lambda d: d - 1, lambda d: d, lambda d: d + 1, lambda d: 2 * d):
        errors = [r["error"] for r in mine if r["count"] == wanted(r["rank"])]
        cells.append(f"{np.mean(np.asarray(errors) < SUCCESS):.2f}" if errors else "")
    return cells


def report_collapse(report: Any, rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Figure and table of the generalization scores."""
    lines = {}
    for network, rank in sorted({(r["network"], r["rank"]) for r in rows}):
        mine = [r for r in rows if (r["network"], r["rank"]) == (network, rank)]
        ratios = sorted({r["ratio"] for r in mine})
        mean = [np.mean([r["gl"] for r in mine if r["ratio"] == q]) for q in ratios]
        lines[f"{network}, d = {rank}"] = (ratios, mean)
    figure = reporting.figures.curves(
        lines,
        xlabel="samples per dimension N_k / d",
        ylabel="generalization score (GL_synth)",
        xscale="log",
        level=1.0,
    )
    figure.savefig(out / "collapse.png", dpi=150)
    report.section("From copying to generating")
    report.figure(
        figure,
        caption="Distance of generated samples to the training set over that of fresh true ones: "
        "0 copies, 1 as new as true samples. Where the curves cross 1 moves with the length of "
        "training; that they collapse is the law.",
    )
    columns = list(rows[0])
    cells = [[row["network"], *(f"{row[c]:.3g}" for c in columns[1:])] for row in rows]
    report.table(columns, cells)


def main() -> int:
    """Run the parts; write .csv, figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.phase_transition")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results/phase_transition")
    )
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--network", choices=SHAPES, nargs="+", help="of the collapse")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=None, help="all by default")
    options = parser.parse_args()
    preset, out = PRESETS[options.preset], options.out
    out.mkdir(parents=True, exist_ok=True)
    sharding.cores_as_devices()
    mesh = sharding.data_mesh(options.devices)
    begin = time.monotonic()
    report = reporting.Report("Phase transition", f"n = {DIM}, preset {options.preset}")
    if "maps" in options.part:
        rows = success_maps(preset, out, options.seed, mesh)
        write_csv(out / "success.csv", rows)
        report_maps(report, rows, preset, out)
    if "collapse" in options.part:
        rows = collapse(preset, options.network or preset.networks, out, options.seed)
        write_csv(out / "collapse.csv", rows)
        report_collapse(report, rows, out)
    if "ranks" in options.part:
        jacobian_rank.add_to(report, options.preset, out, options.seed)
    report.write(out / "report.html")
    print(f"written to {out} in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
