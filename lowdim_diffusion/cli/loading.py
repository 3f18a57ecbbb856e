"""A run read back from its directory, to sample from or to look at; the data are not needed."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion import networks
from lowdim_diffusion._types import Params
from lowdim_diffusion.cli import build, toml
from lowdim_diffusion.cli.config import DataConfig, LossConfig, RunConfig
from lowdim_diffusion.cli.errors import CommandError, ExitCode
from lowdim_diffusion.networks.pretrained import PICKLED
from lowdim_diffusion.training import checkpoint

__all__ = ["LoadedRun", "load_run"]


class LoadedRun(NamedTuple):
    """A run and a sound checkpoint of it."""

    path: pathlib.Path
    model: build.Model
    step: int
    params: Params
    averaged: Params
    """The moving average; ``params`` where there is none."""
    data_sha256: str
    """Of the examples trained on; empty if they are not known."""
    pretrained: bool = False
    """Whether it is somebody's released network rather than a run."""


def load_run(path: str, step: int | None = None) -> LoadedRun:
    """Return a run with a sound checkpoint; reads only, also beside a running training.

    Args:
        path: run directory, or a pretrained network: a diffusers folder, or a ``.safetensors`` file
            of an EDM release. What is written goes into the folder, or one named after the file.
        step: which checkpoint; the newest sound one if None.

    Raises:
        CommandError: if there is no run, or it has no checkpoint yet.
        NoUsableCheckpointError: if all checkpoints are damaged.
    """
    root = pathlib.Path(path)
    if root.suffix in (".safetensors", *PICKLED) and not root.is_dir():
        return _pretrained(root.with_suffix(""), networks.from_edm(root))
    if not root.is_dir():
        raise CommandError(f"no run directory {root}")
    released = any((root / name).is_file() for name in ("model_index.json", "config.json"))
    if released and not (root / "config.toml").is_file():
        return _pretrained(root, networks.from_diffusers(root))
    if not (root / "config.toml").is_file():
        raise CommandError(f"{root} is not a run: it has no config.toml ('lowdim train' makes one)")
    steps = checkpoint.all_steps(root / "checkpoints")
    if not steps:
        raise CommandError(f"{root} has no checkpoint yet", ExitCode.NO_CHECKPOINT)
    if step is not None and step not in steps:
        have = ", ".join(map(str, steps))
        raise CommandError(f"{root} has no checkpoint of step {step}, only of {have}")
    found = checkpoint.load(root / "checkpoints", step)
    # What is in the checkpoint decides: config.toml may have been edited since.
    config = toml.loads(found.meta["config"], source=f"{root}: checkpoint {found.step}")
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.meta["fixed"]["model"].items()
    }
    net = networks.make(options.pop("name"), **options)
    model = build.Model(config, net, build.schedule(config.schedule))
    state = jax.tree.map(jnp.asarray, found.state)
    params, averages = state["params"], state.get("ema", {})
    data = found.meta["fixed"]["data_sha256"]
    return LoadedRun(root, model, found.step, params, averages.get("0", params), data)


def _pretrained(out: pathlib.Path, found: networks.Pretrained) -> LoadedRun:
    height, width, channels = found.net.data_shape
    size = height if height == width else None  # images of other sides have to have them already
    config = RunConfig(
        out=str(out),
        data=DataConfig(path="", size=size, channels=1 if channels == 1 else 3),
        loss=LossConfig(parametrization=found.parametrization, data_std=found.data_std),
    )
    model = build.Model(config, found.net, found.schedule)
    return LoadedRun(out, model, 0, found.params, found.params, "", True)
