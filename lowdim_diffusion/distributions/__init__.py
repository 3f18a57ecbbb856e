r"""Distributions whose noisy versions are known exactly: density, score, denoiser and its Jacobian.

For ``x = alpha x_0 + sigma eps`` the score and the posterior mean are tied by Tweedie's formula,
``D(x) = (x + sigma^2 score(x)) / alpha``, and the Jacobian of the posterior mean is the posterior
covariance, ``dD/dx = (alpha / sigma^2) Cov[x_0 | x]``. They are the oracles against which networks,
solvers and metrics are checked. Given a linear measurement, :func:`condition` returns the exact
posterior.
"""

from lowdim_diffusion.distributions._base import Distribution
from lowdim_diffusion.distributions.empirical import Empirical
from lowdim_diffusion.distributions.gaussian import Gaussian
from lowdim_diffusion.distributions.molrg import MoLRG
from lowdim_diffusion.distributions.posterior import Posterior, condition

__all__ = ["Distribution", "Empirical", "Gaussian", "MoLRG", "Posterior", "condition"]
