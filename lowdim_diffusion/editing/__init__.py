"""Editing: directions that act on a region, masks that say where, scores of what an edit did."""

from lowdim_diffusion.editing import masks
from lowdim_diffusion.editing.loco import (
    Directions,
    Edits,
    edit,
    find_directions,
    given_directions,
    loco,
    random_directions,
    supervised_direction,
)
from lowdim_diffusion.editing.masks import check_mask
from lowdim_diffusion.editing.properties import additivity_error, sign_error, transfer_cosine
from lowdim_diffusion.editing.scores import (
    Change,
    RoundTrip,
    edit_success,
    feature_distance,
    inside_outside_change,
    pyramid_features,
    round_trip_error,
    ssim,
    success_rate,
    transfer_rate,
)

__all__ = [
    "Change",
    "Directions",
    "Edits",
    "RoundTrip",
    "additivity_error",
    "check_mask",
    "edit",
    "edit_success",
    "feature_distance",
    "find_directions",
    "given_directions",
    "inside_outside_change",
    "loco",
    "masks",
    "pyramid_features",
    "random_directions",
    "round_trip_error",
    "sign_error",
    "ssim",
    "success_rate",
    "supervised_direction",
    "transfer_cosine",
    "transfer_rate",
]
