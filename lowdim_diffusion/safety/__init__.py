"""Model safety: detectors of memorized and of hallucinated samples that need one model only.

Both give one score per sample, high for a suspect; :func:`auroc` and :func:`true_positive_rate` say
how well a score separates suspects that are known. :func:`relu_autoencoder` is the theory of the
first: a two-layer network whose optimum is known, and with it which examples it memorizes.
"""

from lowdim_diffusion.safety.detectors import representation_spread, trajectory_variance
from lowdim_diffusion.safety.rates import auroc, true_positive_rate
from lowdim_diffusion.safety.relu import ReluAutoencoder, relu_autoencoder

__all__ = [
    "ReluAutoencoder",
    "auroc",
    "relu_autoencoder",
    "representation_spread",
    "trajectory_variance",
    "true_positive_rate",
]
