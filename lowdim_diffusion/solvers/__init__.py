r"""Solvers: one step of the reverse process, from noise level ``t`` to the next lower one.

A solver is a small record of pure functions, :class:`Solver`. Its step is given the denoiser
itself, so that it may evaluate it as often and wherever it wants, and coefficients that depend on
the time grid alone and are computed for all steps at once (:func:`plan`).
``lowdim_diffusion.sampling`` runs it.

=================  =====  ===========  ===========  ==========================================
factory            order  evaluations  randomness   method
=================  =====  ===========  ===========  ==========================================
``euler``          1      1            none         Euler in (x / alpha, sigma / alpha)
``ddim``           1      1            if eta > 0   DDIM; eta = 0 is ``euler``
``ancestral``      1      1            every step   DDPM; ``ddim(eta=1)`` by default
``heun``           2      2            if churn     EDM's algorithms 1 and 2
``midpoint``       2      2            none         midpoint rule in rho
``rk4``            4      4            none         classical Runge-Kutta in rho
``dpm_solver``     2-3    2-3          none         single-step DPM-Solver-2, -3
``dpmpp_2m``       2      1            none         DPM-Solver++(2M), two-step
``dpmpp_3m``       3      1            none         DPM-Solver++, three-step
``dpmpp_2m_sde``   2      1            every step   SDE-DPM-Solver++(2M)
``dpmpp_3m_sde``   2      1            every step   SDE-DPM-Solver++(3M)
``deis``           1-4    1            none         DEIS (tAB): noise extrapolated in time
``adams_...``      1-4    1            none         ``adams_bashforth``: the same in rho
``unipc``          2-4    1            none         UniPC: predictor and corrector in log-SNR
``heavy_ball``     1      1            none         Adams-Bashforth with momentum
``ghvb``           1-2    1            none         the same, keeping the order
``euler_...``      1      1            every step   ``euler_maruyama``, in t
``sde_heun``       2      2            every step   stochastic Heun, in t
``predictor_...``  0      + moves      every step   ``predictor_corrector``: Langevin moves
``bdia``           1-2    1            none         exactly invertible, two-step
``edict``          1      2            none         exactly invertible, two copies
=================  =====  ===========  ===========  ==========================================

The order is that of the error at a fixed final time against the step size (for random solvers, of
the moments). Whatever the solver, a last interval that ends on the clean example (``ts[-1]`` at
most ``schedule.t_min``) is the denoiser's output itself and costs one evaluation (not for the last
two, which keep it invertible).
"""

from lowdim_diffusion.solvers._base import (
    CorrectFn,
    Grid,
    Kernel,
    Plan,
    Solver,
    State,
    StepResult,
    ends_clean,
    plan,
)
from lowdim_diffusion.solvers.dpm import dpmpp_2m
from lowdim_diffusion.solvers.first_order import ancestral, ddim, euler
from lowdim_diffusion.solvers.heun import heun
from lowdim_diffusion.solvers.langevin import predictor_corrector
from lowdim_diffusion.solvers.momentum import ghvb, heavy_ball
from lowdim_diffusion.solvers.multistep import (
    adams_bashforth,
    deis,
    dpmpp_2m_sde,
    dpmpp_3m,
    dpmpp_3m_sde,
)
from lowdim_diffusion.solvers.reversible import bdia, edict
from lowdim_diffusion.solvers.sde import euler_maruyama, sde_heun
from lowdim_diffusion.solvers.single_step import dpm_solver, midpoint, rk4
from lowdim_diffusion.solvers.unipc import unipc

__all__ = [
    "CorrectFn",
    "Grid",
    "Kernel",
    "Plan",
    "Solver",
    "State",
    "StepResult",
    "adams_bashforth",
    "ancestral",
    "bdia",
    "ddim",
    "deis",
    "dpm_solver",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "edict",
    "ends_clean",
    "euler",
    "euler_maruyama",
    "ghvb",
    "heavy_ball",
    "heun",
    "midpoint",
    "plan",
    "predictor_corrector",
    "rk4",
    "sde_heun",
    "unipc",
]
