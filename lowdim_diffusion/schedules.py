r"""Noise schedules ``x_t = alpha(t) x_0 + sigma(t) eps`` and time grids.

``t`` grows with noise; ``log_snr(t) = log(alpha^2 / sigma^2)`` falls with it and has an exact
inverse. Formulas avoid cancellation near both ends (``expm1``, products of sines), so float32 is
enough.

Every schedule is a frozen dataclass registered as a pytree: its parameters (numbers, or arrays of
them under ``vmap``) are leaves, so a new value does not retrace a compiled function, and one can
``vmap`` or differentiate over them.

References:
    Song et al. 2021, arXiv 2011.13456 (VP-SDE); Nichol & Dhariwal 2021, arXiv 2102.09672 (cosine);
    Ho et al. 2020, arXiv 2006.11239 (a table of steps); Karras et al. 2022, arXiv 2206.00364 (EDM,
    the rho grid); Liu et al. 2023, arXiv 2209.03003 (rectified flow).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_choice, check_int, check_range, check_shape
from lowdim_diffusion._types import Array, Float, Scalar, Schedule

__all__ = [
    "BETAS",
    "Discrete",
    "RectifiedFlow",
    "VE",
    "VPCosine",
    "VPLinear",
    "beta_table",
    "karras_grid",
    "log_snr_grid",
    "noise_levels",
    "quadratic_grid",
    "rates",
    "times_from_sigmas",
    "uniform_grid",
]


def _real(t: Any) -> Array:
    t = jnp.asarray(t)
    return t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(jnp.result_type(float))


def _check_numbers(where: str, **limits: tuple[Any, Any, bool]) -> None:
    """Check ``name=(value, low, open)`` where both are Python numbers.

    Only those: a pytree made of gradients, shapes or tracers passes through here as well.
    """
    for name, (value, low, is_open) in limits.items():
        if isinstance(value, int | float) and isinstance(low, int | float):
            check_range(where, name, value, low, low_open=is_open, high_open=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VPLinear:
    r"""Variance-preserving schedule with ``beta(t)`` linear in ``t`` in [0, 1].

    .. math:: \log\alpha = -\tfrac14 t^2(\beta_1-\beta_0) - \tfrac12 t\beta_0,
       \quad \sigma^2 = 1-\alpha^2.

    Args:
        beta_min: rate at ``t = 0``, > 0.
        beta_max: rate at ``t = 1``, >= ``beta_min``.

    Examples:
        >>> s = VPLinear()
        >>> round(float(s.sigma(0.3) / s.alpha(0.3)), 2)
        1.23
    """

    beta_min: Any = 0.1
    beta_max: Any = 20.0

    def __post_init__(self) -> None:
        _check_numbers("VPLinear", beta_min=(self.beta_min, 0, True))
        _check_numbers("VPLinear", beta_max=(self.beta_max, self.beta_min, False))

    @property
    def t_min(self) -> float:
        """1e-5."""
        return 1e-5

    @property
    def t_max(self) -> float:
        """1."""
        return 1.0

    def _log_alpha(self, t: Array) -> Array:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: Any) -> Array:
        """Signal scale."""
        return jnp.exp(self._log_alpha(_real(t)))

    def sigma(self, t: Any) -> Array:
        """Noise standard deviation."""
        return jnp.sqrt(-jnp.expm1(2 * self._log_alpha(_real(t))))

    def log_snr(self, t: Any) -> Array:
        """``2 log alpha - log(1 - alpha^2)``."""
        twice = 2 * self._log_alpha(_real(t))
        return twice - jnp.log(-jnp.expm1(twice))

    def t_from_log_snr(self, log_snr: Any) -> Array:
        """Root of the quadratic ``beta_0 t + (beta_1 - beta_0) t^2 / 2 = softplus(-log_snr)``."""
        integral = jax.nn.softplus(-_real(log_snr))
        slope = self.beta_max - self.beta_min
        root = jnp.sqrt(self.beta_min**2 + 2 * slope * integral)
        return 2 * integral / (root + self.beta_min)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VPCosine:
    r"""Variance-preserving cosine schedule, ``t`` in [0, 1].

    .. math:: \alpha = \cos(a)/\cos(a_0),\quad a = \tfrac{\pi}{2}\tfrac{t+s}{1+s},
       \quad a_0 = a(t{=}0),\quad \sigma^2 = \sin(a-a_0)\sin(a+a_0)/\cos^2 a_0.

    Args:
        s: offset, > 0, that keeps the noise at the first steps from vanishing.
    """

    s: Any = 0.008

    def __post_init__(self) -> None:
        _check_numbers("VPCosine", s=(self.s, 0, True))

    @property
    def t_min(self) -> float:
        """1e-5."""
        return 1e-5

    @property
    def t_max(self) -> float:
        """0.999: there alpha = 1.6e-3; at ``t = 1`` it would be 0."""
        return 0.999

    def _angles(self, t: Array) -> tuple[Array, Any]:
        scale = 0.5 * math.pi / (1 + self.s)
        return t * scale, self.s * scale

    def alpha(self, t: Any) -> Array:
        """Signal scale."""
        delta, start = self._angles(_real(t))
        return jnp.cos(delta + start) / jnp.cos(start)

    def sigma(self, t: Any) -> Array:
        """Noise standard deviation."""
        delta, start = self._angles(_real(t))
        return jnp.sqrt(jnp.sin(delta) * jnp.sin(delta + 2 * start)) / jnp.cos(start)

    def log_snr(self, t: Any) -> Array:
        """``log(alpha^2 / sigma^2)``."""
        delta, start = self._angles(_real(t))
        noise = jnp.log(jnp.sin(delta)) + jnp.log(jnp.sin(delta + 2 * start))
        return 2 * jnp.log(jnp.cos(delta + start)) - noise

    def t_from_log_snr(self, log_snr: Any) -> Array:
        """Exact inverse; the small angle is recovered without subtracting two large ones."""
        log_snr = _real(log_snr)
        _, start = self._angles(jnp.zeros_like(log_snr))
        noise = jnp.cos(start) ** 2 * jax.nn.sigmoid(-log_snr)
        signal = jnp.cos(start) ** 2 * jax.nn.sigmoid(log_snr)
        angle = jnp.arctan2(jnp.sqrt(jnp.sin(start) ** 2 + noise), jnp.sqrt(signal))
        small = jnp.arcsin(jnp.clip(noise / jnp.sin(angle + start), 0, 0.9))
        delta = jnp.where(angle - start < 0.5, small, angle - start)
        return delta * (1 + self.s) * 2 / math.pi


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VE:
    """Variance-exploding schedule in EDM's convention: ``alpha = 1``, ``sigma = t``.

    Args:
        sigma_min: smallest noise level used, > 0.
        sigma_max: largest noise level used, > ``sigma_min``.
    """

    sigma_min: Any = 0.002
    sigma_max: Any = 80.0

    def __post_init__(self) -> None:
        _check_numbers("VE", sigma_min=(self.sigma_min, 0, True))
        _check_numbers("VE", sigma_max=(self.sigma_max, self.sigma_min, True))

    @property
    def t_min(self) -> Any:
        """``sigma_min``."""
        return self.sigma_min

    @property
    def t_max(self) -> Any:
        """``sigma_max``."""
        return self.sigma_max

    def alpha(self, t: Any) -> Array:
        """1."""
        return jnp.ones_like(_real(t))

    def sigma(self, t: Any) -> Array:
        """``t``."""
        return _real(t)

    def log_snr(self, t: Any) -> Array:
        """``-2 log t``."""
        return -2 * jnp.log(_real(t))

    def t_from_log_snr(self, log_snr: Any) -> Array:
        """``exp(-log_snr / 2)``."""
        return jnp.exp(-0.5 * _real(log_snr))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RectifiedFlow:
    """Straight paths between data and noise: ``alpha = 1 - t``, ``sigma = t``, ``t`` in [0, 1]."""

    @property
    def t_min(self) -> float:
        """1e-5."""
        return 1e-5

    @property
    def t_max(self) -> float:
        """1, where ``alpha = 0``: pure noise."""
        return 1.0

    def alpha(self, t: Any) -> Array:
        """``1 - t``."""
        return 1 - _real(t)

    def sigma(self, t: Any) -> Array:
        """``t``."""
        return _real(t)

    def log_snr(self, t: Any) -> Array:
        """``2 log((1 - t) / t)``; minus infinity at ``t = 1``."""
        t = _real(t)
        return 2 * (jnp.log1p(-t) - jnp.log(t))

    def t_from_log_snr(self, log_snr: Any) -> Array:
        """``sigmoid(-log_snr / 2)``."""
        return jax.nn.sigmoid(-0.5 * _real(log_snr))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Discrete:
    r"""Variance-preserving schedule known at the ``N`` steps of a table, as DDPM is trained.

    ``t`` counts steps: ``t = 0`` is clean, ``t = k`` the k-th entry of the table (libraries that
    number them from 0 call it timestep ``k - 1``). Between entries the log-SNR is linear in ``t``;
    before the first, ``sigma / alpha`` is proportional to ``t``; beyond ``N`` the last slope goes
    on. Values at entries, and times found from them, are exact in every precision.

    .. math:: \log\mathrm{snr}(k) = \log\frac{\bar\alpha_k}{1-\bar\alpha_k}, \quad
       \bar\alpha_k = \prod_{i \le k}(1-\beta_i), \quad \alpha^2 + \sigma^2 = 1.

    Make one from betas: ``Discrete.from_betas(beta_table("linear"))``.

    Args:
        log_snrs: ``[N]`` falling log-SNRs, ``N >= 2``. Use float64 numpy arrays where you can: they
            are cast to the dtype of ``t``.

    Examples:
        >>> s = Discrete.from_betas(beta_table("linear", 1000, 1e-4, 0.02))
        >>> round(float(s.sigma(1)), 4), round(float(s.alpha(1000)), 4)
        (0.01, 0.0064)
        >>> float(s.t_from_log_snr(s.log_snr(250.0)))
        250.0

    References:
        Ho et al. 2020, arXiv 2006.11239, eq. (4).
    """

    log_snrs: Any

    @classmethod
    def from_betas(cls, betas: Any) -> "Discrete":
        """Return the schedule of noise rates ``betas: [N]`` in (0, 1), in float64.

        Raises:
            ValueError: for fewer than two, or values outside (0, 1).
        """
        betas = np.asarray(betas, np.float64)
        check_shape("Discrete", "betas", betas, (None,))
        check_int("Discrete", "number of betas", betas.size, 2)
        fix = "a table that ends without signal cannot be inverted"
        check_range("Discrete", "betas", betas, 0, 1, low_open=True, high_open=True, fix=fix)
        log_power = np.cumsum(np.log1p(-betas))
        return cls(log_power - np.log(-np.expm1(log_power)))

    @property
    def t_min(self) -> float:
        """1, the first step."""
        return 1.0

    @property
    def t_max(self) -> float:
        """``N``, the last step."""
        return float(np.shape(self.log_snrs)[-1])

    def _ratio(self, t: Array) -> Array:
        """``sigma / alpha``."""
        first = jnp.asarray(self.log_snrs, t.dtype)[0]
        inside = jnp.exp(-0.5 * self._inside(jnp.maximum(t, 1)))
        return jnp.where(t < 1, t * jnp.exp(-0.5 * first), inside)

    def _inside(self, t: Array) -> Array:
        """Log-SNR for ``t >= 1``."""
        table = jnp.asarray(self.log_snrs, t.dtype)
        left = jnp.clip(jnp.floor(t), 1, table.shape[0] - 1)
        weight, i = t - left, left.astype(int)
        return (1 - weight) * table[i - 1] + weight * table[i]

    def alpha(self, t: Any) -> Array:
        """Signal scale."""
        return jax.lax.rsqrt(1 + self._ratio(_real(t)) ** 2)

    def sigma(self, t: Any) -> Array:
        """Noise standard deviation."""
        ratio = self._ratio(_real(t))
        return ratio * jax.lax.rsqrt(1 + ratio**2)

    def log_snr(self, t: Any) -> Array:
        """``log(alpha^2 / sigma^2)``, linear between the steps."""
        t = _real(t)
        first = jnp.asarray(self.log_snrs, t.dtype)[0]
        early = first - 2 * jnp.log(jnp.where(t < 1, t, 1))
        return jnp.where(t < 1, early, self._inside(jnp.maximum(t, 1)))

    def t_from_log_snr(self, log_snr: Any) -> Array:
        """Exact inverse: the step, in general fractional, with this log-SNR."""
        log_snr = _real(log_snr)
        table = jnp.asarray(self.log_snrs, log_snr.dtype)
        i = jnp.searchsorted(-table, -log_snr, side="right")
        i = jnp.clip(i, 1, table.shape[0] - 1)
        weight = (table[i - 1] - log_snr) / (table[i - 1] - table[i])
        is_early = log_snr > table[0]
        early = jnp.exp(0.5 * (table[0] - jnp.where(is_early, log_snr, table[0])))
        return jnp.where(is_early, early, i + weight)


BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
"""Kinds of tables of noise rates, by the names that diffusers gives them."""


def beta_table(
    kind: str = "linear", num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> np.ndarray:
    r"""Return the noise rates ``beta_1 .. beta_N`` of a kind, ``[num_steps]`` in float64.

    =====================  =====================================================================
    kind                   beta
    =====================  =====================================================================
    ``linear``             evenly spaced from ``beta_start`` to ``beta_end``
    ``scaled_linear``      the square of evenly spaced square roots
    ``sigmoid``            ``beta_start + (beta_end - beta_start) sigmoid(u)``, u from -6 to 6
    ``squaredcos_cap_v2``  ``min(1 - f(k / N) / f((k - 1) / N), 0.999)`` with
                           ``f(u) = cos^2(pi / 2 (u + 0.008) / 1.008)``; the ends are not used
    =====================  =====================================================================

    Examples:
        >>> beta_table("linear", 3, 0.1, 0.3).round(3).tolist()
        [0.1, 0.2, 0.3]

    References:
        Ho et al. 2020, arXiv 2006.11239 (linear); Nichol & Dhariwal 2021, arXiv 2102.09672, eq.
        (17) (cosine).
    """
    check_choice("beta_table", "kind", kind, BETAS)
    check_int("beta_table", "num_steps", num_steps, 2)
    match kind:
        case "linear":
            return np.linspace(beta_start, beta_end, num_steps)
        case "scaled_linear":
            return np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2
        case "sigmoid":
            rise = 1 / (1 + np.exp(-np.linspace(-6, 6, num_steps)))
            return beta_start + (beta_end - beta_start) * rise
        case _:
            u = np.arange(num_steps + 1) / num_steps
            f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.minimum(1 - f[1:] / f[:-1], 0.999)


def rates(schedule: Schedule, t: Any) -> tuple[Array, Array]:
    """Return ``(d alpha/dt, d sigma/dt)`` at ``t``, by forward-mode differentiation.

    They define the velocity target ``alpha'(t) x_0 + sigma'(t) eps``. For the variance-preserving
    schedules ``sigma'`` is infinite at ``t = 0``.
    """
    t = _real(t)
    one = jnp.ones_like(t)
    return jax.jvp(schedule.alpha, (t,), (one,))[1], jax.jvp(schedule.sigma, (t,), (one,))[1]


def noise_levels(schedule: Schedule, t: Any) -> Array:
    """Return ``sigma(t) / alpha(t)``, the noise level in clean-data units (EDM's sigma)."""
    return schedule.sigma(t) / schedule.alpha(t)


def times_from_sigmas(schedule: Schedule, sigmas: Any) -> Array:
    """Return the times at which ``sigma(t) / alpha(t)`` takes the given values; 0 stays 0.

    Lets every schedule use :func:`karras_grid`.

    Examples:
        >>> ts = times_from_sigmas(VPLinear(), karras_grid(10, 0.002, 80.0))
        >>> float(ts[-1])
        0.0
    """
    sigmas = _real(sigmas)
    positive = sigmas > 0
    log_snr = -2 * jnp.log(jnp.where(positive, sigmas, 1))
    return jnp.where(positive, schedule.t_from_log_snr(log_snr), 0)


def karras_grid(
    num_steps: int, sigma_min: Scalar = 0.002, sigma_max: Scalar = 80.0, rho: Scalar = 7.0
) -> Float[Array, " {num_steps}+1"]:
    r"""Return EDM's ``num_steps + 1`` noise levels, ``sigma_max`` to ``sigma_min`` and 0.

    .. math:: \sigma_i = \left(\sigma_{max}^{1/\rho}
       + \tfrac{i}{N-1}(\sigma_{min}^{1/\rho} - \sigma_{max}^{1/\rho})\right)^\rho.

    Args:
        num_steps: N, number of solver steps, >= 1 (with 1 the grid is ``[sigma_max, 0]``).
        sigma_min: smallest positive level.
        sigma_max: largest level.
        rho: > 0; 1 is uniform in sigma, large values tend to uniform in log sigma.

    Examples:
        >>> [round(float(s), 2) for s in karras_grid(10)[:3]]
        [80.0, 42.42, 21.11]

    References:
        Karras et al. 2022, arXiv 2206.00364, eq. (5).
    """
    check_int("karras_grid", "num_steps", num_steps)
    check_range("karras_grid", "sigma_min", sigma_min, 0, low_open=True)
    if isinstance(sigma_min, int | float):
        check_range("karras_grid", "sigma_max", sigma_max, sigma_min)
    check_range("karras_grid", "rho", rho, 0, low_open=True)
    first, last = _real(sigma_max) ** (1 / rho), _real(sigma_min) ** (1 / rho)
    ramp = jnp.arange(num_steps) / max(num_steps - 1, 1)
    levels = (first + ramp * (last - first)) ** rho
    return jnp.concatenate([levels, jnp.zeros(1, levels.dtype)])


def _ends(schedule: Schedule, t_min: Any, t_max: Any) -> tuple[Any, Any]:
    return (schedule.t_min if t_min is None else t_min, schedule.t_max if t_max is None else t_max)


def log_snr_grid(
    schedule: Schedule, num_steps: int, *, t_min: Any = None, t_max: Any = None
) -> Float[Array, " {num_steps}+1"]:
    """Return ``num_steps + 1`` times, uniform in log-SNR from ``t_max`` to ``t_min``, then 0.

    Where ``t_max`` has no signal at all (rectified flow) the grid starts there and its log-SNR
    spacing begins at -14, about ``sigma / alpha = 1100``.
    """
    check_int("log_snr_grid", "num_steps", num_steps)
    low, high = _ends(schedule, t_min, t_max)
    top = jnp.maximum(schedule.log_snr(high), -14.0)
    ts = schedule.t_from_log_snr(jnp.linspace(top, schedule.log_snr(low), num_steps))
    return jnp.concatenate([_real(high)[None].astype(ts.dtype), ts[1:], jnp.zeros(1, ts.dtype)])


def uniform_grid(
    schedule: Schedule, num_steps: int, *, t_min: Any = None, t_max: Any = None
) -> Float[Array, " {num_steps}+1"]:
    """Return ``num_steps + 1`` times, evenly spaced from ``t_max`` to ``t_min``, then 0."""
    check_int("uniform_grid", "num_steps", num_steps)
    low, high = _ends(schedule, t_min, t_max)
    ts = jnp.linspace(_real(high), _real(low), num_steps)
    return jnp.concatenate([ts, jnp.zeros(1, ts.dtype)])


def quadratic_grid(
    schedule: Schedule, num_steps: int, *, t_min: Any = None, t_max: Any = None
) -> Float[Array, " {num_steps}+1"]:
    """Return ``num_steps + 1`` times, evenly spaced in sqrt(t) from ``t_max`` to ``t_min``, then 0.

    References:
        Song, Meng, Ermon 2021, arXiv 2010.02502, appendix D.2; Zhang & Chen 2023, arXiv 2204.13902.
    """
    check_int("quadratic_grid", "num_steps", num_steps)
    low, high = _ends(schedule, t_min, t_max)
    ts = jnp.linspace(jnp.sqrt(_real(high)), jnp.sqrt(_real(low)), num_steps) ** 2
    return jnp.concatenate([_real(high)[None].astype(ts.dtype), ts[1:], jnp.zeros(1, ts.dtype)])
