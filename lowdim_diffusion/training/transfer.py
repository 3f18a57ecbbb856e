"""Weights of one network as the start of another: all of them, or those that fit."""

import jax
import jax.numpy as jnp

from lowdim_diffusion._types import Params
from lowdim_diffusion.training import _leaves
from lowdim_diffusion.training.checkpoint import IncompatibleStateError

__all__ = ["transfer"]


def transfer(
    stored: Params, params: Params, *, partial: bool = False
) -> tuple[Params, dict[str, str]]:
    """Return ``params`` with the values of ``stored``, and the leaves that were not taken over.

    Leaves belong together by their path in the tree; containers may differ (a checkpoint read
    without its structure has dictionaries only).

    Args:
        stored: trained parameters.
        params: freshly initialised ones.
        partial: keep the fresh leaf where the stored one is missing or has another shape or dtype,
            and drop stored leaves without a counterpart; otherwise these are errors.

    Returns:
        The parameters, and ``path -> "float32[4,8] there, float32[4,9] here"`` for each leaf that
        differs; empty unless ``partial``.

    Raises:
        IncompatibleStateError: naming the first leaf that differs; or, with ``partial``, if no leaf
            fits.

    Examples:
        >>> stored = {"w": jnp.ones((2, 3)), "head": jnp.ones(3)}
        >>> fresh = {"w": jnp.zeros((2, 3)), "head": jnp.zeros(5)}
        >>> params, left = transfer(stored, fresh, partial=True)
        >>> params["w"].sum().item(), left
        (6.0, {'head': 'float32[3] there, float32[5] here'})
    """
    old, new = _leaves.flatten(stored), _leaves.flatten(params)
    there = {path: _leaves.spell(_leaves.describe(leaf)) for path, leaf in old.items()}
    here = {path: _leaves.spell(_leaves.describe(leaf)) for path, leaf in new.items()}
    left = {
        path: f"{there.get(path, 'absent')} there, {here.get(path, 'absent')} here"
        for path in sorted(there.keys() | here.keys())
        if there.get(path) != here.get(path)
    }
    first = next(iter(left.items()), None)
    if first is not None and not partial:
        more = f" ({len(left) - 1} more leaves differ)" if len(left) > 1 else ""
        raise IncompatibleStateError(
            f"the weights do not fit: {first[0]} is {first[1]}{more}; use the options of the "
            "network that they come from, or --init-partial to start the others afresh."
        )
    if not new.keys() - left.keys():
        raise IncompatibleStateError("no leaf of the weights fits: it is another network.")
    merged = [leaf if path in left else jnp.asarray(old[path]) for path, leaf in new.items()]
    return jax.tree.unflatten(jax.tree.structure(params), merged), left
