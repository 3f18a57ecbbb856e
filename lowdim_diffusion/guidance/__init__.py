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

What guidance does is taken apart by ``linear_terms`` and ``local_terms`` into a mean shift, a
positive and a negative contrastive part, each of which ``guided_by_terms`` scales by itself.

Two more go beside a denoiser: ``langevin`` moves samples at a fixed noise level, which a
composition needs to be exact; ``svdd`` makes of a stochastic solver one that follows a reward
without its gradient.

Linear measurements ``y = A x_0 + s n``: operators (``inpainting``, ``downsampling``, ``blur``,
``matrix``, any linear function as a ``LinearOperator``) and methods that sample with them, ``mmps``
as a denoiser and ``dps``, ``pigdm``, ``ddnm``, ``dds``, ``replacement`` as hooks for
``sampling.sample(correct=...)``; ``repeated`` and ``resample`` are solvers for the hooks. See
:mod:`lowdim_diffusion.guidance.measurements`.
"""

from lowdim_diffusion.guidance.composition import LangevinResult, compose, langevin
from lowdim_diffusion.guidance.conditional import (
    autoguidance,
    classifier_free,
    classifier_free_batched,
)
from lowdim_diffusion.guidance.gradient import RULES, Rule, classifier, reward
from lowdim_diffusion.guidance.measurements import ddnm, dds, dps, mmps, pigdm, replacement
from lowdim_diffusion.guidance.mechanism import (
    GuidanceTerms,
    TermsFn,
    guided_by_terms,
    linear_terms,
    local_terms,
)
from lowdim_diffusion.guidance.operators import (
    LinearOperator,
    blur,
    downsampling,
    inpainting,
    matrix,
    measure,
    random_inpainting,
)
from lowdim_diffusion.guidance.resampling import repeated, resample
from lowdim_diffusion.guidance.soft_value import ValueFn, posterior_mean_value, svdd

__all__ = [
    "RULES",
    "GuidanceTerms",
    "LangevinResult",
    "LinearOperator",
    "Rule",
    "TermsFn",
    "ValueFn",
    "autoguidance",
    "blur",
    "classifier",
    "classifier_free",
    "classifier_free_batched",
    "compose",
    "ddnm",
    "dds",
    "downsampling",
    "dps",
    "guided_by_terms",
    "inpainting",
    "langevin",
    "linear_terms",
    "local_terms",
    "matrix",
    "measure",
    "mmps",
    "pigdm",
    "posterior_mean_value",
    "random_inpainting",
    "repeated",
    "replacement",
    "resample",
    "reward",
    "svdd",
]
