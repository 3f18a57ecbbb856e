"""Subspaces: angles and distances between them, components matched, Jacobian spectra and ranks."""

from lowdim_diffusion.subspaces.angles import (
    Matching,
    affinity,
    chordal_distance,
    geodesic_distance,
    match_components,
    principal_angles,
    projector_distance,
)
from lowdim_diffusion.subspaces.spectra import (
    JacobianInfo,
    jacobian_spectrum,
    jacobian_svd,
    numerical_rank,
    pca,
    trajectory_spectra,
)

__all__ = [
    "JacobianInfo",
    "Matching",
    "affinity",
    "chordal_distance",
    "geodesic_distance",
    "jacobian_spectrum",
    "jacobian_svd",
    "match_components",
    "numerical_rank",
    "pca",
    "principal_angles",
    "projector_distance",
    "trajectory_spectra",
]
