"""Generalization against memorization: nearest training examples and the scores built on them."""

from lowdim_diffusion.generalization.scores import (
    generalization_score,
    is_memorized,
    memorized_fraction,
    pixel_embedding,
    reproducibility_score,
)
from lowdim_diffusion.neighbors import Nearest, nearest

__all__ = [
    "Nearest",
    "generalization_score",
    "is_memorized",
    "memorized_fraction",
    "nearest",
    "pixel_embedding",
    "reproducibility_score",
]
