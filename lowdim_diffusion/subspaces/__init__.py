"""Subspaces: angles and distances between them, components matched, Jacobian spectra and ranks."""

from lowdim_diffusion.subspaces import dimension
from lowdim_diffusion.subspaces.angles import (
    affinity,
    chordal_distance,
    geodesic_distance,
    principal_angles,
    projector_distance,
    spectral_distance,
)
from lowdim_diffusion.subspaces.atlas import (
    STEPS,
    Atlas,
    Linearity,
    linearity,
    spectral_atlas,
    step_length,
)
from lowdim_diffusion.subspaces.clustering import KSubspaces, assign_points, k_subspaces, starts
from lowdim_diffusion.subspaces.gauge import gauge_residual, gauge_scores, gauged
from lowdim_diffusion.subspaces.jacobian import (
    JacobianInfo,
    jacobian_asymmetry,
    jacobian_frobenius,
    jacobian_spectrum,
    jacobian_svd,
)
from lowdim_diffusion.subspaces.recovery import (
    Matching,
    match_components,
    off_span_energy,
    off_union_energy,
)
from lowdim_diffusion.subspaces.scores import (
    adjusted_rand_index,
    clustering_accuracy,
    normalized_mutual_info,
)
from lowdim_diffusion.subspaces.sparse import (
    ElasticNetInfo,
    coefficient_affinity,
    ensc,
    lsr,
    sparse_subspace_clustering,
    spectral_clustering,
    ssc_omp,
    tsc,
)
from lowdim_diffusion.subspaces.spectra import numerical_rank, pca

__all__ = [
    "Atlas",
    "ElasticNetInfo",
    "JacobianInfo",
    "KSubspaces",
    "Linearity",
    "Matching",
    "STEPS",
    "adjusted_rand_index",
    "affinity",
    "assign_points",
    "chordal_distance",
    "clustering_accuracy",
    "coefficient_affinity",
    "dimension",
    "ensc",
    "gauge_residual",
    "gauge_scores",
    "gauged",
    "geodesic_distance",
    "jacobian_asymmetry",
    "jacobian_frobenius",
    "jacobian_spectrum",
    "jacobian_svd",
    "k_subspaces",
    "linearity",
    "lsr",
    "match_components",
    "normalized_mutual_info",
    "numerical_rank",
    "off_span_energy",
    "off_union_energy",
    "pca",
    "principal_angles",
    "projector_distance",
    "sparse_subspace_clustering",
    "spectral_atlas",
    "spectral_clustering",
    "spectral_distance",
    "ssc_omp",
    "starts",
    "step_length",
    "tsc",
]
