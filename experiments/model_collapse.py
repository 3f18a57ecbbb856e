"""What becomes of models that are trained on what models have made?

*Linear*: least squares fitted to labels of its predecessor, beside the exact theory: the error
grows with every generation if data are replaced, and stays below pi^2 / 6 if they accumulate.

*Gaussian*: low-rank Gaussians fitted to samples of their predecessor lose direction after
direction, though the mean of their total variance stays; with a noise floor the subspace turns.
Accumulated data, or a tenth of real ones, hold it.

*Curation*: of K samples the better ones are kept. The exact law on eight states beside a sampled
loop: E exp(reward) never falls and rises at least as promised, and all ends on the best state,
unless real data hold it.

References:
    Gerstgrasser et al. 2024, arXiv 2404.01413; Ferbach et al. 2024, arXiv 2407.09499.
"""

import argparse
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._tables import write_csv
from lowdim_diffusion import generalization, reporting


class Preset(NamedTuple):
    """Sizes of the experiment."""

    repeats: int
    regressions: int
    """Generations of the linear model."""
    gaussians: int
    curated: int
    num_curated: int
    """Samples per generation in the sampled loop."""


PRESETS = {
    "smoke": Preset(20, 5, 5, 10, 1000),
    "cpu": Preset(400, 20, 60, 50, 100_000),
    "paper": Preset(4000, 50, 200, 2000, 1_000_000),
}
BATCH = 100
"""Repeats at a time."""

# ---- linear -------------------------------------------------------------------------------------

DIM, COUNT = 20, 100
SHOWN = (1, 2, 5, 10, 20)
REFERENCE = {"replace": (0.98, None, 5.1, 10.2, 20.3), "accumulate": (1.02, 1.23, 1.40, 1.46, 1.50)}
"""Errors after SHOWN generations, in units of the theory's first."""


def regression(key: jax.Array, preset: Preset, mix: generalization.Mix) -> jax.Array:
    """Return the squared error of each generation of least squares, ``[G]``."""

    def sample(key: Any, w: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (num, DIM))
        return x, x @ w + jax.random.normal(keys[1], (num,))

    def fit(key: Any, examples: Any, weights: jax.Array) -> jax.Array:
        x, y = examples
        weighted = x * weights[:, None]
        return jnp.linalg.solve(weighted.T @ x, weighted.T @ y)

    return generalization.self_consuming(
        *(key, lambda key, num: sample(key, jnp.zeros(DIM), num), fit, sample),
        *(preset.regressions, COUNT),
        mix=mix,
        measure=lambda key, w: jnp.sum(w**2),
    )


def repeat(run: Any, preset: Preset, seed: int) -> Any:
    """Return what ``run(key)`` gives for each of the preset's repeats, as numpy arrays."""
    keys = jax.random.split(jax.random.key(seed), preset.repeats)
    all_of = jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=min(BATCH, preset.repeats)))
    return jax.tree.map(np.asarray, all_of(keys))


def linear(report: reporting.Report, preset: Preset, out: pathlib.Path, seed: int) -> None:
    """Write ``linear.csv``, a figure and a section."""
    unit = float(generalization.linear_collapse(1, COUNT, DIM)[0])
    generations = np.arange(1, preset.regressions + 1)
    lines, dashed, rows, text = {}, {}, [], []
    for mix in ("replace", "accumulate"):
        fit = functools.partial(regression, preset=preset, mix=mix)
        errors = repeat(fit, preset, seed) / unit
        theory = generalization.linear_collapse(preset.regressions, COUNT, DIM, mix=mix)
        theory = np.asarray(theory) / unit
        mean, spread = errors.mean(0), errors.std(0) / preset.repeats**0.5
        lines[mix] = (generations, mean, 2 * spread)
        dashed[f"theory, {mix}"] = (generations, theory)
        for g in range(preset.regressions):
            numbers = {"error": mean[g], "standard_error": spread[g], "theory": theory[g]}
            rows.append(
                {"mix": mix, "generation": g + 1} | {k: float(v) for k, v in numbers.items()}
            )
        for g, before in zip(SHOWN, REFERENCE[mix], strict=True):
            if g <= preset.regressions:
                measured = f"{mean[g - 1]:.2f} ± {spread[g - 1]:.2f}"
                text.append([mix, str(g), measured, f"{theory[g - 1]:.2f}", before or ""])
    columns = ["mix", "generation", "error", "theory", "reference"]
    finish(out, "linear", rows, columns, text)
    report.section(
        "Linear regression",
        f"{DIM} features, {COUNT} samples per generation, {preset.repeats} repeats; errors in "
        "units of s² d / (N - d - 1). For accumulated data the theory is a bound.",
    )
    figure = reporting.figures.curves(
        *(lines,), xlabel="generation", ylabel="error", yscale="log", dashed=dashed
    )
    draw(report, out, "linear", figure, "Test error of each generation; dashed: theory.")
    report.table(columns, text)


# ---- Gaussians ----------------------------------------------------------------------------------

VARIANCES, AMBIENT, FEW = (4.0, 2.0, 1.0, 0.5), 16, 50
NOISES = (0.0, 0.3)
LOOPS = {"replace": {}, "10 % real": {"real_share": 0.1}, "accumulate": {"mix": "accumulate"}}
KNOWN = {"replace": (1.43, 0.089), "10 % real": (2.67, 1.12), "accumulate": (2.97, 1.29)}
"""Effective rank and geometric mean of the variances after 60 generations."""


class Law(NamedTuple):
    """A centred Gaussian with covariance ``factor factor^T + noise^2 I``."""

    factor: jax.Array
    noise: jax.Array


def fit_gaussian(key: Any, x: jax.Array, weights: jax.Array) -> Law:
    """Return the most likely law of rank 4 (probabilistic PCA, mean known to be 0)."""
    covariance = (x * (weights / weights.sum())[:, None]).T @ x
    values, vectors = jnp.linalg.eigh(covariance)  # ascending
    rank = len(VARIANCES)
    noise_var = jnp.maximum(jnp.mean(values[:-rank]), 0)
    scale = jnp.sqrt(jnp.maximum(values[-rank:] - noise_var, 0))
    return Law(vectors[:, -rank:] * scale[None], jnp.sqrt(noise_var))


def sample_gaussian(key: Any, law: Law, num: int) -> jax.Array:
    """Return samples ``[num, 16]``."""
    keys = jax.random.split(key)
    codes = jax.random.normal(keys[0], (num, law.factor.shape[1]))
    return codes @ law.factor.T + law.noise * jax.random.normal(keys[1], (num, AMBIENT))


def gaussian_loop(key: jax.Array, preset: Preset, noise: Any, **options: Any) -> Any:
    """Return :class:`~lowdim_diffusion.generalization.Spread` of each generation."""
    basis = jnp.eye(AMBIENT)[:, : len(VARIANCES)]
    truth = Law(basis * jnp.sqrt(jnp.array(VARIANCES))[None], jnp.asarray(noise))
    return generalization.self_consuming(
        *(key, lambda key, num: sample_gaussian(key, truth, num), fit_gaussian, sample_gaussian),
        *(preset.gaussians, FEW),
        measure=lambda key, law: generalization.spread(law.factor, basis),
        **options,
    )


def gaussian(report: reporting.Report, preset: Preset, out: pathlib.Path, seed: int) -> None:
    """Write ``gaussian.csv``, figures and a section."""
    generations = np.arange(1, preset.gaussians + 1)
    lines: dict[str, dict[str, Any]] = {}
    rows, text = [], []
    for name, options in LOOPS.items():
        run = lambda key, o=options: jax.vmap(functools.partial(gaussian_loop, key, preset, **o))(
            jnp.array(NOISES)
        )
        both = repeat(run, preset, seed)
        for i, noise in enumerate(NOISES):
            found = {metric: values[:, i] for metric, values in both._asdict().items()}
            for metric, values in found.items():
                line = (generations, values.mean(0), 2 * values.std(0) / preset.repeats**0.5)
                lines.setdefault(f"{metric}, noise {noise:g}", {})[name] = line
            means = {metric: values.mean(0) for metric, values in found.items()}
            for g in range(preset.gaussians):
                row = {"noise": noise, "data": name, "generation": g + 1}
                rows.append(row | {k: float(v[g]) for k, v in means.items()})
            known = KNOWN[name] if noise == 0 and preset.gaussians == 60 else ("", "")
            trace, rank, geometric, angle = (float(v[-1]) for v in means.values())
            numbers = [f"{trace / sum(VARIANCES):.2f}", f"{rank:.2f}", f"{geometric:.3f}"]
            numbers += [f"{np.degrees(angle):.1f}°"]
            text.append([f"{noise:g}", name, *numbers, *map(str, known)])
    columns = ["noise", "data", "trace / true", "effective rank", "geometric variance", "angle"]
    columns += ["rank, reference", "variance, reference"]
    finish(out, "gaussian", rows, columns, text)
    report.section(
        "Low-rank Gaussians",
        f"Variances {', '.join(f'{v:g}' for v in VARIANCES)} in {AMBIENT} dimensions, {FEW} "
        f"samples per generation, {preset.repeats} repeats, after {preset.gaussians} generations. "
        "The trace does not show the collapse.",
    )
    captions = {
        "geometric_variance, noise 0": "Geometric mean of the four variances.",
        "effective_rank, noise 0": "Effective rank of the law.",
        "trace, noise 0": "Total variance: a martingale, which does not fall on average.",
        "largest_angle, noise 0.3": "With noise of 0.3: the subspace turns away from the true one.",
    }
    for name, caption in captions.items():
        metric = name.split(",")[0]
        scale = "log" if metric == "geometric_variance" else "linear"
        ylabel = metric.replace("_", " ") + (" (rad)" if "angle" in metric else "")
        figure = reporting.figures.curves(
            lines[name], xlabel="generation", ylabel=ylabel, yscale=scale
        )
        draw(report, out, f"gaussian_{metric}", figure, caption)
    report.table(columns, text)


# ---- curation -----------------------------------------------------------------------------------

STATES = 8
WEIGHTS = (0.25, 0.5, 1.0, 4.0)


def curation(report: reporting.Report, preset: Preset, out: pathlib.Path, seed: int) -> None:
    """Write ``curation.csv``, figures and a section."""
    rewards = jax.random.normal(jax.random.key(seed), (STATES,))
    p = jnp.full(STATES, 1 / STATES)
    generations = np.arange(preset.curated + 1)
    best = float(jnp.exp(rewards.max()))
    lines, rows, text = {}, [], []
    violations = 0
    cases: list[tuple[str, dict[str, Any]]] = [
        ("K = 2", {"num_candidates": 2}),
        ("K = 4", {"num_candidates": 4}),
        ("K infinite", {"num_candidates": None}),
        *((f"K = 2, {w:g} made to 1 real", {"made_weight": w}) for w in WEIGHTS),
    ]
    for name, options in cases:
        run = generalization.curate(p, rewards, preset.curated, **options)
        run = jax.tree.map(np.asarray, run)
        slack = 1e-5 * best
        if "made_weight" not in options:
            falls = run.utility[1:] < np.maximum(run.guaranteed[:-1], run.utility[:-1]) - slack
            violations += int(falls.sum())
        law = np.maximum(run.probabilities, 1e-30)
        divergence = np.sum(law * np.log(law * STATES), axis=1)
        lines[name] = (generations, run.utility / best)
        for g in generations:
            numbers = {"utility": run.utility[g], "largest_probability": run.probabilities[g].max()}
            numbers["divergence"] = divergence[g]
            rows.append({"case": name, "generation": g} | {k: float(v) for k, v in numbers.items()})
        at = min(10, preset.curated)
        gain = run.utility[-1] / run.utility[0] - 1
        largest = [f"{run.probabilities[i].max():.3f}" for i in (at, -1)]
        text.append([name, *largest, f"{100 * gain:.1f} %", f"{divergence[-1]:.3f}"])
    made = generalization.self_consuming(
        jax.random.key(seed + 1),
        lambda key, num: jax.random.randint(key, (num,), 0, STATES),
        lambda key, x, w: jnp.bincount(x, w, length=STATES) / w.sum(),
        lambda key, q, num: jax.random.categorical(key, jnp.log(q), shape=(num,)),
        *(min(11, preset.curated + 1), preset.num_curated),
        reward=lambda x: rewards[x],
    )
    exact = generalization.curate(p, rewards, made.shape[0] - 1).probabilities
    gap = float(jnp.abs(made - exact).max())
    columns = ["case", "p_max at 10", "p_max at the end", "gain of E e^r", "KL to the real law"]
    finish(out, "curation", rows, columns, text)
    report.section(
        "Curation",
        f"{STATES} states with random rewards, {preset.curated} generations, exact. The promised "
        f"improvement failed {violations} times. A loop of {preset.num_curated} samples stayed "
        f"within {gap:.4f} of the exact law for {made.shape[0]} generations.",
    )
    print(f"violations of the bound: {violations}; sampled loop within {gap:.4f} of the exact law")
    figure = reporting.figures.curves(
        lines, xlabel="generation", ylabel="E exp(reward) / best", level=1.0
    )
    draw(report, out, "curation", figure, "Utility of the law; with real data it stays below 1.")
    report.table(columns, text)


# ---- writing ------------------------------------------------------------------------------------


def finish(
    out: pathlib.Path,
    name: str,
    rows: list[dict[str, Any]],
    columns: list[str],
    text: list[list[Any]],
) -> None:
    """Write the table of a part and print its short form."""
    write_csv(out / f"{name}.csv", rows)
    for row in [columns, *text]:
        print("  ".join(f"{cell:>18}" for cell in row))


def draw(report: reporting.Report, out: pathlib.Path, name: str, figure: Any, caption: str) -> None:
    """Write a figure and put it into the report."""
    figure.savefig(out / f"{name}.png", dpi=150)
    report.figure(figure, caption=caption)


PARTS = {"linear": linear, "gaussian": gaussian, "curation": curation}


def main() -> int:
    """Write the tables, the figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.model_collapse")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/model_collapse"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = reporting.Report("Model collapse", "models trained on what models have made")
    for part in options.part:
        start = time.perf_counter()
        PARTS[part](report, PRESETS[options.preset], options.out, options.seed)
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
    report.write(options.out / "report.html")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
