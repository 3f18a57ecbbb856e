"""Semantic edits by singular vectors of the Jacobian: local, reversible, transferable, composable.

For each trained run (``--run DIR ...``; without one, digits are trained here first):

- **atlas**: rank, asymmetry and linearity of the denoiser against the noise level;
- **edits**: at several noise levels, what the leading directions of a region do to images inside
  and outside of it, with and without the projection, and random directions of the same length;
  whether they reverse with the sign, add up, and do on other images what they do on their own;
- a picture of some of them.

An edit counts as a success if it changes the region by more than ``MIN_INSIDE`` and the rest by
less than ``MAX_OUTSIDE`` (root mean square, images in [-1, 1]): a machine's proxy for the published
human judgement, not the same thing.

References:
    Chen et al. 2024, arXiv 2409.02374, figures 2-4 and table 1.
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
from lowdim_diffusion import (
    data,
    editing,
    reporting,
    sampling,
    schedules,
    solvers,
    subspaces,
)
from lowdim_diffusion.cli import build
from lowdim_diffusion.cli import main as lowdim
from lowdim_diffusion.cli.loading import LoadedRun, load_run
from lowdim_diffusion.editing import masks

MIN_INSIDE, MAX_OUTSIDE = 0.15, 0.10


class Preset(NamedTuple):
    """Sizes of the experiment."""

    train_steps: int
    num_images: int
    num_targets: int
    rank: int
    num_steps: int
    levels: tuple[float, ...]
    """Noise levels of the edits, in standard deviations of the data."""
    atlas_levels: int
    shown: int


PRESETS = {
    "smoke": Preset(30, 3, 1, 2, 4, (1.5,), 3, 1),
    "cpu": Preset(2500, 16, 3, 3, 16, (0.7, 1.5, 3.0, 6.0), 12, 3),
    "paper": Preset(20000, 400, 3, 5, 100, (0.7, 1.5, 3.0, 6.0, 12.0), 30, 8),
}


def atlas(run: LoadedRun, x: np.ndarray, count: int, key: Any) -> tuple[np.ndarray, Any]:
    """Return noise levels and the atlas at noisy versions of ``x``."""
    model, std = run.model, run.model.config.loss.data_std or 1.0
    sigmas = np.geomspace(20 * std, 0.02 * std, count)
    ts = jnp.asarray(schedules.times_from_sigmas(model.schedule, sigmas), jnp.float32)
    dim = x[0].size
    options: dict[str, Any] = {} if dim <= 1024 else {"rank": 64, "tol": 1e-2}

    @jax.jit
    def find(params: Any, x: Any) -> subspaces.Atlas:
        wide = lambda a: a.reshape((-1,) + (1,) * x.ndim)
        eps = jax.random.normal(key, (count, *x.shape))
        states = wide(model.schedule.alpha(ts)) * x[None] + wide(model.schedule.sigma(ts)) * eps
        denoise_fn = build.denoiser(model, params)
        return subspaces.spectral_atlas(key, denoise_fn, model.schedule, states, ts, **options)

    return sigmas, jax.tree.map(np.asarray, find(run.averaged, jnp.asarray(x)))


def measure(
    run: LoadedRun, x: Any, mask: np.ndarray, sigma: float, strength: float, preset: Preset
) -> tuple[dict[str, float], Any]:
    """Return one row of numbers for a noise level, and the edited pictures."""
    model, rank, targets = run.model, preset.rank, preset.num_targets
    schedule, solver, key = model.schedule, solvers.heun(), jax.random.key(0)
    levels = schedules.karras_grid(preset.num_steps, min(0.01, sigma / 2), sigma)
    ts = np.asarray(schedules.times_from_sigmas(schedule, levels))

    @jax.jit
    def learn(params: Any, x: Any) -> Any:
        denoise_fn = build.denoiser(model, params)
        x_t = sampling.invert(denoise_fn, schedule, ts, x, solver=solver)
        fn = lambda x: denoise_fn(x, jnp.asarray(ts[0], x.dtype))
        found = editing.find_directions(key, fn, x_t, mask, rank)
        return x_t, found, editing.random_directions(key, fn, x_t, mask, 1)

    @jax.jit
    def apply(params: Any, x_t: Any, moves: Any) -> Any:
        run_one = functools.partial(
            editing.edit, key, build.denoiser(model, params), schedule, ts, x_t, solver=solver
        )
        return jax.lax.map(lambda move: run_one(move, [strength])[0], moves)

    x = jnp.asarray(x)
    learn_s, (x_t, found, random) = timed(learn, run.averaged, x)
    v, raw = jnp.moveaxis(found.v, 1, 0), jnp.moveaxis(found.raw, 1, 0)
    others = [jnp.roll(v, j + 1, axis=1) for j in range(targets)]  # of other images
    parts = {
        "none": jnp.zeros_like(v[:1]),
        "plus": v,
        "minus": -v,
        "raw": raw,
        "raw minus": -raw,
        "random": jnp.moveaxis(random.v, 1, 0),
        "random minus": -jnp.moveaxis(random.v, 1, 0),
        "transfer": jnp.concatenate(others),
        "both": (v[0] + v[1])[None],
    }
    moves = jnp.concatenate(list(parts.values()))
    apply_s, images = timed(apply, run.averaged, x_t, moves)
    ends = np.cumsum([len(a) for a in parts.values()])
    made = dict(zip(parts, np.split(np.asarray(images), ends[:-1]), strict=True))
    before = made["none"][0]

    def changes(name: str) -> tuple[np.ndarray, ...]:
        one = lambda a: editing.inside_outside_change(before, a, mask)
        return tuple(np.asarray(side) for side in jax.vmap(one)(made[name]))

    def success(name: str) -> np.ndarray:
        inside, outside = changes(name)
        limits = {"min_inside": MIN_INSIDE, "max_outside": MAX_OUTSIDE}
        return np.asarray(editing.edit_success(inside, outside, **limits))

    mean = lambda name: [float(a.mean()) for a in changes(name)]
    norm = lambda a: np.sqrt((a**2).reshape(*a.shape[:2], -1).sum(-1))
    plus, minus = made["plus"] - before, made["minus"] - before
    both = made["both"] - before
    # Success on targets, by source: undo the roll, so that own and transferred line up.
    moved = success("transfer").reshape(targets, rank, -1)
    moved = np.stack([np.roll(a, -(j + 1), axis=1) for j, a in enumerate(moved)], axis=-1)
    window = min(11, 2 * ((min(x.shape[1:3]) - 1) // 2) + 1)
    own = np.concatenate([success("plus"), success("minus")])
    flat = lambda a: a.reshape(-1, *x.shape[1:])
    row = {
        "sigma": sigma,
        "strength": strength,
        "round_trip": float(np.mean(editing.round_trip_error(x, before).rmse)),
        **dict(zip(("inside", "outside"), mean("plus"), strict=True)),
        **dict(zip(("raw_inside", "raw_outside"), mean("raw"), strict=True)),
        **dict(zip(("random_inside", "random_outside"), mean("random"), strict=True)),
        "success": float(editing.success_rate(own)),
        "raw_success": float(editing.success_rate(success("raw"))),
        "random_success": float(editing.success_rate(success("random"))),
        "transfer": float(editing.transfer_rate(moved, success("plus"))),
        "sign_error": float(np.median(norm(plus + minus) / norm(plus))),
        "additivity_error": float(np.median(norm(both - plus[:1] - plus[1:2]) / norm(both))),
        "ssim": float(
            np.mean(
                editing.ssim(flat(made["plus"]), np.tile(before, (rank, 1, 1, 1)), window=window)
            )
        ),
        "feature_distance": float(
            np.mean(editing.feature_distance(flat(made["plus"]), np.tile(before, (rank, 1, 1, 1))))
        ),
        "learn_s": learn_s / len(x),
        "edit_s": apply_s / (len(x) * len(moves)),
    }
    return row, made


def timed(fn: Any, *args: Any) -> tuple[float, Any]:
    """Return the seconds of a second call, compiled by the first, and its result."""
    jax.block_until_ready(fn(*args))
    begin = time.perf_counter()
    result = jax.block_until_ready(fn(*args))
    return time.perf_counter() - begin, result


def study(run: LoadedRun, mask: Any, options: Any, report: Any) -> list[dict[str, Any]]:
    """Measure one run and add its part to the report."""
    preset = PRESETS[options.preset]
    dataset: data.Dataset = build.dataset(run.model.config.data)
    rng = np.random.default_rng(options.seed)
    index = np.sort(rng.choice(dataset.num_examples, preset.num_images, replace=False))
    x = dataset.floats(index)
    name, std = run.path.resolve().name, run.model.config.loss.data_std or 1.0
    print(f"{name}: atlas", flush=True)
    sigmas, found = atlas(run, x[: min(len(x), 8)], preset.atlas_levels, jax.random.key(1))
    report.section(name, dataset.describe())
    report.figure(
        reporting.figures.rank_curve(sigmas, found.rank_ratio),
        "Numerical rank of the Jacobian over the dimension of the data.",
    )
    report.figure(
        reporting.figures.curves(
            {
                f"λ = {s:g} √n": (sigmas, found.cosine[..., i].mean(1))
                for i, s in enumerate(subspaces.STEPS)
            },
            xlabel="noise level σ",
            ylabel="cosine to the linear prediction",
            xscale="log",
        ),
        "Linearity along random directions.",
    )
    np.savez_compressed(options.out / f"{name}_atlas.npz", sigmas=sigmas, **found._asdict())
    rows, pictures = [], None
    for level in preset.levels:
        print(f"{name}: edits at {level:g} standard deviations", flush=True)
        row, made = measure(run, x, mask, level * std, options.strength, preset)
        rows.append({"run": name, "level": level, **row})
        if level == preset.levels[len(preset.levels) // 2 - (len(preset.levels) > 1)]:
            pictures = made
    columns = [c for c in rows[0] if c != "run"]
    report.table(columns, [[float(f"{row[c]:.3g}") for c in columns] for row in rows])
    if pictures is not None:
        count, before = preset.shown, pictures["none"][0]
        for i in range(count):
            ways = [*(f"direction {d + 1}" for d in range(preset.rank)), "not projected", "random"]
            sides = [
                [*pictures[own][:, i], pictures["raw" + end][0, i], pictures["random" + end][0, i]]
                for own, end in (("minus", " minus"), ("plus", ""))
            ]
            figure = reporting.figures.edit_grid(
                before[i],
                np.stack(sides, axis=1),
                [-options.strength, options.strength],
                row_labels=ways,
                mask=mask,
            )
            report.figure(figure, f"{name}, image {index[i]}.")
    return rows


def main() -> int:
    """Measure the runs; write .csv, .npz and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.semantic_editing")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results/semantic_editing")
    )
    parser.add_argument(
        "--run", nargs="+", help="trained runs; digits are trained if none is given"
    )
    parser.add_argument("--box", type=int, nargs=4, metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"))
    parser.add_argument("--strength", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    runs = options.run
    if not runs:
        runs = [str(options.out / "digits")]
        steps = str(PRESETS[options.preset].train_steps)
        argv = ["--out", runs[0], "--train.steps", steps, "--devices", "1"]
        code = lowdim(["train", "--preset", "demo", *argv])
        if code:
            return code
    report = reporting.Report("Semantic editing", f"preset {options.preset}")
    rows: list[dict[str, Any]] = []
    for path in runs:
        run = load_run(path)
        shape = run.model.net.data_shape
        height, width = shape[0], shape[1]
        box = options.box or (height // 4, width // 4, height // 2, width // 2)
        rows += study(run, masks.box(shape, *box), options, report)
        write_csv(options.out / "edits.csv", rows)
    report.section(
        "Beside the published figures",
        "LOCO on CelebA-HQ at 256x256, judged by people: local success .80, transfer .91, SSIM .71 "
        "(LPIPS .08), 79 s to learn a direction from one image, 2 s to apply it.",
    ).table(
        ["run", "images needed", "success", "transfer", "ssim", "s to learn", "s to apply"],
        [
            [
                r["run"],
                1,
                *(
                    float(f"{r[c]:.3g}")
                    for c in ("success", "transfer", "ssim", "learn_s", "edit_s")
                ),
            ]
            for r in rows
        ],
    )
    report.write(options.out / "report.html")
    print(f"written to {options.out} in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
