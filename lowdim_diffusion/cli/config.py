"""The configuration of a run: nested frozen dataclasses, one per section of ``config.toml``.

Every field is an option of the command line (``optim.lr`` is ``--optim.lr``), a key of the file
and a default; the text under it is its help. Only the standard library is imported here.

Rule for unset values: an optional field is unset by default, and unset is written to a file by
leaving the key out. To unset what a preset or a file has set, say ``None`` on the command line or
``"None"`` in the file.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "SampleConfig",
    "ScheduleConfig",
    "TrainConfig",
    "check",
    "check_choices",
    "check_guidance",
    "check_processes",
    "check_ranges",
    "flag",
    "option",
    "options_of",
    "settle",
]

Network = Literal["unet", "mlp", "dit", "lowrank", "linear", "multistage_unet", "multistage_mlp"]
Schedule = Literal["ve", "vp-linear", "vp-cosine", "rectified-flow"]
Solver = Literal[
    "heun",
    "euler",
    "ddim",
    "midpoint",
    "rk4",
    "dpm-2",
    "dpm-3",
    "dpmpp-2m",
    "dpmpp-3m",
    "dpmpp-2m-sde",
    "dpmpp-3m-sde",
    "deis",
    "unipc",
    "ghvb",
    "ancestral",
    "euler-maruyama",
    "sde-heun",
    "langevin",
]
Grid = Literal["karras", "log-snr", "quadratic", "uniform"]
SDES = "dpmpp-2m-sde dpmpp-3m-sde euler-maruyama sde-heun"


def option(
    default: Any = None,
    *,
    ge: int | float | None = None,
    gt: int | float | None = None,
    le: int | float | None = None,
    lt: int | float | None = None,
    **only: str,
) -> Any:
    """Return a field with a range, and with the choices that it belongs to: ``name="unet dit"``."""
    bounds = {k: v for k, v in {"ge": ge, "gt": gt, "le": le, "lt": lt}.items() if v is not None}
    return field(default=default, metadata={"bounds": bounds, "only": only})


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    path: str = "digits"
    """'digits' (built in), 'molrg' (synthetic), or a file or folder: images, IDX, CIFAR, npz."""
    split: str = "train"
    """Part to use, where the data has parts: 'train', 'test', or a folder such as 'val'."""
    classes: tuple[str, ...] | None = None
    """Keep only these classes, by name or number."""
    size: int | None = option(ge=1)
    """Resize images to this height and width; unset keeps theirs."""
    channels: Literal[1, 3] | None = None
    """Convert images to gray (1) or colour (3)."""
    num_examples: int | None = option(ge=1)
    """Use only so many examples, chosen at random by data.seed; of 'molrg', draw so many."""
    held_out: int = option(0, ge=0)
    """Keep so many examples, chosen by data.seed, out of training: their loss is measured at every
    checkpoint."""
    seed: int = option(0, ge=0, lt=2**32)
    """Decides which examples, and what 'molrg' draws; apart from the run's seed."""
    shuffle: Literal["epoch", "replacement", "none"] = "epoch"
    """Every example once per epoch, independent draws, or in the order of the data."""
    flip: bool = False
    """Mirror images left to right at random."""
    stream: Literal["auto", "on", "off"] = "auto"
    """Read and decode examples as they are drawn ('on'), or hold all of them on every device
    ('off'); the batches are the same. 'auto': read those that would take more than 2 GB."""
    on_error: Literal["stop", "skip"] = "stop"
    """With --data.stream on, at an example that cannot be read: save and stop, or take the next one
    that can."""
    max_unreadable: int | None = option(ge=1, on_error="skip")
    """skip: stop once a process has met more than so many of them; unset: 100."""
    dim: int | None = option(ge=1, path="molrg")
    """molrg: ambient dimension."""
    rank: int | None = option(ge=1, path="molrg")
    """molrg: dimension of each subspace."""
    num_components: int | None = option(ge=1, path="molrg")
    """molrg: number of subspaces."""
    noise_std: float | None = option(ge=0, path="molrg")
    """molrg: standard deviation of the isotropic noise around the subspaces."""
    orthogonal: bool | None = option(path="molrg")
    """molrg: subspaces orthogonal to each other."""


@dataclass(frozen=True)
class ModelConfig:
    """The network. Unset options take the network's own defaults."""

    name: Network = "unet"
    """Which network."""
    conditional: bool = False
    """Condition on the class labels of the data."""
    dtype: Literal["float32", "bfloat16"] | None = option(
        name="unet mlp dit multistage_unet multistage_mlp"
    )
    """unet, mlp, dit: arithmetic inside the network; parameters stay float32."""
    channels: int | None = option(ge=1, name="unet multistage_unet")
    """unet: channels at the first resolution."""
    channel_mult: tuple[int, ...] | None = option(ge=1, name="unet multistage_unet")
    """unet: channels of each resolution, in multiples of the first."""
    num_blocks: int | None = option(ge=1, name="unet multistage_unet")
    """unet: residual blocks per resolution."""
    attention: tuple[int, ...] | None = option(ge=1, name="unet multistage_unet")
    """unet: image sizes at which to attend."""
    dropout: float | None = option(ge=0, lt=1, name="unet mlp dit multistage_unet multistage_mlp")
    """unet, mlp, dit: dropout rate."""
    width: int | None = option(ge=1, name="mlp dit multistage_mlp")
    """mlp, dit: features of a layer."""
    depth: int | None = option(ge=1, name="mlp dit multistage_mlp")
    """mlp, dit: number of blocks."""
    num_heads: int | None = option(ge=1, name="unet dit multistage_unet")
    """unet, dit: attention heads."""
    patch_size: int | None = option(ge=1, name="dit")
    """dit: side of a patch."""
    mlp_ratio: int | None = option(ge=1, name="dit")
    """dit: hidden features of a block, in multiples of the width."""
    num_components: int | None = option(ge=1, name="lowrank")
    """lowrank: number of subspaces."""
    rank: int | None = option(ge=1, name="lowrank")
    """lowrank: dimension of each subspace."""
    assignment: Literal["soft", "hard"] | None = option(name="lowrank")
    """lowrank: weights of the subspaces, soft-max or hard-max."""
    orthonormal: Literal["qr", "polar", "none"] | None = option(name="lowrank")
    """lowrank: how the free parameter becomes orthonormal frames, or not."""
    joint: bool | None = option(name="lowrank")
    """lowrank: subspaces orthogonal to each other."""
    cross_std: float | None = option(ge=0, lt=1, name="lowrank")
    """lowrank: standard deviation of the data's noise in the subspaces of the other components."""
    bounds: tuple[float, ...] | None = option(gt=0, name="multistage_unet multistage_mlp")
    """multistage: ascending noise levels sigma / alpha between the stages."""
    decoder_channels: tuple[int, ...] | None = option(ge=1, name="multistage_unet")
    """multistage_unet: channels of each stage's decoder, low noise first."""
    decoder_widths: tuple[int, ...] | None = option(ge=1, name="multistage_mlp")
    """multistage_mlp: features of a layer in each stage's decoder, low noise first."""
    decoder_depth: int | None = option(ge=1, name="multistage_mlp")
    """multistage_mlp: residual blocks of a decoder."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule x_t = alpha(t) x_0 + sigma(t) eps. Unset options take its defaults."""

    name: Schedule = "ve"
    """Which schedule; 've' is EDM's."""
    sigma_min: float | None = option(gt=0, name="ve")
    """ve: smallest noise level."""
    sigma_max: float | None = option(gt=0, name="ve")
    """ve: largest noise level."""
    beta_min: float | None = option(gt=0, name="vp-linear")
    """vp-linear: rate at t = 0."""
    beta_max: float | None = option(gt=0, name="vp-linear")
    """vp-linear: rate at t = 1."""
    s: float | None = option(ge=0, name="vp-cosine")
    """vp-cosine: offset."""


@dataclass(frozen=True)
class LossConfig:
    """Denoising score matching."""

    parametrization: Literal["edm", "eps", "v", "x0", "velocity"] = "edm"
    """What the network predicts."""
    weight: Literal["edm", "snr", "min-snr", "uniform", "likelihood", "sigmoid"] = "edm"
    """Weight of the clean-image error at each noise level."""
    min_snr_gamma: float | None = option(gt=0, weight="min-snr")
    """min-snr: largest weight."""
    sigmoid_bias: float | None = option(weight="sigmoid")
    """sigmoid: bias of the log-SNR."""
    levels: Literal["log-normal", "log-uniform", "uniform", "logit-normal"] = "log-normal"
    """Distribution of the noise levels trained on."""
    level_mean: float | None = option(levels="log-normal logit-normal")
    """log-normal, logit-normal: mean of the logarithm or logit."""
    level_std: float | None = option(gt=0, levels="log-normal logit-normal")
    """log-normal, logit-normal: standard deviation of it."""
    level_min: float | None = option(gt=0, levels="log-uniform")
    """log-uniform: smallest noise level."""
    level_max: float | None = option(gt=0, levels="log-uniform")
    """log-uniform: largest noise level."""
    stratified: bool = False
    """Spread the noise levels of a batch evenly over their distribution."""
    data_std: float | None = option(gt=0)
    """Standard deviation of one coordinate of the data; unset measures it."""
    label_dropout: float = option(0.0, ge=0, le=1)
    """Share of labels hidden in training, for classifier-free guidance."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate."""

    name: Literal["adam", "adamw", "sgd", "lion", "muon"] = "adam"
    """Which optimizer."""
    lr: float = option(1e-3, gt=0)
    """Peak learning rate."""
    warmup: int = option(100, ge=0)
    """Steps over which the learning rate grows from 0."""
    decay: Literal["constant", "cosine", "linear", "inverse-sqrt"] = "constant"
    """Learning rate after the warm-up."""
    final: float | None = option(ge=0, le=1, decay="cosine linear")
    """cosine, linear: last learning rate as a fraction of the peak; unset takes 0."""
    beta1: float | None = option(ge=0, lt=1, name="adam adamw sgd lion")
    """adam, adamw, lion: decay of the gradient's average; sgd: momentum; unset takes 0.9."""
    beta2: float | None = option(ge=0, lt=1, name="adam adamw lion")
    """adam, adamw: decay of the squared gradient's average; lion: of its second one."""
    eps: float | None = option(gt=0, name="adam adamw")
    """adam, adamw: what keeps the division finite."""
    weight_decay: float | None = option(ge=0, name="adamw lion muon")
    """adamw, lion, muon: decoupled weight decay; unset takes 0.0001, 0.001, 0."""
    clip: float = option(1.0, ge=0)
    """Largest norm of the gradient; 0 does not clip."""
    accumulate: int = option(1, ge=1)
    """Work through a batch in so many parts, to save memory."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of training and what is written on the way."""

    steps: int = option(4000, ge=1)
    """Updates in all; a larger number continues a finished run."""
    batch_size: int = option(128, ge=1)
    """Examples per update, over all devices together."""
    ema: float | None = option(ge=0, lt=1, ema_std="none")
    """Decay of the parameters' moving average that samples come from; unset 0.999, 0 keeps none."""
    ema_std: float | None = option(gt=0, lt=0.28)
    """Relative width of a power-function average instead (EDM2; 0.05 to 0.25)."""
    ema_std_second: float | None = option(gt=0, lt=0.28)
    """Width of a second one; of both 'lowdim export --ema-std' makes any other after training."""
    sample_every: int = option(0, ge=0)
    """Steps between sample grids in RUN/samples; 0 draws none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is infinite or NaN, or at a spike: stop (exit code 4), or skip the
    update."""
    max_skips: int | None = option(ge=1, on_nonfinite="skip")
    """skip: stop all the same after so many in a row; unset takes 10."""
    max_spike: float | None = option(gt=1)
    """A loss above so many times the median of the last 64 is a spike; unset: none is."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the 'tensorboard' extra)."""
    wandb: str | None = None
    """Also log to this project of Weights & Biases (needs the 'wandb' extra)."""
    profile: bool = False
    """Record a few steps with jax's profiler, into RUN/profile."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in RUN/checkpoints. One is always written at the end and when interrupted."""

    every: int = option(1000, ge=1)
    """Steps between checkpoints."""
    keep: int = option(3, ge=1)
    """How many of the newest to keep."""
    keep_every: int | None = option(ge=1)
    """Also keep the steps that are multiples of this one, for ever."""
    keep_best: int = option(0, ge=0)
    """Also keep so many with the lowest held-out loss (needs data.held-out)."""


@dataclass(frozen=True)
class SampleConfig:
    """How samples are drawn: during training, and by 'lowdim sample' unless told otherwise."""

    solver: Solver = "heun"
    """Sampler."""
    num_steps: int = option(18, ge=1)
    """Steps from noise to data (heun calls the network twice per step)."""
    num_samples: int = option(64, ge=1)
    """How many samples."""
    batch_size: int = option(64, ge=1)
    """How many at a time."""
    grid: Grid = "karras"
    """Spacing of the noise levels."""
    sigma_min: float | None = option(gt=0, grid="karras")
    """karras: smallest noise level; unset takes 0.002 or the schedule's smallest."""
    sigma_max: float | None = option(gt=0, grid="karras")
    """karras: largest noise level; unset takes 80 or the schedule's largest."""
    rho: float | None = option(gt=0, grid="karras")
    """karras: 1 is uniform, larger puts more steps at low noise; unset takes 7."""
    churn: float | None = option(ge=0, solver="heun")
    """heun: noise added back in, EDM's S_churn; unset adds none (deterministic)."""
    eta: float | None = option(ge=0, le=1, solver=f"ddim {SDES}")
    """ddim: 0 (deterministic) to 1 (ancestral); unset takes 0. Solvers of SDEs: noise rate; unset
    takes 1."""
    guidance: float | None = option(ge=0)
    """Classifier-free guidance, for labels and loss.label_dropout; 1 is none, 0 ignores labels."""
    guidance_interval: tuple[float, ...] | None = option(ge=0)
    """Guide only between these two noise levels, LOW HIGH; unset guides at all."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes train one run: 'lowdim launch' and '--distributed' set these themselves."""

    coordinator: str | None = None
    """HOST:PORT of process 0, the same for all processes."""
    num_processes: int | None = option(ge=1)
    """How many processes there are."""
    process_id: int | None = option(ge=0)
    """Which of them this is, from 0."""
    initialization_timeout: int | None = option(ge=1)
    """Seconds to wait at the start until all have come; unset takes 300."""
    heartbeat_timeout: int | None = option(ge=1)
    """Seconds of silence after which a process counts as dead; unset takes 100."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run; its defaults are the preset 'digits'."""

    out: str = "runs/digits"
    """Run directory; the same command again continues the run in it."""
    seed: int = option(0, ge=0, lt=2**32)
    """Seed of everything random: parameters, batches, noise."""
    devices: int | None = option(ge=1)
    """How many devices to train on, over all processes together; unset takes all."""
    fsdp: bool = False
    """Split parameters, optimizer state and averages over the devices instead of copying them."""
    init_from: str | None = None
    """Start a new run with the weights of another: RUN, RUN@STEP, RUN@best, or an exported
    .safetensors file."""
    init_weights: Literal["ema", "params"] = "ema"
    """Which of its weights: the moving average, or the last ones."""
    init_partial: bool = False
    """Take over the weights that fit; name the others, which start afresh."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def options_of(config: Any, prefix: str = "") -> list[tuple[str, dataclasses.Field, Any]]:
    """Return ``(dotted name, field, value)`` of every option of a config, sections opened."""
    found = []
    for f in dataclasses.fields(config):
        name, value = prefix + f.name, getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            found += options_of(value, f"{name}.")
        else:
            found.append((name, f, value))
    return found


def flag(name: str) -> str:
    """Return the spelling of an option on the command line."""
    return "--" + name.replace("_", "-")


def _misplaced(section: Any, f: dataclasses.Field) -> tuple[str, str, str] | None:
    """Return ``(choice, chosen, allowed)`` if a set option belongs to another choice."""
    if getattr(section, f.name) is None:
        return None
    for choice, allowed in f.metadata.get("only", {}).items():
        chosen = str(getattr(section, choice)).lower()
        if chosen not in allowed.split():
            return choice, chosen, allowed
    return None


def settle(config: Any, base: Any) -> Any:
    """Return ``config`` without leftovers: options that only ``base`` set, for another choice.

    ``--preset mnist --model.name mlp`` drops the preset's U-Net options this way; an option that
    the user gave for the wrong network stays, and :func:`check` refuses it. Both are run configs,
    or the same section of two.
    """
    new = {}
    for f in dataclasses.fields(config):
        value, old = getattr(config, f.name), getattr(base, f.name)
        if dataclasses.is_dataclass(value):
            new[f.name] = settle(value, old)
        elif _misplaced(config, f) and not _misplaced(base, f) and value == old:
            new[f.name] = None
    return dataclasses.replace(config, **new)


def check_choices(config: Any, prefix: str = "") -> None:
    """Raise ``ValueError`` in one line if an option is set that belongs to another choice."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            check_choices(value, f"{prefix}{f.name}.")
        elif misplaced := _misplaced(config, f):
            choice, chosen, allowed = misplaced
            name = choice.replace("_", "-")
            raise ValueError(
                f"{flag(prefix + f.name)} belongs to {flag(prefix + choice)} "
                f"{' or '.join(allowed.split())}, but {name} is {chosen!r}"
            )


def check(config: RunConfig) -> None:
    """Raise ``ValueError`` in one line if a value is out of range or options contradict."""
    check_ranges(config)
    check_choices(config)
    for section, low, high in (
        ("schedule", "sigma_min", "sigma_max"),
        ("schedule", "beta_min", "beta_max"),
        ("loss", "level_min", "level_max"),
        ("sample", "sigma_min", "sigma_max"),
    ):
        a, b = (getattr(getattr(config, section), name) for name in (low, high))
        if a is not None and b is not None and a >= b:
            raise ValueError(
                f"{flag(f'{section}.{low}')} must be below {flag(f'{section}.{high}')}, "
                f"got {a} and {b}"
            )
    if config.train.batch_size % config.optim.accumulate:
        raise ValueError(
            f"--train.batch-size {config.train.batch_size} does not divide into "
            f"--optim.accumulate {config.optim.accumulate} parts"
        )
    if config.train.ema_std_second is not None and config.train.ema_std is None:
        raise ValueError("--train.ema-std-second is a second average: set --train.ema-std as well")
    cadence = config.checkpoint
    if cadence.keep_every is not None and cadence.keep_every % cadence.every:
        raise ValueError(
            f"--checkpoint.keep-every must be a multiple of --checkpoint.every {cadence.every}, "
            f"got {cadence.keep_every}"
        )
    if cadence.keep_best and not config.data.held_out:
        raise ValueError(
            "--checkpoint.keep-best goes by the loss of examples that are not trained on: set "
            "--data.held-out, 500 for instance"
        )
    if config.data.on_error == "skip" and config.data.stream != "on":
        raise ValueError(
            "--data.on-error skip is for data that are read as they are drawn: add --data.stream on"
        )
    if config.loss.label_dropout and not config.model.conditional:
        raise ValueError("--loss.label-dropout hides labels, but --model.conditional is off")
    check_guidance(config.sample, config.loss)
    if not config.out:
        raise ValueError("--out is empty; give a directory")
    check_processes(config.distributed)


def check_processes(config: DistributedConfig) -> None:
    """Raise ``ValueError`` in one line if the processes of a run are described in part only."""
    place = {
        "--distributed.coordinator": config.coordinator,
        "--distributed.num-processes": config.num_processes,
        "--distributed.process-id": config.process_id,
    }
    missing = [name for name, value in place.items() if value is None]
    if 0 < len(missing) < len(place):
        raise ValueError(
            f"{' and '.join(missing)} missing: give all of {', '.join(place)}, or --distributed "
            "alone where the processes find each other (SLURM, TPU, Kubernetes, Open MPI)"
        )
    if missing:
        return
    assert config.coordinator and config.num_processes and config.process_id is not None
    host, _, port = config.coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"--distributed.coordinator must be HOST:PORT, got {config.coordinator!r}")
    if config.process_id >= config.num_processes:
        raise ValueError(
            f"--distributed.process-id must be below --distributed.num-processes "
            f"{config.num_processes}, got {config.process_id}"
        )


def check_guidance(sample: SampleConfig, loss: LossConfig) -> None:
    """Raise ``ValueError`` in one line if a run cannot be guided, or not in this way."""
    interval = sample.guidance_interval
    if sample.guidance is not None and not loss.label_dropout:
        raise ValueError(
            "guidance compares with and without the label, and the network learns the latter only "
            "with --loss.label-dropout (0.1, say) in training"
        )
    if interval is not None and sample.guidance is None:
        raise ValueError("the guidance interval needs guidance, 2 for instance")
    if interval is not None and not (len(interval) == 2 and interval[0] < interval[1]):
        raise ValueError(
            f"the guidance interval must be two noise levels, LOW HIGH, got {interval}"
        )


def check_ranges(config: Any) -> None:
    """Raise ``ValueError`` in one line if a value is outside the range of its option."""
    for name, f, value in options_of(config):
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{flag(name)} holds a NUL character, got {value!r}")
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        for number in values:
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_bounds(name, number, f.metadata.get("bounds", {}))


def _check_bounds(name: str, number: int | float, bounds: dict[str, Any]) -> None:
    if not math.isfinite(number):
        raise ValueError(f"{flag(name)} must be finite, got {number}")
    tests = {
        "ge": (lambda bound: number >= bound, "at least"),
        "gt": (lambda bound: number > bound, "above"),
        "le": (lambda bound: number <= bound, "at most"),
        "lt": (lambda bound: number < bound, "below"),
    }
    if not all(tests[k][0](bound) for k, bound in bounds.items()):
        wanted = " and ".join(f"{tests[k][1]} {bound}" for k, bound in bounds.items())
        raise ValueError(f"{flag(name)} must be {wanted}, got {number}")
