"""Named starting points: ``--preset NAME``.

The small ones train in minutes to an hour on a laptop's CPU; those ending in ``-paper`` have the
size of the published experiments and want accelerators (look at them first with ``--dry-run``).
"""

import dataclasses
from typing import Any

from lowdim_diffusion.cli.config import RunConfig

__all__ = ["PRESETS", "preset"]


def _with(base: RunConfig, **sections: Any) -> RunConfig:
    """Return ``base`` with values replaced, ``section=dict(option=value)``."""
    new = {
        name: dataclasses.replace(getattr(base, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in sections.items()
    }
    return dataclasses.replace(base, **new)


_DIGITS = RunConfig()

_MNIST = _with(
    _DIGITS,
    out="runs/mnist",
    data=dict(path="data/mnist"),
    model=dict(channels=32, channel_mult=(1, 2, 2), num_blocks=1, attention=(7,)),
    train=dict(steps=6000, batch_size=64),
    checkpoint=dict(every=500),
)

_CIFAR10 = _with(
    _MNIST,
    out="runs/cifar10",
    data=dict(path="data/cifar10", flip=True),
    model=dict(channels=32, channel_mult=(1, 2, 2), num_blocks=1, attention=(8,), dropout=0.1),
    train=dict(steps=20000),
)

# Karras et al. 2022, arXiv 2206.00364, appendix F.1, table 7 (CIFAR-10): 200 million images,
# batch 512, warm-up and half-life of the average given there in images (10 and 0.5 million).
_CIFAR10_PAPER = _with(
    _CIFAR10,
    out="runs/cifar10-paper",
    model=dict(channels=128, channel_mult=(2, 2, 2), num_blocks=4, attention=(16,), dropout=0.13),
    loss=dict(data_std=0.5),
    optim=dict(lr=1e-3, warmup=19531, clip=0.0),
    train=dict(steps=390625, batch_size=512, ema=0.5 ** (512 / 500_000)),
    checkpoint=dict(every=5000),
    sample=dict(batch_size=512),
)

# Wang et al. 2024, arXiv 2409.02426, section 5: a mixture of low-rank Gaussians, n = 48, K = 2, d
# = 6.
_MOLRG = _with(
    _DIGITS,
    out="runs/molrg",
    data=dict(path="molrg", dim=48, rank=6, num_components=2, num_examples=4096),
    model=dict(name="lowrank", rank=6, num_components=2),
    loss=dict(parametrization="x0", weight="uniform"),
    train=dict(steps=5000, batch_size=256),
)

# Three minutes of training at most on two cores; digits that a person recognises.
_DEMO = _with(
    _DIGITS,
    out="runs/demo",
    model=dict(channels=24),
    optim=dict(decay="cosine", lr=2e-3),
    train=dict(steps=2000, batch_size=64, ema=0.995),
    checkpoint=dict(every=250),
)

PRESETS: dict[str, tuple[str, RunConfig]] = {
    "digits": ("8x8 digits, built in; minutes on a CPU", _DIGITS),
    "demo": ("the same, shorter: what 'lowdim demo' trains", _DEMO),
    "mnist": ("28x28 MNIST from --data.path", _MNIST),
    "fashion-mnist": (
        "28x28 Fashion-MNIST from --data.path",
        _with(_MNIST, out="runs/fashion-mnist", data=dict(path="data/fashion-mnist")),
    ),
    "cifar10": ("32x32 CIFAR-10 from --data.path, small", _CIFAR10),
    "cifar10-paper": ("CIFAR-10 at the size of EDM: 200M images, batch 512", _CIFAR10_PAPER),
    "faces": (
        "gray faces from a folder or zip, as 32x32",
        _with(
            _CIFAR10,
            out="runs/faces",
            data=dict(path="data/faces", channels=1, size=32),
            model=dict(attention=(8,)),
        ),
    ),
    "molrg": ("low-rank Gaussian mixture and the low-rank denoiser of the theory", _MOLRG),
    "molrg-mlp": (
        "the same mixture learned by an MLP",
        _with(
            _MOLRG,
            out="runs/molrg-mlp",
            model=dict(name="mlp", rank=None, num_components=None, width=256, depth=4),
            loss=dict(parametrization="edm", weight="edm"),
        ),
    ),
}


def preset(name: str) -> RunConfig:
    """Return a preset's config.

    Raises:
        KeyError: if there is none of that name.
    """
    return PRESETS[name][1]
