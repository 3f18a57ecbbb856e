"""``lowdim export``: the weights, the denoiser or a whole sampler of a run, for use elsewhere."""

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lowdim_diffusion.cli.config import (
    SampleConfig,
    Solver,
    check_choices,
    check_guidance,
    option,
    settle,
)
from lowdim_diffusion.cli.errors import CommandError, ExitCode
from lowdim_diffusion.cli.parse import parse_of_run

__all__ = ["ExportArguments", "main"]

LIMIT = 1_500_000_000
"""Bytes of weights that a program can hold; its file format ends at 2 GiB."""


@dataclass(frozen=True)
class ExportArguments:
    """What ``lowdim export`` is given; unset options are as in the run's own [sample] section."""

    run: str = ""
    """Run to export: its directory, RUN@STEP or RUN@best (required)."""
    format: Literal["weights", "denoiser", "sampler"] = "weights"
    """A .safetensors file, or a program that needs jax alone, in a folder with a README."""
    out: str | None = None
    """File or folder to write; unset: RUN/export/..."""
    average: bool = True
    """The moving average of the parameters; --no-average takes the last ones."""
    ema_std: float | None = option(gt=0, lt=0.28)
    """A power average of this relative width instead, made from all checkpoints up to this one; for
    runs with --train.ema-std, best also --train.ema-std-second and --checkpoint.keep-every."""
    solver: Solver | None = None
    """sampler: which one."""
    steps: int | None = option(ge=1)
    """sampler: steps from noise to data."""
    guidance: float | None = option(ge=0)
    """sampler: classifier-free guidance, for a run trained with --loss.label-dropout."""


_DESCRIPTION = """\
Write what a run has learned in a form that others can use: weights as
safetensors, or a program of jax.export for cpu, cuda and tpu. Each carries a
sha256."""
_EXAMPLES = """\
lowdim export --run runs/digits
lowdim train --init-from runs/digits/export/step4000-ema.safetensors ...
lowdim export --run runs/mnist@best --format denoiser
lowdim export --run runs/mnist --ema-std 0.15
lowdim export --run runs/mnist --format sampler --solver dpmpp-2m --steps 12"""


def main(argv: Sequence[str]) -> int:
    """Write the export; return the exit code."""
    given = parse_of_run(
        ExportArguments,
        argv,
        prog="lowdim export",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    return run(given)


def run(given: ExportArguments) -> int:
    """Write the export; return the exit code."""
    import jax

    from lowdim_diffusion import networks
    from lowdim_diffusion.cli import toml
    from lowdim_diffusion.cli.loading import load_run, reconstructed
    from lowdim_diffusion.cli.plan import bytes_text, state_bytes
    from lowdim_diffusion.training.programs import save_program

    for name in ("solver", "steps", "guidance"):
        if getattr(given, name) is not None and given.format != "sampler":
            raise CommandError(
                f"--{name} belongs to --format sampler, but format is {given.format!r}"
            )
    if given.ema_std is not None and not given.average:
        raise CommandError("--ema-std is of an average, but --no-average takes the last parameters")
    loaded = load_run(given.run)
    model, average = loaded.model, "ema" if given.average else "params"
    params = loaded.averaged if given.average else loaded.params
    if given.ema_std is not None:
        average = f"ema{given.ema_std:g}"
        params, how = reconstructed(loaded, given.ema_std)
        print(f"average of width {given.ema_std:g} {how}")
    params = jax.device_get(params)
    about = {
        "step": loaded.step,
        "weights": average,
        "config": toml.dumps(model.config),
        "model": {"name": model.net.name, **model.net.config},
        "data_sha256": loaded.data_sha256,
    }
    folder = loaded.path / "export"
    size = state_bytes(params)
    if given.format == "weights":
        out = pathlib.Path(given.out or folder / f"step{loaded.step}-{average}.safetensors")
        if out.suffix != ".safetensors":
            raise CommandError(f"--out {out}: weights go into a .safetensors file")
        out.parent.mkdir(parents=True, exist_ok=True)
        networks.save_weights(out, params, about)
        print(f"weights of step {loaded.step} ({average}), {bytes_text(size)}: {out}")
        return ExitCode.DONE
    if size > LIMIT:
        raise CommandError(
            f"the weights take {bytes_text(size)}, a program holds {bytes_text(LIMIT)} at most; "
            "export the weights instead"
        )
    out = pathlib.Path(given.out or folder / f"{given.format}-step{loaded.step}")
    shape = model.net.data_shape
    labels = {"label": (("b",), "int32")} if model.net.num_classes else {}
    null = f"Label {model.net.num_classes} stands for none." if labels else ""
    if given.format == "denoiser":
        fn = _denoiser(model, params)
        inputs = {"x_t": (("b", *shape), "float32"), "t": (("b",), "float32"), **labels}
        note = f"The output is the clean example expected at noisy `x_t` and time `t`. {null}"
    else:
        config = _settings(model.config.sample, model.config.loss, given)
        fn = _sampler(model, params, config)
        inputs = {"seed": ((), "uint32"), "index": (("b",), "int32"), **labels}
        note = f"Sample `index` of a `seed` depends on these two numbers alone. {null}"
        note += f" It takes {config.num_steps} steps of {config.solver}; pictures are in [-1, 1]."
        about |= {"solver": config.solver, "num_steps": config.num_steps}
    title = f"{given.format.capitalize()} of step {loaded.step} ({model.net.name}, {average})"
    save_program(out, fn, inputs, title=title, note=note, about=about)
    size = (out / "program.bin").stat().st_size
    print(f"{given.format} of step {loaded.step} ({average}), {bytes_text(size)}: {out}")
    print(f"how to run it with jax alone: {out / 'README.md'}")
    return ExitCode.DONE


def _settings(own: SampleConfig, loss: Any, given: ExportArguments) -> SampleConfig:
    """Return the run's sampling settings with what was given on top."""
    set_ = {"solver": given.solver, "num_steps": given.steps, "guidance": given.guidance}
    settings = replace(own, **{k: v for k, v in set_.items() if v is not None})
    settings = settle(settings, own)
    try:
        check_choices(settings)
        check_guidance(settings, loss)
    except ValueError as error:
        raise CommandError(str(error)) from None
    return settings


def _denoiser(model: Any, params: Any) -> Callable[..., Any]:
    from lowdim_diffusion.cli import build

    return lambda x_t, t, label=None: build.denoiser(model, params, label)(x_t, t)


def _sampler(model: Any, params: Any, config: SampleConfig) -> Callable[..., Any]:
    """Return ``(seed, index, label) -> samples``: those that ``lowdim sample`` draws."""
    import jax
    import numpy as np

    from lowdim_diffusion import sampling
    from lowdim_diffusion.cli import build

    ts = np.asarray(build.grid(config, model.schedule))
    guided = build.guided(config, model, _denoiser(model, params))
    solver, schedule = build.solver(config), model.schedule

    def draw(seed: Any, index: Any, *label: Any) -> Any:
        key, shape = jax.random.key(seed), (index.shape[0], *model.net.data_shape)
        # The start as an array: a shape would have to be known.
        x_T = sampling.initial_noise(key, schedule, ts[0], shape, index=index)
        denoise_fn = lambda x, t: guided(x, t, *label)
        return sampling.sample(key, denoise_fn, schedule, ts, x_T, solver=solver, index=index).x

    return draw
