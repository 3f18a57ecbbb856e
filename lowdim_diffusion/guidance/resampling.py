r"""Solvers for data consistency that go back to a noise level: repeated steps, and ReSample.

Both are solvers like those of :mod:`lowdim_diffusion.solvers`, to be used with one of the hooks of
:mod:`lowdim_diffusion.guidance.measurements`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, check_range, fail
from lowdim_diffusion._types import Array, DenoiseFn, Scalar, Schedule
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.solvers import CorrectFn, Grid, Solver, State, StepResult
from lowdim_diffusion.solvers._base import memoryless, predict

__all__ = ["repeated", "resample"]


class _Repeat(NamedTuple):
    inner: Any
    back: Array
    back_std: Array


def repeated(solver: Solver, num_repeats: int) -> Solver:
    r"""Return the solver that makes every step ``num_repeats`` times, going back between them.

    After a step to (a', s') the state is noised to the level (a, s) it came from,

    .. math:: x = \frac{a}{a'} x' + \sqrt{s^2 - (a s' / a')^2}\, z,

    and stepped again: the resampling of RePaint, which lets the rest of an example harmonise with
    what :func:`replacement` wrote into it. A last step that is known to be clean is made once.

    Args:
        solver: a one-step solver.
        num_repeats: R >= 1.

    Raises:
        ValueError: when run, if the solver remembers earlier steps.

    References:
        Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1, with jump length 1.
    """
    check_int("repeated", "num_repeats", num_repeats)
    stride = solver.num_draws + 1  # its own, and the way back

    def coefficients(settings: Any, schedule: Schedule, grid: Grid) -> _Repeat:
        ratio = grid.alpha[:-1] / grid.alpha[1:]
        var = grid.sigma[:-1] ** 2 - (ratio * grid.sigma[1:]) ** 2
        return _Repeat(solver.coefficients(settings, schedule, grid), ratio, safe_sqrt(var))

    def step(
        denoise_fn: DenoiseFn,
        state: State,
        c: _Repeat,
        draw: Any,
        *,
        correct: CorrectFn | None = None,
        carry: Any = None,
        clean: bool = False,
    ) -> StepResult:
        if jax.tree.leaves(state.history):
            fix = "e.g. solvers.ddim()"
            raise fail("repeated", "solver remembers steps", "a one-step solver", solver.name, fix)

        def once(state: State, carry: Any, i: Any) -> StepResult:
            own = (lambda j: draw(i * stride + j)) if solver.stochastic else None
            return solver.step(
                denoise_fn, state, c.inner, own, correct=correct, carry=carry, clean=clean
            )

        def there_and_back(loop: tuple[State, Any], i: Any) -> tuple[Any, None]:
            out = once(loop[0], loop[1], i)
            noise = draw(i * stride + solver.num_draws)
            return (State(c.back * out.state.x + c.back_std * noise), out.carry), None

        last = 0 if clean else num_repeats - 1
        (state, carry), _ = jax.lax.scan(there_and_back, (state, carry), jnp.arange(last))
        return once(state, carry, last)

    return Solver(
        f"repeated {solver.name}",
        solver.init,
        step,
        coefficients,
        solver.settings,
        order=solver.order,
        num_evals=num_repeats * solver.num_evals,
        stochastic=solver.stochastic or num_repeats > 1,
        num_draws=num_repeats * stride,
    )


class _Kappa(NamedTuple):
    kappa: Any


class _Resample(NamedTuple):
    t: Array
    alpha: Array
    sigma: Array
    alpha_next: Array
    sigma_next: Array
    trust: Array
    """Share of the corrected prediction, s^2 / (s^2 + sigma'^2) of the paper."""


def _resample_coefficients(settings: _Kappa, schedule: Schedule, grid: Grid) -> _Resample:
    del schedule
    start, end = grid.sigma[:-1], grid.sigma[1:]
    # With s^2 = kappa (sigma'/sigma)^2 (1 - (alpha/alpha')^2), divided through by sigma'^2.
    odds = settings.kappa * (1 - (grid.alpha[:-1] / grid.alpha[1:]) ** 2) / start**2
    return _Resample(grid.t[:-1], grid.alpha[:-1], start, grid.alpha[1:], end, odds / (1 + odds))


def _resample_step(
    denoise_fn: DenoiseFn,
    state: State,
    c: _Resample,
    draw: Any,
    *,
    correct: CorrectFn | None = None,
    carry: Any = None,
    clean: bool = False,
) -> StepResult:
    x0_hat, eps, _ = predict(denoise_fn, state.x, c.t, c.alpha, c.sigma)
    moved = x0_hat
    if correct is not None:
        moved, eps, carry = correct(x0_hat, eps, jnp.asarray(c.t, x0_hat.dtype), carry)
    if clean:
        return StepResult(State(moved), moved, carry)
    own = c.alpha_next * x0_hat + c.sigma_next * eps
    mean = c.trust * c.alpha_next * moved + (1 - c.trust) * own
    noise = c.sigma_next * safe_sqrt(jnp.asarray(c.trust)) * draw(0)
    return StepResult(State(mean + noise), moved, carry)


def resample(kappa: Scalar = 40.0) -> Solver:
    r"""Return the solver of ReSample, which draws the next state around a consistent prediction.

    With :math:`\hat x` the prediction that the hook made consistent with the measurement and x' the
    DDIM state without it,

    .. math:: x \sim N\Big(\frac{s^2 a' \hat x + \sigma'^2 x'}{s^2 + \sigma'^2},\;
       \frac{s^2 \sigma'^2}{s^2 + \sigma'^2} I\Big), \qquad
       s^2 = \kappa \frac{\sigma'^2}{\sigma^2} \Big(1 - \frac{a^2}{a'^2}\Big).

    Made for variance-preserving schedules. Its role is non-linear operators and latent models; for
    linear ones :func:`dds` with ``ddim()`` is better.

    Args:
        kappa: trust in the measurement, >= 0.

    References:
        Song, Kwon, Zhang, Hu, Qu, Shen 2024, arXiv 2307.08123, proposition 1; kappa from its code.
    """
    check_range("resample", "kappa", kappa, 0, high_open=True)
    return Solver(
        "resample",
        memoryless,
        _resample_step,
        _resample_coefficients,
        _Kappa(kappa),
        stochastic=True,
    )
