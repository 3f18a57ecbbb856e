"""From a config to the objects it describes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from lowdim_diffusion import data, guidance, losses, networks, schedules, solvers, training
from lowdim_diffusion._types import Array, DenoiseFn, LossFn, Params, Schedule
from lowdim_diffusion.cli.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    ScheduleConfig,
    TrainConfig,
)
from lowdim_diffusion.denoisers import from_network
from lowdim_diffusion.sharding import AXIS

__all__ = [
    "Model",
    "Parts",
    "assumed",
    "dataset",
    "denoiser",
    "ema",
    "fixed",
    "grid",
    "guided",
    "held_out_loss",
    "loss",
    "measured_std",
    "network",
    "optimizer",
    "parts",
    "schedule",
    "solver",
]


STREAM_BYTES = 2 * 10**9
"""Data that would take more on every device are read as they are drawn, unless told otherwise."""

STD_EXAMPLES = 1024
"""So many examples, evenly spread, give the standard deviation of data that are streamed."""


class Model(NamedTuple):
    """What a run's parameters mean; enough to sample, without the data."""

    config: RunConfig
    """The config with the values filled in that the data decide."""
    net: networks.Network
    schedule: Schedule


class Parts(NamedTuple):
    """All of a run's objects."""

    model: Model
    dataset: data.Dataset | data.LazyDataset
    batcher: data.Batcher | data.Stream
    """What draws from it; a stream if the data are lazy."""
    init: Callable[[], training.TrainState]
    """Makes the state before the first step."""
    start: Callable[[Params], training.TrainState]
    """Makes it of other parameters."""
    train_step: training.TrainStep
    """Per-device step, mapped over ``sharding.AXIS``."""
    optimizer: Any
    """Of optax; part of ``train_step``."""
    key: Array
    """Decides batches and noise."""
    held_out_loss: Callable[[Params], Array] | None
    """Of the examples that are not trained on, where there are any."""


def parts(config: RunConfig) -> Parts:
    """Return the objects of a run.

    Raises:
        ValueError: for data, sizes or options that do not fit, in one line.
    """
    loaded, held_out = _datasets(config.data)
    if config.loss.data_std is None:
        known = loaded if isinstance(loaded, data.Dataset) else loaded.sample(STD_EXAMPLES)
        measured = dataclasses.replace(config.loss, data_std=measured_std(known))
        config = dataclasses.replace(config, loss=measured)
    batcher = _batcher(config, loaded)
    net = network(config.model, loaded)
    made = schedule(config.schedule)
    optim = optimizer(config.optim, config.train.steps)
    average = ema(config.train)
    # Sampling owns key(seed) itself; folding keeps training's keys apart from it.
    init_key, key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
    solver(config.sample)  # both are refused now, not after the training
    grid(config.sample, made)
    step = training.make_train_step(
        loss(config.loss, net, made, config.train.batch_size, bool(config.model.dropout)),
        optim,
        ema=average,
        axis_name=AXIS,
        accumulate=config.optim.accumulate,
    )
    start = lambda params: training.init_state(params, optim, ema=average)
    init = lambda: start(net.init(init_key))
    model = Model(config, net, made)
    score = None if held_out is None else held_out_loss(model, held_out)
    return Parts(model, loaded, batcher, init, start, step, optim, key, score)


def _batcher(
    config: RunConfig, loaded: data.Dataset | data.LazyDataset
) -> data.Batcher | data.Stream:
    size, options = config.train.batch_size, config.data
    order: dict[str, Any] = {"shuffle": options.shuffle, "flip": options.flip}
    if isinstance(loaded, data.Dataset):
        return data.batches(loaded, size, **order)
    limit = options.max_unreadable or 100
    return data.stream(loaded, size, **order, on_error=options.on_error, max_unreadable=limit)


def _given(config: Any, *names: str) -> dict[str, Any]:
    """Return those of the named options that are set."""
    values = {name: getattr(config, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def dataset(config: DataConfig) -> data.Dataset:
    """Return the examples that a run with this config is trained on, in memory."""
    found = _datasets(dataclasses.replace(config, stream="off"))[0]
    assert isinstance(found, data.Dataset)
    return found


def _datasets(
    config: DataConfig,
) -> tuple[data.Dataset | data.LazyDataset, data.Dataset | None]:
    """Return the examples to train on, and those held out if there are any."""
    loaded = _load(config)
    if not config.held_out:
        return loaded, None
    if config.held_out >= loaded.num_examples:
        raise ValueError(
            f"--data.held-out {config.held_out} leaves nothing to train on: {loaded.name} has "
            f"{loaded.num_examples} examples."
        )
    first, held_out = loaded.split(loaded.num_examples - config.held_out, seed=config.seed)
    return first, held_out if isinstance(held_out, data.Dataset) else held_out.load()


def _load(config: DataConfig) -> data.Dataset | data.LazyDataset:
    common: dict[str, Any] = {
        "split": None if config.split == "train" else config.split,
        "size": config.size,
        "channels": config.channels,
        "classes": [int(c) if c.isdecimal() else c for c in config.classes or ()] or None,
    }
    if config.path == "molrg":
        names = ("dim", "rank", "num_components", "noise_std", "orthogonal")
        common |= {"seed": config.seed, **_given(config, *names)}
        if config.num_examples is not None:
            common["num_samples"] = config.num_examples
    else:
        common |= {"num_examples": config.num_examples, "seed": config.seed}
    always = config.stream == "on"
    if always or (config.stream == "auto" and config.path not in data.BUILT_IN):
        lazy = data.load_lazy(config.path, **common)
        if always or lazy.num_bytes > STREAM_BYTES:
            return lazy
        if lazy.held is not None:
            return lazy.held
    return data.load(config.path, **common)


def measured_std(dataset: data.Dataset) -> float:
    """Return the standard deviation of all coordinates of the data, to 4 digits."""
    if dataset.images.dtype == np.uint8:
        counts = np.bincount(dataset.images.reshape(-1), minlength=256)
        levels = np.arange(256) / 127.5 - 1
        mean = np.average(levels, weights=counts)
        std = np.sqrt(np.average((levels - mean) ** 2, weights=counts))
    else:
        std = dataset.images.std(dtype=np.float64)
    if not std > 0:
        raise ValueError(
            f"{dataset.name}: all values of the data are equal: there is nothing to learn; "
            "set --loss.data-std to train all the same."
        )
    return float(f"{std:.4g}")


def network(config: ModelConfig, dataset: data.Dataset | data.LazyDataset) -> networks.Network:
    """Return the network for a data set."""
    names = [f.name for f in dataclasses.fields(config) if f.name not in ("name", "conditional")]
    options = _given(config, *names)
    if config.conditional:
        if not dataset.num_classes:
            raise ValueError(f"--model.conditional needs labels, and {dataset.name} has none.")
        if config.name in ("lowrank", "linear"):
            raise ValueError(f"--model.conditional: the network {config.name!r} takes no labels.")
        options["num_classes"] = dataset.num_classes
    return networks.make(config.name, data_shape=dataset.data_shape, **options)


def schedule(config: ScheduleConfig) -> Schedule:
    """Return the noise schedule."""
    kind = {
        "ve": schedules.VE,
        "vp-linear": schedules.VPLinear,
        "vp-cosine": schedules.VPCosine,
        "rectified-flow": schedules.RectifiedFlow,
    }[config.name]
    return kind(**_given(config, "sigma_min", "sigma_max", "beta_min", "beta_max", "s"))


def loss(
    config: LossConfig,
    net: networks.Network,
    schedule: Schedule,
    batch_size: int,
    dropout: bool = False,
) -> LossFn:
    """Return the loss; ``config.data_std`` must be a number by now."""
    data_std = _known_std(config)
    weight = {
        "edm": lambda: losses.edm_weight(data_std),
        "snr": losses.snr_weight,
        "min-snr": lambda: losses.min_snr_weight(
            **({} if config.min_snr_gamma is None else {"gamma": config.min_snr_gamma})
        ),
        "uniform": losses.uniform_weight,
        "likelihood": losses.likelihood_weight,
        "sigmoid": lambda: losses.sigmoid_weight(
            **({} if config.sigmoid_bias is None else {"bias": config.sigmoid_bias})
        ),
    }[config.weight]()
    normal = {
        name: value
        for name, value in (("mean", config.level_mean), ("std", config.level_std))
        if value is not None
    }
    ends = {
        name: value
        for name, value in (("sigma_min", config.level_min), ("sigma_max", config.level_max))
        if value is not None
    }
    level = {
        "log-normal": lambda: losses.log_normal(**normal),
        "log-uniform": lambda: losses.log_uniform(**ends),
        "uniform": losses.uniform,
        "logit-normal": lambda: losses.logit_normal(**normal),
    }[config.levels]()
    return losses.make_loss(
        net,
        schedule,
        parametrization=config.parametrization,
        weight=weight,
        level=level,
        data_std=data_std,
        num_strata=batch_size if config.stratified else None,
        label_dropout=config.label_dropout,
        dropout=dropout,
    )


def held_out_loss(model: Model, held_out: data.Dataset) -> Callable[[Params], Array]:
    """Return ``params -> loss`` of held-out examples: one compiled call, without chance.

    It is the training loss with labels and without dropout. The noise is the same at every call
    and in every run, its levels spread evenly over the examples.
    """
    config, count = model.config, held_out.num_examples
    settings = dataclasses.replace(config.loss, stratified=True, label_dropout=0.0)
    loss_fn = loss(settings, model.net, model.schedule, count)
    size = min(config.train.batch_size, count)
    drawn = data.batches(held_out, size, shuffle="none")
    index = np.arange(-(-count // size) * size, dtype=np.int32)

    @jax.jit
    def score(params: Params, arrays: Any) -> Array:
        key = jax.random.key(0)

        def part(index: Array) -> Array:
            batch = drawn.examples(arrays, key, 0, index)
            return loss_fn(params, batch, key)

        losses = jax.lax.map(part, jax.numpy.asarray(index.reshape(-1, size)))
        return losses.reshape(-1)[:count].mean()

    return lambda params: score(params, drawn.arrays)


def optimizer(config: OptimConfig, num_steps: int) -> Any:
    """Return the optax optimizer."""
    # A warm-up longer than training is cut by the end of training, not refused.
    lr = training.optimizers.learning_rate(
        config.lr,
        max(num_steps, config.warmup),
        warmup=config.warmup,
        decay=config.decay,
        final=config.final or 0.0,
    )
    options = {"b1": config.beta1, "b2": config.beta2, **_given(config, "eps", "weight_decay")}
    given = {name: value for name, value in options.items() if value is not None}
    return training.optimizers.make(config.name, lr, clip=config.clip or None, **given)


def ema(config: TrainConfig) -> Any:
    """Return the decay of the moving average, or those of two, or None."""
    if config.ema_std is not None:
        stds = [std for std in (config.ema_std, config.ema_std_second) if std is not None]
        return [training.ema.power(training.ema.gamma_from_std(std)) for std in stds]
    decay = 0.999 if config.ema is None else config.ema
    return training.ema.classic(decay) if decay else None


def solver(config: SampleConfig) -> solvers.Solver:
    """Return the sampler."""
    eta = 1.0 if config.eta is None else config.eta
    return {
        "heun": lambda: solvers.heun(config.churn or 0.0),
        "euler": solvers.euler,
        "ddim": lambda: solvers.ddim(config.eta or 0.0),
        "midpoint": solvers.midpoint,
        "rk4": solvers.rk4,
        "dpm-2": lambda: solvers.dpm_solver(2),
        "dpm-3": lambda: solvers.dpm_solver(3),
        "dpmpp-2m": solvers.dpmpp_2m,
        "dpmpp-3m": solvers.dpmpp_3m,
        "dpmpp-2m-sde": lambda: solvers.dpmpp_2m_sde(eta),
        "dpmpp-3m-sde": lambda: solvers.dpmpp_3m_sde(eta),
        "deis": solvers.deis,
        "unipc": solvers.unipc,
        "ghvb": solvers.ghvb,
        "ancestral": solvers.ancestral,
        "euler-maruyama": lambda: solvers.euler_maruyama(eta),
        "sde-heun": lambda: solvers.sde_heun(eta),
        "langevin": lambda: solvers.predictor_corrector(solvers.ancestral()),
    }[config.solver]()


def grid(config: SampleConfig, schedule: Schedule) -> Array:
    """Return the times that sampling visits, noise to data."""
    in_time = {
        "log-snr": schedules.log_snr_grid,
        "quadratic": schedules.quadratic_grid,
        "uniform": schedules.uniform_grid,
    }
    if config.grid in in_time:
        return in_time[config.grid](schedule, config.num_steps)
    low = float(schedules.noise_levels(schedule, schedule.t_min))
    high = float(schedules.noise_levels(schedule, schedule.t_max))
    for name, level in (("min", config.sigma_min), ("max", config.sigma_max)):
        if level is not None and not low * (1 - 1e-5) <= level <= high * (1 + 1e-5):
            raise ValueError(
                f"--sample.sigma-{name} {level:g}: the schedule's noise levels go from {low:.4g} "
                f"to {high:.4g}; choose one of these, or another --schedule."
            )
    first = min(80.0 if config.sigma_max is None else config.sigma_max, high)
    last = max(0.002 if config.sigma_min is None else config.sigma_min, low)
    sigmas = schedules.karras_grid(config.num_steps, last, first, config.rho or 7.0)
    return schedules.times_from_sigmas(schedule, sigmas)


def denoiser(model: Model, params: Params, cond: Array | None = None) -> DenoiseFn:
    """Return the denoiser that parameters of a run stand for."""
    return from_network(
        model.net,
        params,
        model.schedule,
        parametrization=model.config.loss.parametrization,
        data_std=_known_std(model.config.loss),
        cond=cond,
    )


def guided(config: SampleConfig, model: Model, conditional_fn: Callable) -> Callable:
    """Return ``(x_t, t, label) -> x0_hat`` with the guidance that a config asks for."""
    if config.guidance is None:
        return conditional_fn
    interval = config.guidance_interval
    return guidance.classifier_free_batched(
        conditional_fn,
        model.net.num_classes,
        config.guidance,
        schedule=model.schedule,
        interval=None if interval is None else (interval[0], interval[1]),
    )


def _known_std(config: LossConfig) -> float:
    if config.data_std is None:
        raise ValueError("the standard deviation of the data is not known; set --loss.data-std.")
    return config.data_std


_FREE = {
    "data": {"path", "stream", "on_error", "max_unreadable"},
    "train": {
        "steps",
        "sample_every",
        "tensorboard",
        "wandb",
        "profile",
        "on_nonfinite",
        "max_skips",
        "max_spike",
    },
}


def fixed(parts: Parts) -> dict[str, Any]:
    """Return what a resumed run must share with its first start, for the trainer to compare.

    Free to change are the length of training, what is written on the way, how samples are drawn,
    the devices, and where the data lie: their content counts.
    """
    model = parts.model
    return {
        **assumed(model.config),
        "seed": model.config.seed,
        "model": {"name": model.net.name, **model.net.config},
        "schedule": {"name": model.config.schedule.name, **vars(model.schedule)},
        "data_examples": data.fingerprint(parts.dataset),
        **(
            {"data_sha256": parts.dataset.sha256} if isinstance(parts.dataset, data.Dataset) else {}
        ),
    }


def assumed(config: RunConfig | None = None) -> dict[str, Any]:
    """Return the options among :func:`fixed`: by default those of a run that recorded none.

    A run from before an option existed counts as one with the option's default.
    """
    options = dataclasses.asdict(RunConfig() if config is None else config)
    return {
        **{name: options[name] for name in ("init_from", "init_weights", "init_partial")},
        **{
            name: {k: v for k, v in options[name].items() if k not in _FREE.get(name, ())}
            for name in ("data", "loss", "optim", "train")
        },
    }
