"""From copies to new images: N training images, the width of the network, the length of training.

On real images (``--data``: digits, which are built in, or your own files), models are trained on
the first N images of a fixed random order, for several N, widths, lengths of training and seeds,
and all of them are sampled from the same noises. Against N:

- **GL**: share of samples that resemble no training image; 0 copies, 1 new images;
- **memorized**: share whose nearest training image is three times nearer than the second nearest;
- **RP**: share of noises from which two models make the same image: two seeds, two widths, and a
  model and the optimal denoiser of its training set, which can only copy;
- **agreement**: the same with images that are more alike than 99 % of pairs of real ones.

GL rises from 0 to 1, later for wider networks and longer training. RP to the optimal denoiser falls
to 0. RP between models is high at both ends: they agree because both copy, or because both found
the same distribution.

Two images resemble each other if the cosine of their embeddings is above a threshold, set such that
one in a hundred held-out images counts as a copy of some training image. The published numbers use
the copy-detection network SSCD and .6, on CIFAR-10: compare shapes, not values.

References:
    Zhang et al. 2023, arXiv 2310.05264, figures 2 and 4.
"""

import argparse
import itertools
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _generators as generators
from experiments._generators import MLP, SMOKE, UNET, Examples, Recipe
from experiments._tables import write_csv
from lowdim_diffusion import generalization, reporting, sharding


class Preset(NamedTuple):
    """Sizes of the experiment."""

    recipe: Recipe
    counts: tuple[int, ...]
    """N; those that a data set cannot give are left out."""
    widths: tuple[int, ...]
    num_seeds: int
    num_held_out: int
    size: int | None
    """Side of images read from files; None keeps them as they are."""


PRESETS = {
    "smoke": Preset(SMOKE, (4, 64), (16, 32), 2, 100, 8),
    "cpu": Preset(MLP, (8, 16, 32, 64, 128, 256, 512, 1024, 4096), (128, 256), 2, 500, 16),
    "paper": Preset(UNET, tuple(2**i for i in range(6, 16)), (64, 128, 256), 2, 10_000, None),
}

# Zhang et al. 2023, arXiv 2310.05264, figure 2, read off the plot: CIFAR-10, U-Nets.
PUBLISHED_COUNTS = tuple(2**i for i in range(6, 16))
PUBLISHED_GL = {
    "GL, width 64": (0, 0, 0, 0, 0, 0.22, 0.865, 0.99, 0.995, 0.995),
    "GL, width 128": (0, 0, 0, 0, 0, 0.01, 0.28, 0.815, 0.98, 0.99),
    "GL, width 256": (0, 0, 0, 0, 0.03, 0.01, 0.05, 0.295, 0.985, 0.985),
}
PUBLISHED_RP = {
    "RP, widths 64 and 128": (0.69, 0.66, 0.59, 0.53, 0.46, 0.42, 0.34, 0.18, 0.45, 0.67),
    "RP, widths 128 and 256": (0.645, 0.635, 0.56, 0.48, 0.41, 0.33, 0.17, 0.17, 0.45, 0.845),
    "RP, 128 and optimal": (0.505, 0.465, 0.37, 0.305, 0.245, 0.17, 0.11, 0.04, 0.005, 0),
}


class Results(NamedTuple):
    """What the models of one data set made."""

    examples: Examples
    counts: tuple[int, ...]
    made: dict[tuple[int, int], np.ndarray]
    """``(width, steps)`` to ``[count, seed, num_samples, h, w, c]``."""
    loss: dict[tuple[int, int], np.ndarray]
    """``[count, seed]``."""
    optimal: list[np.ndarray]
    """One per count, ``[num_samples, h, w, c]``."""


def counts_of(preset: Preset, examples: Examples) -> tuple[int, ...]:
    """Return the numbers of examples that the data set can give."""
    counts = tuple(n for n in preset.counts if n <= len(examples.x))
    if not counts:
        raise SystemExit(f"{examples.name}: fewer than {preset.counts[0]} examples to train on")
    return counts


def train(examples: Examples, preset: Preset, out: pathlib.Path, seed: int, mesh: Any) -> Results:
    """Train and sample all models of one data set."""
    counts = counts_of(preset, examples)
    recipe = generators.adapted(preset.recipe, min(preset.widths), examples.x.shape[1:])
    made, loss = {}, {}
    for width, steps in itertools.product(preset.widths, recipe.lengths):
        found = generators.generate(
            examples.x,
            recipe,
            width=width,
            num_steps=steps,
            grid={"count": counts, "first": (0,), "seed": seed + np.arange(preset.num_seeds)},
            mesh=mesh,
            path=out / "chunks" / f"{examples.name}-{width}-{steps}",
            progress=f"{examples.name}, width {width}, {steps} steps",
        ).values
        made[width, steps], loss[width, steps] = found["x"][:, 0], found["loss"][:, 0]
    best = [generators.optimal(examples.x[:n], recipe) for n in counts]
    return Results(examples, counts, made, loss, best)


def score(results: Results, preset: Preset) -> tuple[list[dict[str, Any]], float]:
    """Return tidy rows, one per (N, width, steps), and the threshold of resemblance."""
    x, held_out = results.examples.x, results.examples.held_out
    threshold = float(generalization.calibrate_threshold(held_out, x[: results.counts[-1]]))
    alike = float(generalization.pair_threshold(held_out, x[:2000]))

    @jax.jit
    def same(a: Any, b: Any, threshold: Any = threshold) -> Any:
        return generalization.reproducibility_score(a, b, threshold)

    @jax.jit
    def cosines(a: Any, b: Any) -> Any:
        embed = generalization.default_embedding  # of unit length
        return jnp.sum(embed(a) * embed(b), axis=-1)

    mean = lambda pairs, *at: np.mean([same(a, b, *at) for a, b in pairs]) if pairs else np.nan
    rows = []
    for i, count in enumerate(results.counts):
        optimal = results.optimal[i]
        models = {at: made[i] for at, made in results.made.items()}
        # One search for all models of this N, and for the images to compare them with.
        sets = [*itertools.chain.from_iterable(models.values()), optimal, held_out]
        cosine, near = generators.search(np.concatenate(sets), x[:count])
        ends = np.cumsum([len(s) for s in sets])[:-1]
        split = lambda values, ends=ends: np.split(np.asarray(values), ends)
        novel = [np.mean(c <= threshold) for c in split(cosine)]
        copied = [np.mean(c) for c in split(generalization.is_memorized(near))]
        distance = [np.mean(d) for d in split(near.distance[:, 0])]
        for j, ((width, steps), made) in enumerate(models.items()):
            mine = slice(j * preset.num_seeds, (j + 1) * preset.num_seeds)
            seeds = list(itertools.combinations(made, 2))
            wider = list(zip(made, models.get((2 * width, steps), ()), strict=False))
            best = [(m, optimal) for m in made]
            rows.append(
                {
                    "data": results.examples.name,
                    "N": count,
                    "width": width,
                    "steps": steps,
                    "gl": np.mean(novel[mine]),
                    "memorized": np.mean(copied[mine]),
                    "distance_ratio": np.mean(distance[mine]) / distance[-1],
                    "rp_seeds": mean(seeds),
                    "similarity_seeds": float(np.median(cosines(made[0], made[1]))),
                    "rp_twice_the_width": mean(wider),
                    "rp_optimal": mean(best),
                    "agree_seeds": mean(seeds, alike),
                    "agree_twice_the_width": mean(wider, alike),
                    "agree_optimal": mean(best, alike),
                    "agree_threshold": alike,
                    "gl_optimal": novel[-2],
                    "loss": results.loss[width, steps][i].mean(),
                }
            )
    return rows, threshold


# ---- figures and the report ---------------------------------------------------------------------


def lines(
    rows: list[dict[str, Any]], column: str, lengths: Sequence[int] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Return ``label: (N, value)`` for every width and length of training, or these lengths."""
    found = {}
    for width, steps in dict.fromkeys((r["width"], r["steps"]) for r in rows):
        mine = [r for r in rows if (r["width"], r["steps"]) == (width, steps)]
        if lengths is None or steps in lengths:
            values = [r["N"] for r in mine], [r[column] for r in mine]
            found[f"width {width}, {steps:,} steps"] = values
    return found


def against_count(rows: list[dict[str, Any]], column: str, ylabel: str, **options: Any) -> Any:
    """Return the figure of one score against N: a colour per width, shorter trainings dashed."""
    *shorter, longest = sorted({r["steps"] for r in rows})
    return reporting.figures.curves(
        lines(rows, column, [longest]),
        dashed=lines(rows, column, shorter),
        xlabel="training images N",
        ylabel=ylabel,
        xscale="log",
        **options,
    )


def agreement(rows: list[dict[str, Any]], steps: int, score: str, ylabel: str) -> Any:
    """Return the figure of RP against N: between seeds, and (dashed) to the optimal denoiser."""
    named = lambda column, what: {
        f"{label.split(',')[0]}: {what}": line
        for label, line in lines(rows, column, [steps]).items()
    }
    return reporting.figures.curves(
        named(f"{score}_seeds", "two seeds"),
        dashed=named(f"{score}_optimal", "to optimal"),
        xlabel="training images N",
        ylabel=ylabel,
        xscale="log",
    )


def published() -> tuple[Any, Any]:
    """Return the published curves, GL and RP."""
    named = lambda table: {k: (PUBLISHED_COUNTS, v) for k, v in table.items()}
    axes: dict[str, Any] = {"xlabel": "training images N", "xscale": "log"}
    return (
        reporting.figures.curves(named(PUBLISHED_GL), ylabel="GL", **axes),
        reporting.figures.curves(named(PUBLISHED_RP), ylabel="RP", **axes),
    )


def transition(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Return, for every width and length, the N at which GL passes one half (in log N)."""
    found = []
    for label, (counts, gl) in lines(rows, "gl").items():
        above = np.flatnonzero(np.asarray(gl) > 0.5)
        if not len(above) or above[0] == 0:
            at = f"> {counts[-1]}" if not len(above) else f"< {counts[0]}"
        else:
            j = above[0]
            part = (0.5 - gl[j - 1]) / (gl[j] - gl[j - 1])
            at = f"{np.exp(np.log(counts[j - 1]) + part * np.log(counts[j] / counts[j - 1])):.0f}"
        found.append([label, at, f"{gl[0]:.2f}", f"{gl[-1]:.2f}"])
    return found


def report_data(
    report: Any, results: Results, rows: list[dict[str, Any]], threshold: float, out: pathlib.Path
) -> None:
    """Add one data set to the report."""
    name, x = results.examples.name, results.examples.x
    report.section(
        name.capitalize(),
        f"{x.shape[1]}x{x.shape[2]}x{x.shape[3]} images. Two of them count as the same if the "
        f"cosine of their embeddings is above {threshold:.3f}; one held-out image in a hundred "
        "does with some training image.",
    )
    longest = max(r["steps"] for r in rows)
    figures = {
        "gl": against_count(rows, "gl", "share of new images (GL)", level=0.5),
        "memorized": against_count(rows, "memorized", "memorized fraction"),
        "rp": agreement(rows, longest, "rp", "reproducibility (RP)"),
        "agreement": agreement(rows, longest, "agree", "agreement beyond chance"),
        "distance_ratio": against_count(
            rows, "distance_ratio", "distance to training set / held-out", level=1.0
        ),
    }
    captions = {
        "gl": "Share of samples that resemble no training image.",
        "memorized": "Share of samples three times nearer to one training image than to any other.",
        "rp": f"Share of noises from which two models make the same image ({longest:,} steps).",
        "agreement": "The same, for pairs of images that are more alike than 99 % of pairs of real "
        f"images: cosine above {rows[0]['agree_threshold']:.3f}.",
        "distance_ratio": "Mean distance of samples to the nearest training image over that of "
        "held-out images; above 1 the samples are farther than real images are.",
    }
    for key, figure in figures.items():
        figure.savefig(out / f"{name}_{key}.png", dpi=150)
        report.figure(figure, caption=captions[key])
    report.table(
        ["model", "N at GL = 1/2", f"GL at N = {results.counts[0]}", f"at {results.counts[-1]}"],
        transition(rows),
    )
    width = max(w for w, _ in results.made)
    picked = [0, len(results.counts) // 2, len(results.counts) - 1]
    for i in dict.fromkeys(picked):
        count, samples = results.counts[i], results.made[width, longest][i, 0][:12]
        near = generalization.nearest(samples, x[:count])
        figure = reporting.figures.nearest_pairs(
            samples, x[np.asarray(near.index[:, 0])], near.distance[:, 0], columns=6
        )
        figure.savefig(out / f"{name}_samples_{count}.png", dpi=150)
        report.figure(
            figure,
            wide=True,
            caption=f"N = {count}, width {width}, {longest:,} steps: samples above the nearest of "
            "their training images, with the distance.",
        )
    for i in dict.fromkeys((picked[0], picked[-1])):
        made = results.made[width, longest][i][:2, :16]
        stack = np.concatenate([*made, results.optimal[i][:16]])
        picture = reporting.image_grid(stack, columns=16)
        report.picture(
            picture,
            width=16 * 44,
            caption=f"N = {results.counts[i]}, the same 16 noises: two models (seeds), and the "
            "optimal denoiser of their training set.",
        )
    columns = [c for c in rows[0] if c != "data"]
    report.table(columns, [[_cell(row[c]) for c in columns] for row in rows])


def _cell(value: Any) -> str:
    return "" if isinstance(value, float) and np.isnan(value) else f"{value:.4g}"


def dry_run(preset: Preset, loaded: list[Examples]) -> None:
    """Print what would be trained."""
    for examples in loaded:
        counts = counts_of(preset, examples)
        recipe = generators.adapted(preset.recipe, min(preset.widths), examples.x.shape[1:])
        print(f"{examples.name}: N = {', '.join(map(str, counts))}")
        for width in preset.widths:
            net = generators.network(recipe, width, examples.x.shape[1:])
            print(
                f"  {recipe.network} ({recipe.parametrization}) of width {width}: "
                f"{net.num_params:,} parameters, "
                f"{len(counts) * preset.num_seeds} models x "
                f"{' and '.join(f'{steps:,}' for steps in recipe.lengths)} steps of "
                f"{recipe.batch_size} images, {recipe.num_samples:,} samples each"
            )


def main() -> int:
    """Train, score, draw; write .csv, figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.memorization_generalization")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--data", nargs="+", default=["digits"], metavar="PATH", help="digits, or image files"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results/memorization_generalization")
    )
    parser.add_argument(
        "--counts", type=int, nargs="+", metavar="N", help="instead of the preset's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=None, help="all by default")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained")
    options = parser.parse_args()
    preset, out = PRESETS[options.preset], options.out
    if options.counts:
        preset = preset._replace(counts=tuple(sorted(set(options.counts))))
    sharding.cores_as_devices()
    loaded = [
        generators.load(path, preset.size, preset.counts[-1], preset.num_held_out)
        for path in options.data
    ]
    if options.dry_run:
        dry_run(preset, loaded)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    mesh = sharding.data_mesh(options.devices)
    begin = time.monotonic()
    report = reporting.Report(
        "Memorization and generalization", f"preset {options.preset}, {jax.device_count()} devices"
    )
    rows = []
    for examples in loaded:
        results = train(examples, preset, out, options.seed, mesh)
        found, threshold = score(results, preset)
        report_data(report, results, found, threshold, out)
        rows += found
    report.section(
        "Published",
        "CIFAR-10, U-Nets of three widths trained to convergence; SSCD similarity above .6.",
    )
    for figure in published():
        report.figure(figure)
    write_csv(out / "memorization.csv", rows)
    report.write(out / "report.html")
    print(f"written to {out} in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
