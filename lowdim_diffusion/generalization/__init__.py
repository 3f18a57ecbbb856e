"""Generalization against memorization: nearest training examples and the scores built on them."""

from lowdim_diffusion.generalization.embeddings import (
    SSCD_THRESHOLD,
    Embedding,
    Features,
    default_embedding,
    image_embedding,
    load_features,
    no_embedding,
    pixel_embedding,
)
from lowdim_diffusion.generalization.scores import (
    Similar,
    authentic_fraction,
    calibrate_threshold,
    distance_ratio_score,
    generalization_score,
    is_memorized,
    mae_score,
    memorized_fraction,
    most_similar,
    pixel_novelty,
    reproducibility_score,
)
from lowdim_diffusion.neighbors import Nearest, nearest

__all__ = [
    "SSCD_THRESHOLD",
    "Embedding",
    "Features",
    "Nearest",
    "Similar",
    "authentic_fraction",
    "calibrate_threshold",
    "default_embedding",
    "distance_ratio_score",
    "generalization_score",
    "image_embedding",
    "is_memorized",
    "load_features",
    "mae_score",
    "memorized_fraction",
    "most_similar",
    "nearest",
    "no_embedding",
    "pixel_embedding",
    "pixel_novelty",
    "reproducibility_score",
]
