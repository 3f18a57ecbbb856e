"""Guidance: new denoisers from denoisers, which every sampler and tool takes like any other.

=========================  ======================================================
function                   what it returns
=========================  ======================================================
``classifier_free``        a conditional denoiser pushed off an unconditional one
``autoguidance``           a denoiser pushed off a weaker version of itself
=========================  ======================================================
"""

from lowdim_diffusion.guidance.conditional import (
    autoguidance,
    classifier_free,
    classifier_free_batched,
)

__all__ = ["autoguidance", "classifier_free", "classifier_free_batched"]
