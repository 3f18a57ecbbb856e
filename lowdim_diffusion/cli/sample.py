"""``lowdim sample``: draw samples from a run's newest sound checkpoint."""

import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowdim_diffusion.cli.config import (
    Grid,
    SampleConfig,
    Solver,
    check_choices,
    check_guidance,
    option,
    settle,
)
from lowdim_diffusion.cli.errors import CommandError, ExitCode
from lowdim_diffusion.cli.parse import parse_of_run

__all__ = ["SampleArguments", "main"]


@dataclass(frozen=True)
class SampleArguments:
    """What ``lowdim sample`` is given; unset options are as in the run's own [sample] section."""

    run: str = ""
    """Run to sample from: its directory, RUN@STEP, RUN@best, its exported .safetensors; or a
    pretrained network: a folder of diffusers, a .safetensors file of EDM (required)."""
    out: str | None = None
    """File for the samples, .npz; pictures also go to a .png beside it. Unset: into the run."""
    seed: int = option(0, ge=0, lt=2**32)
    """Seed of the noise; sample number i depends on it and on i alone."""
    checkpoint: int | None = option(ge=0)
    """Step of the checkpoint; unset takes the newest sound one."""
    num_samples: int | None = option(ge=1)
    """How many."""
    batch_size: int | None = option(ge=1)
    """How many at a time."""
    solver: Solver | None = None
    """Sampler."""
    steps: int | None = option(ge=1)
    """Steps from noise to data."""
    grid: Grid | None = None
    """Spacing of the noise levels."""
    churn: float | None = option(ge=0)
    """heun: noise added back in, EDM's S_churn; 0 is deterministic."""
    eta: float | None = option(ge=0, le=1)
    """ddim: 0 is deterministic, 1 ancestral; solvers of SDEs: noise rate."""
    label: int | None = option(ge=0)
    """Class to draw, for a run trained with --model.conditional; unset takes them in turn."""
    guidance: float | None = option(ge=0)
    """Classifier-free guidance, for a run trained with --loss.label-dropout; 1 is none."""
    guidance_interval: tuple[float, ...] | None = option(ge=0)
    """Guide only between these two noise levels, LOW HIGH."""
    keep: float | None = option(gt=0, le=1)
    """Write only this share, the samples whose predictions moved least at low noise: what lies
    between modes of the data (a hallucination) wavers to the last."""
    keep_sigma: float | None = option(gt=0)
    """Largest noise level at which predictions are compared for --keep, about three standard
    deviations of a mode; unset takes a fifth of the standard deviation of the data."""
    average: bool = True
    """Sample with the moving average of the parameters; --no-average takes the last ones."""
    devices: int | None = option(ge=1)
    """How many devices; unset takes all."""


_EXAMPLES = """\
lowdim sample --run runs/digits
lowdim sample --run runs/mnist --solver dpmpp-2m --steps 12 --out samples.npz
lowdim sample --run runs/mnist --solver heun --churn 20 --seed 1
lowdim sample --run runs/mnist --num-samples 1000 --keep 0.96
lowdim sample --run runs/labels --guidance 2 --guidance-interval 0.2 5"""


def main(argv: Sequence[str]) -> int:
    """Draw and write samples; return the exit code."""
    given = parse_of_run(
        SampleArguments,
        argv,
        prog="lowdim sample",
        description="Draw samples from the newest sound checkpoint of a run.",
        examples=_EXAMPLES,
        notes="Unset options are as in the [sample] section of the run's config.toml.",
    )
    return run(given)


def run(given: SampleArguments) -> int:
    """Draw and write samples; return the exit code."""
    import numpy as np

    from lowdim_diffusion import safety, sharding
    from lowdim_diffusion.cli import drawing
    from lowdim_diffusion.cli.loading import load_run

    mesh = sharding.data_mesh(given.devices)
    loaded = load_run(given.run, given.checkpoint)
    model = loaded.model
    config = _settings(model.config.sample, given)
    try:
        check_guidance(config, model.config.loss)
    except ValueError as error:
        raise CommandError(str(error)) from None
    classes = model.net.num_classes
    if given.label is not None and given.label >= classes:
        have = f"has classes 0 to {classes - 1}" if classes else "was trained without labels"
        raise CommandError(f"--label {given.label}: the run {have}")
    params = loaded.averaged if given.average else loaded.params
    begin = time.monotonic()
    labels = drawing.default_labels(model, config.num_samples)
    if given.label is not None:
        labels = np.full(config.num_samples, given.label, np.int32)
    save = "final" if given.keep is None else "denoised"
    draw = drawing.result_sampler(model, config=config, mesh=mesh, save=save)
    result = draw(params, given.seed, labels)
    x, calm = np.asarray(result.x, np.float32), None
    if given.keep is not None:
        max_sigma = given.keep_sigma or 0.2 * (model.config.loss.data_std or 1)
        calm = safety.keep_calmest(result, model.schedule, given.keep, max_sigma=max_sigma)
        x, labels = x[calm.rows], None if labels is None else labels[calm.rows]
    spent = time.monotonic() - begin
    name = f"step{loaded.step}-{config.solver}-{config.num_steps}-seed{given.seed}"
    name += "" if given.label is None else f"-label{given.label}"
    name += "" if config.guidance is None else f"-guidance{config.guidance:g}"
    name += "" if given.keep is None else f"-keep{given.keep:g}"
    stem = loaded.path / "samples" / name
    if given.out is not None:
        stem = pathlib.Path(given.out)
        stem = stem.with_suffix("") if stem.suffix in (".npz", ".png") else stem
    about: dict[str, Any] = {"step": loaded.step, "seed": given.seed, "solver": config.solver}
    about |= {} if labels is None else {"labels": labels}
    about |= {} if calm is None else {"index": calm.rows, "variance": calm.scores}
    written = drawing.save(stem, x, **about)
    print(
        f"{len(x)} samples of step {loaded.step} by {config.solver}, {config.num_steps} steps, in "
        f"{spent:.1f} s"
    )
    if calm is not None:
        print(
            f"kept of {config.num_samples}, by the variance of predictions up to σ {max_sigma:.3g}"
        )
    print("\n".join(map(str, written)))
    return ExitCode.DONE


def _settings(own: SampleConfig, given: SampleArguments) -> SampleConfig:
    """Return the run's settings with what was given on top."""
    names = ("num_samples", "batch_size", "solver", "grid", "churn", "eta")
    names += ("guidance", "guidance_interval")
    set_: dict[str, Any] = {n: getattr(given, n) for n in names if getattr(given, n) is not None}
    if given.steps is not None:
        set_["num_steps"] = given.steps
    settings = settle(replace(own, **set_), own)
    check_choices(settings)
    return settings
