"""Watermarks in the null space of the denoiser: what they cost, and which attacks they bear.

*Mixture.* Low-rank Gaussians with a floor: where the exact denoiser leaves a direction to the
noise, the pattern stays in the image at the size of the floor. The smaller the floor, the less of
it is left, and without one any noise hides it. Published settings: rings in high frequencies, DDIM
to (nearly) zero noise, the relative distance as score.

*Model.* A network trained on digits (or your own run, ``--run``). Held-out images are marked,
stored in 8 bits, attacked, and told from other images that met the same attack: true positives at
1 % false ones, AUROC, PSNR, SSIM. Then the same against the last noise level (what may remain in
the image), the noise level of the mark, its radius, band, pattern and strength.

References:
    Li et al. 2024, "Shallow Diffuse", arXiv 2410.21088.
"""

import argparse
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._tables import write_csv
from lowdim_diffusion import (
    data,
    distributions,
    editing,
    linalg,
    reporting,
    safety,
    sampling,
    schedules,
    solvers,
)
from lowdim_diffusion.cli import build
from lowdim_diffusion.cli import main as lowdim
from lowdim_diffusion.cli.loading import LoadedRun, load_run
from lowdim_diffusion.safety import attacks, watermark

PUBLISHED = {
    "Shallow Diffuse, server": (35.49, 0.96, 1.00, 1.00, 0.98),
    "Shallow Diffuse, COCO": (32.11, 0.84, 1.00, 1.00, 0.96),
    "Shallow Diffuse, DiffusionDB": (33.07, 0.89, 1.00, 1.00, 0.93),
    "Tree-Ring": (16.61, 0.64, 1.00, 0.88, 0.87),
    "RingID": (14.27, 0.51, 1.00, 1.00, 1.00),
    "Gaussian Shading": (11.04, 0.48, 1.00, 1.00, 1.00),
    "Stegastamp": (26.70, 0.85, 1.00, 0.99, 0.48),
    "DwtDctSvd": (40.19, 0.98, 1.00, 0.74, 0.07),
}
"""PSNR, SSIM; true positives at 1 % false ones: clean, distorted, regenerated (512 pixels)."""

REFERENCE = {0.3: (22.9, 1.00, 0.93), 0.65: (24.1, 1.00, 0.51), 1.5: (21.2, 1.00, 0.75)}
REFERENCE |= {4.0: (21.5, 1.00, 0.76)}
"""Noise level of the mark to PSNR and TPR under noise .1 and .3, floor .3; another key."""
FLOORS = (0.3, 0.1, 0.02, 0.0)


class Preset(NamedTuple):
    """Sizes of the experiment."""

    num_mixture: int
    """Marked images of the mixture, and as many others."""
    train_steps: int
    num_images: int
    """Marked images of the model, and as many others."""
    num_steps: int
    """Of the solver, each way."""
    scan: bool
    """Whether all settings are varied, or the last noise level alone."""


PRESETS = {
    "smoke": Preset(50, 60, 20, 4, False),
    "cpu": Preset(400, 3000, 300, 12, True),
    "paper": Preset(5000, 30_000, 500, 50, True),
}


class Flow(NamedTuple):
    """A denoiser's flow up to the mark's noise level and down again, ``(params, ts, x) -> x``."""

    up: Callable[[Any, Any, Any], Any]
    down: Callable[[Any, Any, Any], Any]
    schedule: Any


def flow_of(denoiser: Callable[[Any], Any], schedule: Any) -> Flow:
    """Return the two ways of ``denoiser(params)``, each compiled once for all settings."""
    key, heun = jax.random.key(0), solvers.heun()
    up = lambda p, ts, x: watermark.recover(denoiser(p), schedule, ts, x)
    down = lambda p, ts, x: sampling.sample(key, denoiser(p), schedule, ts, x, solver=heun).x
    return Flow(jax.jit(up), jax.jit(down), schedule)


def rates(marked: Any, others: Any) -> tuple[float, float]:
    """Return true positives at 1 % false ones and AUROC of a score that is high for marked ones."""
    scores = np.concatenate([marked, others])
    kinds = np.arange(len(scores)) < len(marked)
    area, rate = safety.auroc(scores, kinds), safety.true_positive_rate(scores, kinds)
    return float(rate), float(area)


# ---- the exact mixture --------------------------------------------------------------------------


def mixture(report: reporting.Report, preset: Preset, out: pathlib.Path, seed: int) -> None:
    """Mark images of mixtures with and without a floor; write ``mixture.csv`` and a section."""
    ve, count, shape = schedules.VE(1e-4, 100.0), preset.num_mixture, (8, 8, 1)
    frames = linalg.random_frames(jax.random.key(seed), 2, 64, 6, orthogonal=True)
    keys = jax.random.split(jax.random.key(seed + 1), 3)
    rows, lines = [], {}

    def denoiser(p: distributions.MoLRG) -> Any:
        flat = p.denoiser(ve)
        return lambda x, t: flat(x.reshape(-1, 64), t).reshape(x.shape)

    flow = flow_of(denoiser, ve)
    draw = jax.jit(lambda p: p.sample(keys[0], 2 * count)[0].reshape(-1, *shape))
    for floor in FLOORS:
        p = distributions.MoLRG(frames, noise_std=floor)
        x = draw(p)
        for sigma in REFERENCE if preset.scan else (0.65,):
            for last in (0.01, 0.1):
                ts = watermark.grid(ve, sigma, num_steps=3 * preset.num_steps, sigma_min=last)
                mark = watermark.make_mark(keys[1], shape, radius=2, scale=sigma)
                up = flow.up(p, ts, x)
                marked = flow.down(p, ts, watermark.inject(up, mark))[:count]
                both = jnp.concatenate([marked, x[count:]])
                span = float(np.ptp(np.asarray(x)))
                psnr = editing.round_trip_error(x[:count], marked, data_range=span).psnr
                row = {"floor": floor, "sigma": sigma, "last_sigma": last}
                row |= {"psnr": float(jnp.mean(psnr))}
                for std in (0.0, 0.05, 0.1, 0.3):
                    seen = flow.up(p, ts, attacks.noise(keys[2], both, std))
                    score = -np.asarray(watermark.match(seen, mark).eta)
                    row[f"tpr_noise_{std:g}"] = rates(score[:count], score[count:])[0]
                rows.append(row)
    write_csv(out / "mixture.csv", rows)
    report.section(
        "Exact mixtures",
        "Two subspaces of dimension 6 in 8x8 images, standard deviation 1 along them and a floor "
        "across; rings of radius 2 at high frequency. True positives at 1 % false ones by the "
        "published score, after noise of the given standard deviation. PSNR for the range that the "
        "images span. Beside it reference values for floor .3 (another key), last noise level .01.",
    )
    columns = ["floor", "σ*", "last σ", "PSNR", "clean", "noise .05", "noise .1", "noise .3"]
    text = []
    for row in rows:
        numbers = [f"{v:.1f}" if k == "psnr" else f"{v:.2f}" for k, v in row.items()]
        text.append([*numbers, *_beside(row)])
    report.table([*columns, "ref. PSNR", "ref. .1", "ref. .3"], text)
    for row in [columns, *(r[:8] for r in text)]:
        print("  ".join(f"{cell:>9}" for cell in row))
    for floor in FLOORS:
        mine = [r for r in rows if (r["floor"], r["last_sigma"], r["sigma"]) == (floor, 0.01, 0.65)]
        stds = (0.0, 0.05, 0.1, 0.3)
        lines[f"floor {floor:g}"] = (stds, [mine[0][f"tpr_noise_{s:g}"] for s in stds])
    figure = reporting.figures.curves(
        lines, xlabel="standard deviation of the noise", ylabel="TPR at 1 % FPR", level=0.01
    )
    figure.savefig(out / "mixture.png", dpi=150)
    report.figure(figure, "σ* = 0.65, last noise level 0.01: the floor carries the mark.")


def _beside(row: dict[str, float]) -> list[str]:
    if row["floor"] != 0.3 or row["last_sigma"] != 0.01:
        return ["", "", ""]
    psnr, *shares = REFERENCE[row["sigma"]]
    return [f"{psnr:.1f}", *(f"{share:.2f}" for share in shares)]


# ---- a trained model ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """How images are marked; noise levels in standard deviations of the data but for the last."""

    sigma: float = 2 / 3
    last_sigma: float = 0.1
    radius: float = 1.0
    """In units of the default for the size of the images."""
    band: watermark.Band = "high"
    pattern: watermark.Pattern = "noise"
    strength: float = 1.0


def settings() -> list[Setting]:
    """Return settings that differ from the default in one respect."""
    changes: list[dict[str, Any]] = [
        *({"last_sigma": s} for s in (0.01, 0.03, 0.2)),
        *({"sigma": s} for s in (1 / 3, 4 / 3, 8 / 3)),
        *({"radius": r} for r in (2 / 3, 5 / 6, 4 / 3)),
        *({"strength": s} for s in (0.5, 1.5)),
        {"pattern": "rings"},
        {"band": "low"},
        {"band": "low", "radius": 2 / 3},
    ]
    return [Setting(), *(Setting(**change) for change in changes)]


ATTACKS: dict[str, tuple[Callable, Any]] = {
    "clean": (lambda key, x, strength: x, None),
    "noise .1": (attacks.noise, 0.1),
    "noise .2": (attacks.noise, 0.2),
    "blur .6": (attacks.blur, 0.6),
    "JPEG 75": (attacks.jpeg, 75),
    "JPEG 25": (attacks.jpeg, 25),
    "crop .75": (attacks.crop, 0.75),
    "resize .5": (attacks.resize, 0.5),
    "brightness .5": (attacks.brightness, 0.5),
    "brightness 6": (attacks.brightness, 6.0),
    "colour .5": (attacks.colour, 0.5),
    "drop .4": (attacks.drop, 0.4),
    "median 3": (attacks.median, 3),
}
SCORES = ("cosine", "eta", "distance")


def eight_bits(x: Any) -> Any:
    """Return images as they come back from a file."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255) / 127.5 - 1


class Study(NamedTuple):
    """A model and images to mark, half of which stay as they are."""

    flow: Flow
    params: Any
    x: Any
    std: float
    """Of the data."""
    num_steps: int
    seed: int


class Marked(NamedTuple):
    """Images marked under one setting."""

    x: Any
    mark: watermark.Mark
    ts: Any
    psnr: float
    ssim: float


def put(study: Study, setting: Setting) -> Marked:
    """Return the first half of the images, marked."""
    flow, x = study.flow, study.x
    sigma = setting.sigma * study.std
    t = float(schedules.times_from_sigmas(flow.schedule, sigma))
    ts = watermark.grid(flow.schedule, t, num_steps=study.num_steps, sigma_min=setting.last_sigma)
    shape, key = x.shape[1:], jax.random.key(study.seed)
    mark = watermark.make_mark(
        key,
        shape,
        radius=setting.radius * watermark.make_mark(key, shape).radius,
        band=setting.band,
        pattern=setting.pattern,
        scale=setting.strength * float(flow.schedule.sigma(t)),
    )
    count = len(x) // 2
    up = flow.up(study.params, ts, x)  # all of them: one program for everything
    made = eight_bits(flow.down(study.params, ts, watermark.inject(up, mark)))[:count]
    psnr = editing.round_trip_error(x[:count], made).psnr
    side = min(shape[:2])
    ssim = editing.ssim(x[:count], made, window=min(11, side - (side + 1) % 2))
    return Marked(made, mark, ts, float(jnp.mean(psnr)), float(jnp.mean(ssim)))


def judge(study: Study, found: Marked, names: Any) -> list[dict[str, Any]]:
    """Return TPR and AUROC of every score after each named attack, on marked and other images."""
    rows, count = [], len(found.x)
    both = jnp.concatenate([found.x, study.x[count:]])
    for name in names:
        attack, strength = ATTACKS[name]
        seen = eight_bits(attack(jax.random.key(study.seed + 1), both, strength))
        q = watermark.match(study.flow.up(study.params, found.ts, seen), found.mark)
        row: dict[str, Any] = {"attack": name}
        for score in SCORES:
            values = np.asarray(getattr(q, score)) * (1 if score == "cosine" else -1)
            rate, area = rates(values[:count], values[count:])
            row |= {f"tpr_{score}": rate, f"auroc_{score}": area}
        below = np.asarray(q.p_value) < 0.01
        rows.append(row | {"p_tpr": below[:count].mean(), "p_fpr": below[count:].mean()})
    return rows


def held_out(run: LoadedRun) -> np.ndarray:
    """Return images that the run was not trained on; those it was if it held out none."""
    config = run.model.config.data
    dataset = build.dataset(dataclasses.replace(config, held_out=0))
    if not config.held_out:
        return dataset.floats()
    rest = dataset.split(dataset.num_examples - config.held_out, seed=config.seed)[1]
    assert isinstance(rest, data.Dataset)
    return rest.floats()


def model(
    report: reporting.Report, preset: Preset, out: pathlib.Path, seed: int, path: str | None
) -> int:
    """Mark images of a trained model; write tables, figures and a section; return an exit code."""
    if path is None:
        path = str(out / "digits")
        argv = ["train", "--preset", "digits", "--out", path, "--devices", "1"]
        argv += ["--train.steps", str(preset.train_steps), "--data.held-out", "700"]
        argv += ["--model.name", "mlp", "--model.width", "256", "--model.depth", "3"]
        if code := lowdim([*argv, "--optim.lr", "1e-3", "--optim.decay", "cosine"]):
            return code
    run = load_run(path)
    std = run.model.config.loss.data_std or 1.0
    images = held_out(run)
    count = min(preset.num_images, len(images) // 2)
    x = jnp.asarray(images[np.random.default_rng(seed).permutation(len(images))[: 2 * count]])
    flow = flow_of(functools.partial(build.denoiser, run.model), run.model.schedule)
    study = Study(flow, run.averaged, x, std, preset.num_steps, seed)
    found = put(study, Setting())
    rows = judge(study, found, ATTACKS)
    write_csv(out / "attacks.csv", rows)
    name = "x".join(map(str, x.shape[1:]))
    entries = int(found.mark.mask.sum())
    report.section(
        f"Model: {run.model.net.name}, {name}",
        f"{count} marked images and {count} others, both attacked, in 8 bits; a pattern of noise "
        f"in {entries} of {x[0].size} entries at sigma {2 * std / 3:.2g}, last noise level .1. "
        f"PSNR {found.psnr:.1f} dB, SSIM {found.ssim:.3f}. True positives at 1 % false ones and "
        "AUROC by the cosine; by p < .01 without other images; by the published scores.",
    )
    columns = ["attack", "TPR", "AUROC", "TPR p<.01", "FPR p<.01", "TPR η", "TPR L1"]
    keys = ("tpr_cosine", "auroc_cosine", "p_tpr", "p_fpr", "tpr_eta", "tpr_distance")
    text = [[row["attack"], *(f"{row[key]:.3f}" for key in keys)] for row in rows]
    report.table(columns, text)
    print(f"PSNR {found.psnr:.1f} dB, SSIM {found.ssim:.3f}, {entries} entries")
    for row in [columns, *text]:
        print("  ".join(f"{cell:>13}" for cell in row))
    figure = reporting.figures.nearest_pairs(
        found.x[:6], x[:6], np.sqrt(np.mean((found.x[:6] - x[:6]) ** 2, axis=(1, 2, 3)))
    )
    for axes in figure.axes:
        if axes.get_ylabel():
            axes.set_ylabel({"sample": "marked", "nearest": "original"}[axes.get_ylabel()])
    figure.savefig(out / "images.png", dpi=150)
    report.figure(figure, "Marked and original images, root mean square difference below.")
    report.text("Beside them the published numbers, pictures of 512 pixels:").table(
        ["method", "PSNR", "SSIM", "clean", "distorted", "regenerated"],
        [[k, f"{v[0]:.2f}", *(f"{n:.2f}" for n in v[1:])] for k, v in PUBLISHED.items()],
    )
    scan(report, study, settings() if preset.scan else settings()[:2], out)
    return 0


def scan(report: reporting.Report, study: Study, chosen: list[Setting], out: pathlib.Path) -> None:
    """Vary the settings one by one; write ``settings.csv`` and a figure."""
    names = ("clean", "noise .1", "noise .2", "JPEG 25")
    rows = []
    for setting in chosen:
        found = put(study, setting)
        judged = judge(study, found, names)
        row = dataclasses.asdict(setting) | {"entries": int(found.mark.mask.sum())}
        row |= {"psnr": found.psnr, "ssim": found.ssim}
        rows.append(row | {f"tpr {q['attack']}": q["tpr_cosine"] for q in judged})
    write_csv(out / "settings.csv", rows)
    report.section(
        "Settings",
        "One respect differs from the first row. Noise level σ* and radius in units of the data's "
        "standard deviation and of the default; true positives at 1 % false ones.",
    )
    columns = ["σ*", "last σ", "radius", "band", "pattern", "strength", "entries", "PSNR", "SSIM"]
    text = [[v if isinstance(v, str) else f"{v:.3g}" for v in row.values()] for row in rows]
    report.table([*columns, *names], text)
    for row in [[*columns, *names], *text]:
        print("  ".join(f"{cell:>8}" for cell in row))
    default = dataclasses.asdict(Setting())
    same = [row for row in rows if row | default == row | {"last_sigma": default["last_sigma"]}]
    by_last = sorted(same, key=lambda row: row["last_sigma"])
    pick = lambda name: [row[name] for row in by_last]
    lines = {name: (pick("last_sigma"), pick(f"tpr {name}")) for name in names}
    cost = {"PSNR": (pick("last_sigma"), pick("psnr"))}
    figure = reporting.figures.curve_panels(
        {"found": lines, "cost": cost},
        xlabel="last noise level",
        ylabels=["TPR at 1 % FPR", "PSNR in dB"],
        xscale="log",
        levels=[0.95, None],
    )
    figure.savefig(out / "last_sigma.png", dpi=150)
    report.figure(figure, "What may stay in the image decides what the mark bears, and its cost.")


def main() -> int:
    """Write the tables, the figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.watermark")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/watermark"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help="a trained run of images; digits are trained without one")
    parser.add_argument("--part", choices=("mixture", "model"), nargs="+")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begin, preset = time.monotonic(), PRESETS[options.preset]
    report = reporting.Report("Watermarks", "in the null space of the denoiser")
    parts = options.part or ("mixture", "model")
    if "mixture" in parts:
        mixture(report, preset, options.out, options.seed)
    if "model" in parts:
        code = model(report, preset, options.out, options.seed, options.run)
        if code:
            return code
    report.write(options.out / "report.html")
    print(f"written to {options.out} in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
