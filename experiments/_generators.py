"""Denoisers trained on N examples each, and what they make of the same noise.

The part that the experiments on memorization and reproducibility share: a grid of trainings (how
many examples, which part of the data, which seed) is one compiled program per network, and every
model is sampled from the same noises by the same deterministic solver.
"""

import functools
import math
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowdim_diffusion import (
    data,
    denoisers,
    distributions,
    generalization,
    losses,
    networks,
    sampling,
    schedules,
    solvers,
    training,
)

SCHEDULE = schedules.VE()
NOISE = 2310_05264  # seed of the noises that all models share
OPTIMAL_STEPS = 72  # the optimal denoiser is stiff: 18 steps take some noises to another example


class Recipe(NamedTuple):
    """How a model is trained and sampled."""

    network: str
    options: dict[str, Any]
    """Of the network, but for its width."""
    batch_size: int
    learning_rate: float
    lengths: tuple[int, ...]
    """Training steps."""
    num_samples: int
    num_steps: int = 18
    """Of the sampler (Heun)."""
    block: int = 1000
    """Samples made at once."""
    parametrization: Literal["x0", "edm"] = "edm"


MLP = Recipe("mlp", {"depth": 3}, 64, 4e-3, (1500, 6000), 500)
SMOKE = MLP._replace(lengths=(60,), num_samples=24, num_steps=8)
# Karras et al. 2022, arXiv 2206.00364, table 7, without augmentation: what Zhang et al. trained.
UNET = Recipe(
    "unet",
    {"channel_mult": (2, 2, 2), "num_blocks": 4, "attention": (16,), "dropout": 0.13},
    128,
    1e-3,
    (390_625,),
    10_000,
)


def adapted(recipe: Recipe, width: int, data_shape: tuple[int, ...]) -> Recipe:
    """Return the recipe for images of this size: large ones are predicted clean, in half the steps.

    EDM's network predicts mostly noise at low noise levels. Layers that are not wider than the
    image cannot pass that on, and the samples stay noisy; clean images have few dimensions. Such
    models copy after fewer steps, and two of them agree less.
    """
    if recipe.network != "mlp" or width >= 2 * math.prod(data_shape):
        return recipe
    return recipe._replace(
        parametrization="x0",
        learning_rate=recipe.learning_rate / 2,
        lengths=tuple(max(n // 2, 1) for n in recipe.lengths),
    )


class Examples(NamedTuple):
    """A data set in a random order that all experiments share."""

    name: str
    x: np.ndarray
    """``[N, h, w, c]``, to train on."""
    held_out: np.ndarray
    """``[M, h, w, c]``, never trained on."""


def load(path: str, size: int | None, num_train: int, num_held_out: int) -> Examples:
    """Return at most ``num_train`` examples to train on and ``num_held_out`` others."""
    found = data.load(path, size=None if path in data.BUILT_IN else size)
    if found.num_examples <= num_held_out:
        raise SystemExit(f"{path}: {found.num_examples} examples, {num_held_out} are held out")
    order = np.random.default_rng(0).permutation(found.num_examples)
    x = found.floats(order[: num_train + num_held_out])
    return Examples(found.name, x[num_held_out:], x[:num_held_out])


def network(recipe: Recipe, width: int, data_shape: tuple[int, ...]) -> networks.Network:
    """Return the network of a recipe at one width."""
    name = "width" if recipe.network == "mlp" else "channels"
    options = {**recipe.options, name: width}
    return networks.make(recipe.network, data_shape=data_shape, **options)


def _train_and_sample(
    point: dict[str, Any],
    x: jax.Array,
    data_std: float,
    net: networks.Network,
    recipe: Recipe,
    num_steps: int,
) -> dict[str, jax.Array]:
    """Train on ``count`` examples from row ``first`` on; sample the noises that all share."""
    key = jax.random.fold_in(jax.random.key(point["seed"]), point["first"])
    init_key, fit_key = jax.random.split(jax.random.fold_in(key, point["count"]))
    kind: Any = {"data_std": data_std, "parametrization": recipe.parametrization}
    clean = recipe.parametrization == "x0"  # EDM's weight would leave nothing to high noise
    weight = losses.min_snr_weight(5 / data_std**2) if clean else None

    def batch(key: Any, step: Any) -> dict[str, jax.Array]:
        rows = jax.random.randint(
            jax.random.fold_in(key, step), (recipe.batch_size,), 0, point["count"]
        )
        return {"x": x[point["first"] + rows]}

    params, metrics = training.fit(
        fit_key,
        net.init(init_key),
        losses.make_loss(net, SCHEDULE, weight=weight, dropout="dropout" in recipe.options, **kind),
        optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, num_steps)),
        batch,
        num_steps,
        ema=training.ema.classic(0.999),
    )
    made = sampling.sample_batched(
        jax.random.key(NOISE),
        denoisers.from_network(net, params, SCHEDULE, **kind),
        SCHEDULE,
        schedules.karras_grid(recipe.num_steps),
        (recipe.num_samples, *x.shape[1:]),
        solver=solvers.heun(),
        batch_size=min(recipe.block, recipe.num_samples),
    )
    return {"x": made.x, "loss": metrics["loss"][-max(num_steps // 20, 1) :].mean()}


def generate(
    x: np.ndarray,
    recipe: Recipe,
    *,
    width: int,
    num_steps: int,
    grid: dict[str, Any],
    mesh: Any,
    path: pathlib.Path,
    progress: str,
) -> training.Sweep:
    """Train one model per point of ``grid`` (axes count, first, seed) and return their samples.

    A finished model is kept in ``path``: an interrupted run trains only what is missing.
    """
    net = network(recipe, width, x.shape[1:])
    fn = functools.partial(
        _train_and_sample,
        x=jnp.asarray(x),
        data_std=float(x.std()),
        net=net,
        recipe=recipe,
        num_steps=num_steps,
    )
    one_each = 1 if mesh is None else mesh.size
    return training.sweep(
        fn, grid, batch_size=1, chunk=one_each, mesh=mesh, path=path, progress=progress
    )


def optimal(x: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return what the optimal denoiser of ``x`` makes of the same noises: examples of ``x``."""

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        return sampling.sample_batched(
            jax.random.key(NOISE),
            distributions.Empirical(x).denoiser(SCHEDULE),
            SCHEDULE,
            schedules.karras_grid(OPTIMAL_STEPS),
            (recipe.num_samples, *x.shape[1:]),
            solver=solvers.heun(),
            batch_size=min(recipe.block, recipe.num_samples),
        ).x

    return np.asarray(run(jnp.asarray(x)))


def gaussian(x: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return what the Gaussian with the moments of ``x`` makes of the same noises, exactly."""
    flat = jnp.asarray(x.reshape(len(x), -1))
    noise = sampling.initial_noise(
        jax.random.key(NOISE),
        SCHEDULE,
        jnp.asarray(SCHEDULE.t_max),
        (recipe.num_samples, *x.shape[1:]),
    )
    model = distributions.Gaussian.fit(flat)
    return np.asarray(model.flow(noise, 1.0, SCHEDULE.t_max, 1.0, 0.0))


@jax.jit
def search(samples: Any, known: Any) -> tuple[jax.Array, generalization.Nearest]:
    """Return each sample's likeness to an image of ``known``, and its two nearest ones."""
    cosine = generalization.most_similar(samples, known).cosine
    return cosine, generalization.nearest(samples, known, k=2)
