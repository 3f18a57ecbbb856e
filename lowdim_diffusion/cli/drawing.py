"""Samples drawn and written: arrays as ``.npz``, pictures as one grid in a ``.png``."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lowdim_diffusion import data, reporting, sampling
from lowdim_diffusion._files import write_atomic, write_npz
from lowdim_diffusion._types import Params
from lowdim_diffusion.cli import build
from lowdim_diffusion.cli.config import SampleConfig

__all__ = ["default_labels", "result_sampler", "sampler", "save"]


def sampler(
    model: build.Model, *, config: SampleConfig | None = None, mesh: Mesh | None = None
) -> Callable[[Params, int, Any], np.ndarray]:
    """Return ``(params, seed, labels) -> samples [num_samples, *data]`` in float32.

    Compiled at the first call; sample ``i`` depends on the parameters, the seed and ``i`` alone.

    Args:
        model: of the run.
        config: how to sample; the run's own if None.
        mesh: devices.
    """
    draw = result_sampler(model, config=config, mesh=mesh)
    return lambda params, seed, labels=None: np.asarray(draw(params, seed, labels).x, np.float32)


def result_sampler(
    model: build.Model,
    *,
    config: SampleConfig | None = None,
    mesh: Mesh | None = None,
    save: str = "final",
) -> Callable[[Params, int, Any], sampling.SampleResult]:
    """Return what :func:`sampler` does, but with the trajectory that ``save`` asks for."""
    config = model.config.sample if config is None else config
    devices = 1 if mesh is None else mesh.size
    batch = math.ceil(min(config.batch_size, config.num_samples) / devices) * devices
    ts = np.asarray(build.grid(config, model.schedule))

    @jax.jit
    def run(params: Params, key: Any, cond: Any) -> Any:
        def denoise_fn(x: Any, t: Any, cond: Any = None) -> Any:
            return build.denoiser(model, params, cond)(x, t)

        return sampling.sample_batched(
            key,
            build.guided(config, model, denoise_fn),
            model.schedule,
            ts,
            (config.num_samples, *model.net.data_shape),
            solver=build.solver(config),
            batch_size=batch,
            save=save,
            cond=cond,
            mesh=mesh,
        )

    def draw(params: Params, seed: int, labels: Any) -> sampling.SampleResult:
        cond = None if labels is None else jnp.asarray(labels, jnp.int32)
        result = run(params, jax.random.key(seed), cond)
        if not np.all(np.isfinite(np.asarray(result.x))):
            raise FloatingPointError(
                "the samples hold NaN or infinity; train longer or with a lower learning rate, or "
                "start sampling at a lower noise level."
            )
        return result

    return draw


def default_labels(model: build.Model, num_samples: int) -> np.ndarray | None:
    """Return the classes in turn for a run trained with labels, None for one without."""
    classes = model.net.num_classes
    return np.arange(num_samples, dtype=np.int32) % classes if classes else None


def save(stem: pathlib.Path, x: np.ndarray, **extra: Any) -> list[pathlib.Path]:
    """Write ``stem.npz`` and, for pictures, ``stem.png``; return the paths.

    Pictures are stored as uint8 0..255, vectors as float32; ``extra`` arrays go beside them.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    pictures = x.ndim == 4 and x.shape[-1] in (1, 3)
    arrays = {"x": data.to_uint8(x) if pictures else x, **extra}
    written = [write_npz(stem.with_name(stem.name + ".npz"), arrays)]
    if pictures:
        content = reporting.png(reporting.image_grid(x[:256]))
        written.append(write_atomic(stem.with_name(stem.name + ".png"), content))
    return written
