"""Guidance: new denoisers from denoisers, which every sampler and tool takes like any other.

===========================  ===================================================================
function                     what it returns
===========================  ===================================================================
``classifier_free``          a conditional denoiser pushed off an unconditional one
``classifier_free_batched``  the same from one call of twice the batch
``autoguidance``             a denoiser pushed off a weaker version of itself
``compose``                  several conditions at once, or the absence of some
``classifier``               moved by the gradient of a log-likelihood at ``x_t``
``reward``                   moved by the gradient of a reward, three rules
===========================  ===================================================================

Two more go beside a denoiser: ``langevin`` moves samples at a fixed noise level, which a
composition needs to be exact; ``svdd`` makes of a stochastic solver one that follows a reward
without its gradient.
"""

from lowdim_diffusion.guidance.composition import LangevinResult, compose, langevin
from lowdim_diffusion.guidance.conditional import (
    autoguidance,
    classifier_free,
    classifier_free_batched,
)
from lowdim_diffusion.guidance.gradient import RULES, Rule, classifier, reward
from lowdim_diffusion.guidance.soft_value import ValueFn, posterior_mean_value, svdd

__all__ = [
    "LangevinResult",
    "RULES",
    "Rule",
    "ValueFn",
    "autoguidance",
    "classifier",
    "classifier_free",
    "classifier_free_batched",
    "compose",
    "langevin",
    "posterior_mean_value",
    "reward",
    "svdd",
]
