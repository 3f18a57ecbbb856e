"""Model safety: training examples that a model holds, detectors, watermarks.

:func:`extraction` compares samples with the training data. Detectors of memorized and hallucinated
samples give one score per sample, high for a suspect; :func:`auroc` and :func:`true_positive_rate`
say how well a score separates suspects that are known, :func:`choose_score` picks one of many.
:func:`relu_autoencoder` is the theory of the detector of copies: a two-layer network whose optimum
is known, and with it which examples it memorizes.

:mod:`watermark` hides a secret pattern in what the sampler takes for noise, :mod:`attacks` tries to
remove it.
"""

from lowdim_diffusion.safety import attacks, watermark
from lowdim_diffusion.safety.detectors import representation_spread, trajectory_variance
from lowdim_diffusion.safety.extraction import (
    Extractable,
    Extraction,
    duplicates,
    extractable,
    extraction,
)
from lowdim_diffusion.safety.rates import auroc, true_positive_rate
from lowdim_diffusion.safety.relu import ReluAutoencoder, relu_autoencoder
from lowdim_diffusion.safety.selection import Calm, Chosen, choose_score, keep_calmest

__all__ = [
    "Calm",
    "Chosen",
    "Extractable",
    "Extraction",
    "ReluAutoencoder",
    "attacks",
    "auroc",
    "choose_score",
    "duplicates",
    "extractable",
    "extraction",
    "keep_calmest",
    "relu_autoencoder",
    "representation_spread",
    "trajectory_variance",
    "true_positive_rate",
    "watermark",
]
