"""Two models that never saw the same image make the same images.

For several N, one model is trained on N images and another on N others; both are sampled from the
same noises. At small N each copies its own half, and they have nothing in common. At large N they
agree: what they generate is not in either half but in the distribution. Beside them, without any
training: the Gaussians with the moments of the two halves, which agree much earlier (the images of
a good model are near those of its Gaussian), and the optimal denoisers of the halves, which cannot
agree since they only copy.

References:
    Li, Dai & Qu 2024, arXiv 2410.24060, section 5 (strong generalization); Kadkhodaie et al. 2024,
    arXiv 2310.02557, figure 2.
"""

import argparse
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import _generators as generators
from experiments._generators import MLP, SMOKE, UNET, Examples, Recipe
from experiments._tables import write_csv
from lowdim_diffusion import generalization, reporting, sharding


class Preset(NamedTuple):
    """Sizes of the experiment."""

    recipe: Recipe
    counts: tuple[int, ...]
    """N in each half; those that a data set cannot give are left out."""
    width: int
    num_held_out: int
    size: int | None


PRESETS = {
    "smoke": Preset(SMOKE, (4, 32), 32, 100, 8),
    "cpu": Preset(MLP, (8, 32, 128, 512, 800, 4096), 128, 180, 16),
    "paper": Preset(UNET, (64, 256, 1024, 4096, 16_384, 35_000), 128, 5_000, None),
}
KINDS = ("models", "Gaussians", "optimal denoisers")


class Pair(NamedTuple):
    """What two halves of N images make of the same noises, in three ways."""

    count: int
    halves: tuple[np.ndarray, np.ndarray]
    made: dict[str, tuple[np.ndarray, np.ndarray]]
    """One of :data:`KINDS` to the samples ``[num_samples, h, w, c]`` of either half."""


def train(
    examples: Examples, preset: Preset, out: pathlib.Path, seed: int, mesh: Any
) -> list[Pair]:
    """Train and sample the two models of every N."""
    counts = tuple(n for n in preset.counts if 2 * n <= len(examples.x))
    if not counts:
        raise SystemExit(f"{examples.name}: fewer than {2 * preset.counts[0]} examples")
    middle = counts[-1]
    recipe = generators.adapted(preset.recipe, preset.width, examples.x.shape[1:])
    found = generators.generate(
        examples.x[: 2 * middle],
        recipe,
        width=preset.width,
        num_steps=recipe.lengths[-1],
        grid={"count": counts, "first": (0, middle), "seed": (seed,)},
        mesh=mesh,
        path=out / "chunks" / examples.name,
        progress=examples.name,
    ).values["x"][:, :, 0]
    pairs = []
    for made, count in zip(found, counts, strict=True):
        halves = examples.x[:count], examples.x[middle : middle + count]
        each = lambda make, halves=halves: tuple(make(half, preset.recipe) for half in halves)
        three = (tuple(made), each(generators.gaussian), each(generators.optimal))
        pairs.append(Pair(count, halves, dict(zip(KINDS, three, strict=True))))
    return pairs


def score(examples: Examples, pairs: list[Pair]) -> tuple[list[dict[str, Any]], float]:
    """Return tidy rows, one per N and kind, and the threshold of resemblance."""
    threshold = float(
        generalization.calibrate_threshold(examples.held_out, np.concatenate(pairs[-1].halves))
    )
    embed = jax.jit(generalization.default_embedding)  # of unit length
    alike = float(generalization.pair_threshold(examples.held_out, pairs[-1].halves[0][:2000]))
    rows = []
    for count, halves, kinds in pairs:
        for kind, (a, b) in kinds.items():
            cosine, near = zip(*map(generators.search, (a, b), halves), strict=True)
            copied = [generalization.is_memorized(found) for found in near]
            error = np.sqrt(((a - b) ** 2).reshape(len(a), -1).mean(1))
            rows.append(
                {
                    "data": examples.name,
                    "N": count,
                    "kind": kind,
                    "similarity": np.median(np.sum(embed(a) * embed(b), axis=1)),
                    "rp": float(generalization.reproducibility_score(a, b, threshold)),
                    "agree": float(generalization.reproducibility_score(a, b, alike)),
                    "rmse": np.median(error),
                    "gl": np.mean(np.asarray(cosine) <= threshold),
                    "memorized": np.mean(copied),
                }
            )
    return rows, threshold


def against_count(rows: list[dict[str, Any]], column: str, ylabel: str) -> Any:
    """Return the figure of one column against N, a line per kind."""
    lines = {}
    for kind in KINDS:
        mine = [r for r in rows if r["kind"] == kind]
        lines[kind] = ([r["N"] for r in mine], [r[column] for r in mine])
    return reporting.figures.curves(
        lines, xlabel="training images N in each half", ylabel=ylabel, xscale="log"
    )


def report_data(
    report: Any,
    examples: Examples,
    pairs: list[Pair],
    rows: list[dict[str, Any]],
    threshold: float,
    out: pathlib.Path,
) -> None:
    """Add one data set to the report."""
    name, shown = examples.name, 14
    report.section(
        name.capitalize(),
        f"Two images are the same if the cosine of their embeddings is above {threshold:.3f}; one "
        "held-out image in a hundred is the same as some training image.",
    )
    for column, ylabel, caption in (
        (
            "similarity",
            "median cosine of embeddings",
            "Likeness of what the halves make of the same noise; 1 is the same image.",
        ),
        (
            "agree",
            "agreement beyond chance",
            "Share of noises from which both make the same image: more alike than 99 % of pairs of "
            "real images.",
        ),
        (
            "rmse",
            "median RMS difference",
            "Difference between what the halves make of the same "
            "noise, root mean square over pixels in [-1, 1].",
        ),
        (
            "gl",
            "share of new images (GL)",
            "Share of samples that resemble no image of their own half.",
        ),
    ):
        figure = against_count(rows, column, ylabel)
        figure.savefig(out / f"{name}_{column}.png", dpi=150)
        report.figure(figure, caption=caption)
    for pair in dict.fromkeys((0, len(pairs) // 2, len(pairs) - 1)):
        count, halves, kinds = pairs[pair]
        lines = []
        for made, half in zip(kinds["models"], halves, strict=True):
            index = np.asarray(generalization.nearest(made[:shown], half).index[:, 0])
            lines += [made[:shown], half[index]]
        lines += [made[:shown] for made in kinds["Gaussians"]]
        picture = reporting.image_grid(np.concatenate(lines), columns=shown)
        (out / f"{name}_{count}.png").write_bytes(reporting.png(picture))
        report.picture(
            picture,
            width=shown * 50,
            caption=f"N = {count}, a column per noise. Rows: the first half's model, the nearest "
            "image of the first half, the second half's model, the nearest image of the second "
            "half, the Gaussians of both halves.",
        )
    columns = [c for c in rows[0] if c != "data"]
    report.table(
        columns,
        [
            [row[c] if isinstance(row[c], str | int) else f"{row[c]:.3g}" for c in columns]
            for row in rows
        ],
    )


def main() -> int:
    """Train, score, draw; write .csv, figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.disjoint_halves")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--data", nargs="+", default=["digits"], metavar="PATH", help="digits, or image files"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/disjoint_halves"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=None, help="all by default")
    options = parser.parse_args()
    preset, out = PRESETS[options.preset], options.out
    sharding.cores_as_devices()
    out.mkdir(parents=True, exist_ok=True)
    mesh = sharding.data_mesh(options.devices)
    begin = time.monotonic()
    report = reporting.Report(
        "Disjoint halves", f"preset {options.preset}, {jax.device_count()} devices"
    )
    rows = []
    for path in options.data:
        examples = generators.load(path, preset.size, 2 * preset.counts[-1], preset.num_held_out)
        pairs = train(examples, preset, out, options.seed, mesh)
        found, threshold = score(examples, pairs)
        report_data(report, examples, pairs, found, threshold, out)
        rows += found
    write_csv(out / "disjoint_halves.csv", rows)
    report.write(out / "report.html")
    print(f"written to {out} in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
