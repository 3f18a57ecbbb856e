"""Model safety: watermarks, and detectors of memorized and of hallucinated samples.

The detectors need one model only. They give one score per sample, high for a suspect;
:func:`auroc` and :func:`true_positive_rate` say how well a score separates suspects that are known.
:func:`relu_autoencoder` is the theory of the first: a two-layer network whose optimum is known, and
with it which examples it memorizes.

:mod:`watermark` hides a secret pattern in what the sampler takes for noise, :mod:`attacks` tries to
remove it.
"""

from lowdim_diffusion.safety import attacks, watermark
from lowdim_diffusion.safety.detectors import representation_spread, trajectory_variance
from lowdim_diffusion.safety.rates import auroc, true_positive_rate
from lowdim_diffusion.safety.relu import ReluAutoencoder, relu_autoencoder

__all__ = [
    "ReluAutoencoder",
    "attacks",
    "auroc",
    "relu_autoencoder",
    "representation_spread",
    "trajectory_variance",
    "true_positive_rate",
    "watermark",
]
