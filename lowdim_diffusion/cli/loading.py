"""A run read back from its directory, to sample from or to look at; the data are not needed."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion import data, networks, training
from lowdim_diffusion._types import Params
from lowdim_diffusion.cli import build, toml
from lowdim_diffusion.cli.config import DataConfig, LossConfig, RunConfig
from lowdim_diffusion.cli.errors import CommandError, ExitCode
from lowdim_diffusion.networks.pretrained import PICKLED
from lowdim_diffusion.networks.weights import is_own
from lowdim_diffusion.training import checkpoint

__all__ = [
    "LoadedRun",
    "Start",
    "check_images",
    "continued",
    "image_shape",
    "load_run",
    "reconstructed",
    "start",
]


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
        path: run directory; ``RUN@STEP`` or ``RUN@best`` for one of its checkpoints; an exported
            ``.safetensors`` file; or a pretrained network: a diffusers folder, or a
            ``.safetensors`` file of an EDM release. What is written goes into the folder, or one
            named after the file.
        step: which checkpoint, if the path does not say; the newest sound one if None.

    Raises:
        CommandError: if there is no run, or it has no checkpoint yet.
        NoUsableCheckpointError: if all checkpoints are damaged.
    """
    root, at = _place(path)
    if root.suffix == ".safetensors" and root.is_file() and is_own(root):
        return _exported(root)
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
    if at == "best":
        step = checkpoint.best(root / "checkpoints")
        if step is None:
            raise CommandError(
                f"no checkpoint of {root} has a held-out loss; train with --data.held-out"
            )
    elif at:
        step = int(at)
    if step is not None and step not in steps:
        have = ", ".join(map(str, steps))
        raise CommandError(f"{root} has no checkpoint of step {step}, only of {have}")
    found = checkpoint.load(root / "checkpoints", step, only=("params", "ema"))
    # What is in the checkpoint decides: config.toml may have been edited since.
    source = f"{root}: checkpoint {found.step}"
    model = _model(found.meta, found.meta.get("fixed"), found.state.get("params"), source)
    state = jax.tree.map(jnp.asarray, found.state)
    params, averages = state["params"], state.get("ema", {})
    data = found.meta["fixed"].get("data_sha256", "")
    return LoadedRun(root, model, found.step, params, averages.get("0", params), data)


def reconstructed(loaded: LoadedRun, std: float) -> tuple[Params, str]:
    """Return the power average of width ``std`` at the run's step, and how well it was made.

    Raises:
        CommandError: if the run keeps no power averages.
    """
    train, root = loaded.model.config.train, loaded.path / "checkpoints"
    stds = [kept for kept in (train.ema_std, train.ema_std_second) if kept is not None]
    steps = [step for step in checkpoint.all_steps(root) if 0 < step <= loaded.step]
    if not stds or not steps:
        raise CommandError(
            "--ema-std needs checkpoints with power averages: train with --train.ema-std 0.05 "
            "--train.ema-std-second 0.1 and --checkpoint.keep-every"
        )
    gammas = [training.ema.gamma_from_std(kept) for kept in stds]
    found = training.ema.combination(
        gammas * len(steps),
        [step for step in steps for _ in stds],
        gamma=training.ema.gamma_from_std(std),
        step=loaded.step,
    )

    def snapshots() -> Iterator[Params]:
        for step in steps:
            averages = checkpoint.load(root, step, only=("ema",)).state["ema"]
            yield from (averages[str(i)] for i in range(len(stds)))

    made = jax.tree.map(jnp.asarray, training.ema.reconstruct(snapshots(), found))
    kept = " and ".join(f"{std:g}" for std in stds)
    return made, f"from {kept} at {len(steps)} checkpoints, {100 * found.error:.2g} % off"


def _place(path: str) -> tuple[pathlib.Path, str]:
    """Return the path and what stands behind its last @: a step, ``best`` or nothing."""
    name, _, at = path.rpartition("@")
    if name and (at == "best" or at.isdecimal()) and not pathlib.Path(path).exists():
        return pathlib.Path(name), at
    return pathlib.Path(path), ""


def _model(about: Mapping[str, Any], fixed: Any, params: Any, source: str) -> build.Model:
    """Return what ``about["config"]`` and ``fixed["model"]`` say, which must fit the parameters."""
    try:
        config = toml.loads(about["config"], source=source)
        options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fixed["model"].items()
        }
        name = options.pop("name")
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        numbers = [n for v in options.values() for n in (v if isinstance(v, tuple) else (v,))]
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CommandError(f"{source} was not written by 'lowdim train' ({reason})") from error
    # Before anything is made of it: every width, depth or class has a parameter at least.
    fits = all(number <= count for number in numbers if isinstance(number, int))
    if fits:
        net = networks.make(name, **options)
        shapes = jax.tree.map(jnp.shape, jax.eval_shape(net.init, jax.random.key(0)))
        fits = shapes == jax.tree.map(jnp.shape, params)
    if not fits:
        raise CommandError(
            f"{source} holds {count:,} parameters, which are not those of the network that it "
            f"describes: {name} with {options}"
        )
    return build.Model(config, net, build.schedule(config.schedule))


def _exported(path: pathlib.Path) -> LoadedRun:
    """Weights that ``lowdim export`` wrote."""
    stored, about = networks.load_weights(path)
    model = _model(about, about, stored, str(path))
    params = jax.tree.map(jnp.asarray, stored)
    out = path.with_suffix("")
    data = about.get("data_sha256", "")
    return LoadedRun(out, model, about.get("step", 0), params, params, data)


def image_shape(run: str, loaded: LoadedRun, what: str) -> tuple[int, ...]:
    """Return ``(h, w, c)`` of a run's examples; raise, saying ``what``, if they are no images."""
    shape = loaded.model.net.data_shape
    if len(shape) != 3:
        raise CommandError(f"{run}: its examples are vectors, and {what}")
    return shape


def check_images(source: str, dataset: data.Dataset, shape: tuple[int, ...]) -> None:
    """Raise unless the images of a data set have the shape that a run was trained on."""
    if dataset.data_shape != shape:
        have, want = ("x".join(map(str, s)) for s in (dataset.data_shape, shape))
        raise CommandError(f"{source}: images of {have}, and the run was trained on {want}")


def continued(config: RunConfig) -> RunConfig:
    """Return the config with the standard deviation that the run in ``config.out`` measured.

    It is not measured again: of data that are streamed it is that of a sample, and some of them may
    not be readable any more.
    """
    if config.loss.data_std is not None:
        return config
    about = checkpoint.newest_meta(f"{config.out}/checkpoints")
    try:
        known = toml.loads(about["config"], source=config.out).loss.data_std
    except (KeyError, TypeError, ValueError):
        return config
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, data_std=known))


class Start(NamedTuple):
    """Where the weights of a new run come from."""

    init: Callable[[], training.TrainState]
    """Makes the state before the first step."""
    about: dict[str, Any]
    """Of which run, step and weights they are."""
    notes: list[str]
    """What the user should know."""


def start(config: RunConfig, parts: build.Parts) -> Start:
    """Return the start that ``--init-from`` asks for.

    Raises:
        CommandError: if there is no such run.
        IncompatibleStateError: if its weights do not fit, naming the first that does not.
    """
    assert config.init_from is not None
    loaded = load_run(config.init_from)
    weights = loaded.averaged if config.init_weights == "ema" else loaded.params
    fresh = parts.init().params
    params, left = training.transfer(weights, fresh, partial=config.init_partial)
    about = {
        "from": str(loaded.path.absolute()),
        "step": loaded.step,
        "weights": config.init_weights,
        "digest": checkpoint.digest(weights)["digest"],
    }
    notes = [f"weights of {config.init_from}, step {loaded.step} ({config.init_weights})"]
    notes += [f"not taken over: {path}, {what}" for path, what in left.items()]
    before, now = loaded.model.config, parts.model.config
    for name, a, b in (
        ("loss.parametrization", before.loss.parametrization, now.loss.parametrization),
        ("schedule", before.schedule.name, now.schedule.name),
    ):
        if a != b:
            notes.append(f"warning: they were trained with {name} {a!r}, here it is {b!r}")
    return Start(functools.partial(parts.start, params), about, notes)


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
