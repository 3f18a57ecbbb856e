"""What classifier-free guidance does: a mean shift and two contrastive parts, each by itself.

*Gaussians.* A class and all data as two Gaussians of 24 dimensions, with 4 directions that vary
more within the class, 4 that vary more in all data and 4 that vary alike. The three terms add up to
the guidance exactly; samples guided by one term alone show what it does: the mean shift moves, the
positive part widens the class's own directions, the negative part narrows the generic ones. Along a
direction the samples have the standard deviation ``c^w u^(1 - w)``.

*Digits.* A network trained with labels, some of them dropped, and the same three terms from the
class means and covariances of its training images (linear guidance), and from the Jacobians of the
network at each noisy image (local guidance). How near linear guidance is to the network's at each
noise level; images guided by each, and by each term alone; the share of them that a classifier
trained on other images gives the class asked for.

References:
    Li, Wang, Qu 2025, arXiv 2505.19210.
"""

import argparse
import functools
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
    data,
    denoisers,
    distributions,
    generalization,
    guidance,
    losses,
    networks,
    reporting,
    sampling,
    schedules,
    solvers,
    training,
)

SCHEDULE = schedules.VE()
SIGMAS = np.asarray(schedules.karras_grid(12, 0.02, 80.0)[:-1])
NUM_CLASSES = 10
TERMS = ("mean_shift", "positive", "negative")
CASES: dict[str, dict[str, float]] = {
    "no guidance": {},
    "all terms": dict.fromkeys(TERMS, 1.0),
    **{term.replace("_", " "): {term: 1.0} for term in TERMS},
    **{
        f"all but {term.replace('_', ' ')}": dict.fromkeys({*TERMS} - {term}, 1.0) for term in TERMS
    },
}
"""Which terms guide; each has the same weight."""
SHOWN = 12


class Preset(NamedTuple):
    """Sizes of the experiment."""

    width: int
    num_steps: int
    num_samples: int
    """Of each class and case."""
    num_points: int
    """Noisy images of each class at which guidances are compared."""
    num_gaussian: int
    sampler_steps: int


PRESETS = {
    "smoke": Preset(32, 100, 12, 4, 500, 6),
    "cpu": Preset(256, 6000, 60, 40, 20_000, 18),
    "paper": Preset(512, 40_000, 500, 150, 200_000, 36),
}

# ---- Gaussians ----------------------------------------------------------------------------------

DIM, BLOCK = 24, 4
SCALES = {"own": (2.0, 0.5), "generic": (0.5, 2.0), "shared": (1.0, 1.0)}
"""Standard deviations within the class and in all data along four directions each."""


def gaussians() -> tuple[distributions.Gaussian, distributions.Gaussian]:
    """Return the class and all data: noise in 24 dimensions, and what varies in three blocks."""
    c, u = (np.repeat([pair[i] for pair in SCALES.values()], BLOCK) for i in (0, 1))
    directions = np.eye(DIM)[:, : len(c)]
    mean = np.zeros(DIM)
    mean[len(c)] = 3.0  # away from all blocks
    return (
        distributions.Gaussian(mean, directions * c, 0.1),
        distributions.Gaussian(np.zeros(DIM), directions * u, 0.1),
    )


def run_gaussians(preset: Preset, scale: float, seed: int) -> list[dict[str, Any]]:
    """Return a row per case: mean, and spread of each block, of samples so guided."""
    cond, uncond = gaussians()
    terms_fn = guidance.linear_terms(cond, uncond, SCHEDULE)
    ts = schedules.karras_grid(160)  # guided flows are stiff
    start = sampling.initial_noise(
        jax.random.key(seed), SCHEDULE, ts[0], (preset.num_gaussian, DIM)
    )

    @jax.jit
    def draw(weights: dict[str, Any]) -> jax.Array:
        fn = guidance.guided_by_terms(cond.denoiser(SCHEDULE), terms_fn, **weights)
        return sampling.sample(
            jax.random.key(seed), fn, SCHEDULE, ts, start, solver=solvers.heun()
        ).x

    x_t, t = start[:64] / 40, jnp.asarray(2.0)
    exact = cond.denoiser(SCHEDULE)(x_t, t) - uncond.denoiser(SCHEDULE)(x_t, t)
    error = jnp.linalg.norm(sum(terms_fn(x_t, t)) - exact) / jnp.linalg.norm(exact)
    rows = []
    for case, weights in CASES.items():
        x = np.asarray(draw({term: (scale - 1) * weights.get(term, 0.0) for term in TERMS}))
        blocks = {
            f"std_{name}": float(x[:, i * BLOCK : (i + 1) * BLOCK].std())
            for i, name in enumerate(SCALES)
        }
        mean = float(x[:, len(SCALES) * BLOCK].mean())
        rows.append({"case": case, "scale": scale, "mean": mean, **blocks, "error": float(error)})
    return rows


# ---- digits -------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Digits ``[N, 64]`` in [-1, 1] with labels, to train on and to classify by."""

    x: np.ndarray
    label: np.ndarray
    other: np.ndarray
    other_label: np.ndarray


def digits(seed: int) -> Digits:
    """Return the digits in two parts, two thirds to train on."""
    found = data.digits()
    order = np.random.default_rng(seed).permutation(found.num_examples)
    x, label = found.floats(order).reshape(len(order), -1), np.asarray(found.labels)[order]
    cut = 2 * len(x) // 3
    return Digits(x[:cut], label[:cut], x[cut:], label[cut:])


def train(parts: Digits, preset: Preset, seed: int) -> Callable[[Any, Any, Any], jax.Array]:
    """Return the conditional denoiser ``(x_t, t, label)``; label 10 is no label."""
    std = float(parts.x.std())
    net = networks.make(
        "mlp", data_shape=parts.x.shape[1:], width=preset.width, depth=3, num_classes=NUM_CLASSES
    )
    loss_fn = losses.make_loss(net, SCHEDULE, data_std=std, label_dropout=0.2)
    x, label = jnp.asarray(parts.x), jnp.asarray(parts.label)

    def batch_fn(key: Any, step: Any) -> dict[str, jax.Array]:
        rows = jax.random.randint(jax.random.fold_in(key, step), (128,), 0, len(x))
        return {"x": x[rows], "label": label[rows]}

    fit = lambda key: training.fit(
        key,
        net.init(jax.random.key(seed)),
        loss_fn,
        optax.adam(optax.cosine_decay_schedule(2e-3, preset.num_steps)),
        batch_fn,
        preset.num_steps,
        ema=training.ema.classic(0.999),
    )[0]
    params = jax.jit(fit)(jax.random.key(seed + 1))

    def conditional(x_t: Any, t: Any, label: Any) -> jax.Array:
        cond = jnp.full(x_t.shape[:1], label)
        return denoisers.from_network(net, params, SCHEDULE, data_std=std, cond=cond)(x_t, t)

    return conditional


def laws(parts: Digits) -> tuple[list[distributions.Gaussian], distributions.Gaussian]:
    """Return the Gaussians of each class and of all training images, with a common small floor."""
    fit = functools.partial(distributions.Gaussian.fit, noise_std=0.03)
    return [fit(parts.x[parts.label == c]) for c in range(NUM_CLASSES)], fit(parts.x)


def stacked(items: list[Any]) -> Any:
    """Return one pytree of stacked leaves; ranks are filled up with zero columns."""
    most = max(p.cov_factor.shape[1] for p in items)
    fill = lambda p: jnp.pad(p.cov_factor, ((0, 0), (0, most - p.cov_factor.shape[1])))
    filled = [
        jax.tree.unflatten(jax.tree.structure(p), [p.mean, fill(p), p.noise_std]) for p in items
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *filled)


def compare(
    conditional: Any, parts: Digits, preset: Preset, seed: int
) -> tuple[list[dict[str, Any]], Any]:
    """Return a row per noise level: the guidances compared at noisy images of each class."""
    by_class, all_data = laws(parts)
    each, mean_all = stacked(by_class), all_data.mean

    @jax.jit
    def at(sigma: Any) -> dict[str, jax.Array]:
        def one(c: Any) -> dict[str, jax.Array]:
            cond = jax.tree.map(lambda leaf: leaf[c], each)
            key = jax.random.fold_in(jax.random.key(seed), c)
            clean = jnp.asarray(parts.x)[members[c]]
            x_t = clean + sigma * jax.random.normal(key, clean.shape)
            of_class = lambda x, t: conditional(x, t, c)
            of_all = lambda x, t: conditional(x, t, NUM_CLASSES)
            real = of_class(x_t, sigma) - of_all(x_t, sigma)
            linear = guidance.linear_terms(cond, all_data, SCHEDULE)(x_t, sigma)
            local = guidance.local_terms(of_class, of_all, SCHEDULE, cond.mean, mean_all)(
                x_t, sigma
            )
            inner = lambda a, b: jnp.sum(a * b, axis=1)
            size = lambda a: jnp.sqrt(inner(a, a))
            cosine = lambda a: inner(a, real) / (size(a) * size(real) + 1e-12)
            model = sum(linear)
            three = local.mean_shift + local.positive + local.negative
            return {
                "cosine_linear": cosine(model),
                "cosine_local": cosine(three),
                "cosine_contrastive": cosine(local.positive + local.negative),
                "size": size(real),
                "size_linear": size(model),
                "error_sum": size(sum(local) - real) / size(real),
                **{f"linear_{n}": size(getattr(linear, n)) for n in TERMS},
                **{f"local_{n}": size(getattr(local, n)) for n in (*TERMS, "rest")},
            }

        return jax.tree.map(jnp.mean, jax.lax.map(one, jnp.arange(NUM_CLASSES)))

    chosen = [np.flatnonzero(parts.label == c)[: preset.num_points] for c in range(NUM_CLASSES)]
    least = min(map(len, chosen))
    members = jnp.asarray(np.stack([rows[:least] for rows in chosen]))
    rows = []
    for sigma in SIGMAS:
        found = at(jnp.asarray(sigma))
        rows.append({"sigma": float(sigma), **{k: float(v) for k, v in found.items()}})
    return rows, (each, all_data)


def accuracy(samples: np.ndarray, parts: Digits) -> float:
    """Share of ``[classes, num, 64]`` whose nearest other image has the label asked for."""
    near = generalization.nearest(samples.reshape(-1, samples.shape[-1]), parts.other, k=1)
    labels = parts.other_label[np.asarray(near.index)[:, 0]].reshape(samples.shape[:2])
    return float(np.mean(labels == np.arange(NUM_CLASSES)[:, None]))


def run_digits(
    conditional: Any, fitted: Any, parts: Digits, preset: Preset, scale: float, seed: int
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Return a row per case and its samples ``[classes, num, 64]``, from the same noises."""
    each, all_data = fitted
    ts = schedules.karras_grid(preset.sampler_steps)
    shape = (preset.num_samples, parts.x.shape[1])
    start = sampling.initial_noise(jax.random.key(seed), SCHEDULE, ts[0], shape)

    def guided(c: Any, weights: Any, real: bool) -> Any:
        fn = lambda x, t: conditional(x, t, c)
        if real:
            null = lambda x, t: conditional(x, t, NUM_CLASSES)
            return guidance.classifier_free(fn, null, 1 + weights)
        cond = jax.tree.map(lambda leaf: leaf[c], each)
        terms_fn = guidance.linear_terms(cond, all_data, SCHEDULE)
        return guidance.guided_by_terms(fn, terms_fn, **weights)

    @functools.partial(jax.jit, static_argnames="real")
    def draw(weights: Any, real: bool = False) -> jax.Array:
        one = lambda c: (
            sampling.sample(
                jax.random.key(seed),
                guided(c, weights, real),
                SCHEDULE,
                ts,
                start,
                solver=solvers.heun(),
            ).x
        )
        return jax.lax.map(one, jnp.arange(NUM_CLASSES))

    strength = scale - 1
    made = {"the network's": np.asarray(draw(jnp.asarray(strength), real=True))}
    for case, weights in CASES.items():
        made[case] = np.asarray(draw({n: strength * weights.get(n, 0.0) for n in TERMS}))
    rows = [
        {
            "case": case,
            "scale": scale,
            "accuracy": accuracy(x, parts),
            "std": float(x.std(1).mean()),
        }
        for case, x in made.items()
    ]
    return rows, made


# ---- report -------------------------------------------------------------------------------------


def report_gaussians(report: Any, rows: list[dict[str, Any]]) -> None:
    """The table of what each term does to two Gaussians."""
    report.section(
        "Two Gaussians",
        "Samples of the class guided away from all data, with the same weight on each of the "
        "terms named. The three add up to the guidance within "
        f"{rows[0]['error']:.1e} of its size (asked: 1e-6). Standard deviations within the class: "
        + ", ".join(f"{name} {c:g} ({u:g} in all data)" for name, (c, u) in SCALES.items())
        + "; the mean is 3 along a direction of its own. Under all terms a direction has the "
        f"standard deviation c^w u^(1 - w), w = {rows[0]['scale']:g}.",
    )
    names = ["mean", *(f"std_{name}" for name in SCALES)]
    report.table(
        ["guided by", *(name.replace("_", " ") for name in names)],
        [[row["case"], *(f"{row[name]:.2f}" for name in names)] for row in rows],
        caption="Published, in words: the mean shift moves towards the class, the positive part "
        "amplifies what is specific to it, the negative part suppresses what is generic.",
    )


def report_digits(
    report: Any, levels: list[dict[str, Any]], rows: list[dict[str, Any]], made: Any, out: Any
) -> None:
    """Guidances along the noise level, and images."""
    report.section(
        "A trained network",
        "Linear guidance has the means and covariances of each class and of all training images; "
        "local guidance the network's Jacobians at each noisy image. Published: linear guidance is "
        "like the network's at high and moderate noise and leaves it at low noise.",
    )
    column = lambda name: [row[name] for row in levels]
    figure = reporting.figures.curves(
        {
            "linear": (SIGMAS, column("cosine_linear")),
            "local": (SIGMAS, column("cosine_local")),
            "local, contrastive parts": (SIGMAS, column("cosine_contrastive")),
        },
        xlabel="noise level σ",
        ylabel="cosine to the network's guidance",
        xscale="log",
        level=1.0,
    )
    figure.savefig(out / "cosine.png", dpi=150)
    report.figure(
        figure,
        caption="1 is the same direction. At low noise the "
        "unlabelled network knows the class, and its own Jacobians say little about the shift.",
    )
    figure = reporting.figures.curve_panels(
        {
            "linear": {n.replace("_", " "): (SIGMAS, column(f"linear_{n}")) for n in TERMS}
            | {"sum": (SIGMAS, column("size_linear"))},
            "local": {n.replace("_", " "): (SIGMAS, column(f"local_{n}")) for n in (*TERMS, "rest")}
            | {"sum": (SIGMAS, column("size"))},
        },
        xlabel="noise level σ",
        ylabels=["norm", "norm"],
        xscale="log",
    )
    figure.savefig(out / "terms.png", dpi=150)
    report.figure(
        figure,
        caption="Mean norms of the terms; the sum of the local ones is the network's guidance "
        f"(within {max(column('error_sum')):.0e}), the rest is what its Jacobians do not say.",
    )
    report.section("Images guided by each term", f"Scale {rows[0]['scale']:g}, the same noises.")
    report.table(
        ["guided by", "asked class", "spread"],
        [[r["case"], f"{r['accuracy']:.3f}", f"{r['std']:.3f}"] for r in rows],
        caption="Share whose nearest held-out image has the class asked for; standard deviation of "
        "a pixel within a class.",
    )
    classes = (3, 5, 8)
    for case, x in made.items():
        shown = np.concatenate([x[c, :SHOWN] for c in classes]).reshape(-1, 8, 8, 1)
        picture = reporting.image_grid(shown, columns=min(SHOWN, x.shape[1]))
        (out / f"images_{case.replace(' ', '_').replace(chr(39), '')}.png").write_bytes(
            reporting.png(picture)
        )
        report.picture(picture, f"{case}: classes {', '.join(map(str, classes))}.")


def main() -> int:
    """Write the tables, figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.guidance_mechanism")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--scale", type=float, default=3.0, help="of the guidance; 1 is none")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results/guidance_mechanism")
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    preset, out = PRESETS[options.preset], options.out
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    report = reporting.Report("What guidance does", f"preset {options.preset}")
    rows = run_gaussians(preset, options.scale, options.seed)
    write_csv(out / "gaussians.csv", rows)
    report_gaussians(report, rows)
    parts = digits(options.seed)
    conditional = train(parts, preset, options.seed)
    levels, fitted = compare(conditional, parts, preset, options.seed)
    write_csv(out / "levels.csv", levels)
    rows, made = run_digits(conditional, fitted, parts, preset, options.scale, options.seed)
    write_csv(out / "digits.csv", rows)
    report_digits(report, levels, rows, made, out)
    report.write(out / "report.html")
    print(f"written to {out} in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
