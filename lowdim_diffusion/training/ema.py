r"""Moving averages of the parameters.

An average is ``ema <- beta_t ema + (1 - beta_t) params``; a *decay* is the function
``updates done -> beta_t``, the only thing that the kinds differ in.

The weights of a power average over the training, ``p(tau) ~ tau^gamma`` up to t, are so smooth that
those of any other are nearly a linear combination of a few: from snapshots of one or two averages
(widths 0.05 and 0.1 are usual) along a training, the average of every width at the step of any
snapshot can be made afterwards (:func:`reconstruct`).
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_range, check_shape, fail
from lowdim_diffusion._types import Array, ArrayLike, Params, Scalar

__all__ = [
    "Combination",
    "Decay",
    "classic",
    "combination",
    "gamma_from_std",
    "power",
    "reconstruct",
    "update",
]

Decay: TypeAlias = Callable[[Any], Array]
"""``number of updates, this one included (1, 2, ...) -> beta``."""


def classic(decay: Scalar = 0.999, warmup: Scalar = 10.0) -> Decay:
    """Return ``min(decay, (t-1) / (t-1+warmup))``: an average that forgets where it started.

    Args:
        decay: beta in the long run, in [0, 1).
        warmup: how slowly beta rises to it; 0 switches the warm-up off.
    """
    check_range("ema.classic", "decay", decay, 0, 1, high_open=True)
    check_range("ema.classic", "warmup", warmup, 0)

    def beta(t: Any) -> Array:
        rising = (t - 1) / jnp.maximum(t - 1 + warmup, 1e-6)
        return jnp.where(jnp.asarray(warmup) > 0, jnp.minimum(decay, rising), decay)

    return beta


def power(gamma: Scalar) -> Decay:
    r"""Return ``(1 - 1/t)^(gamma + 1)``: weights that grow as ``time^gamma``.

    Args:
        gamma: exponent, > -1; from a relative width by :func:`gamma_from_std`.

    References:
        Karras et al. 2024, arXiv 2312.02696, eq. (2)-(4).
    """
    check_range("ema.power", "gamma", gamma, -1, low_open=True)
    return lambda t: (1 - 1 / jnp.maximum(t, 1)) ** (gamma + 1)


def gamma_from_std(std: float) -> float:
    r"""Return the power-average exponent of this relative standard deviation.

    Solves ``std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))``.

    Args:
        std: relative width, in (0, 0.2886): 0.05 and 0.1 are usual.

    Examples:
        >>> round(gamma_from_std(0.05), 2), round(gamma_from_std(0.1), 2)
        (16.97, 6.94)
    """
    check_range("gamma_from_std", "std", std, 0, 12**-0.5, low_open=True, high_open=True)
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def update(average: Params, params: Params, beta: Array) -> Params:
    """Return ``beta average + (1 - beta) params``, leaf by leaf, in each leaf's dtype."""
    # average + (1 - beta) (params - average) returns constant parameters unchanged, bit for bit.
    return jax.tree.map(lambda a, p: a + ((1 - beta) * (p - a)).astype(a.dtype), average, params)


# ---- after training -----------------------------------------------------------------------------


class Combination(NamedTuple):
    """How one power average is nearly a sum of others."""

    coefficients: np.ndarray
    """``[S]`` float64, adding up to 1."""
    error: float
    """Relative distance of its weights over the training from those wanted, in L2: 0 is exact."""


def combination(
    gammas: ArrayLike, steps: ArrayLike, *, gamma: float, step: float | None = None
) -> Combination:
    r"""Return the coefficients with which snapshots of power averages add up to another one.

    Least squares between the weights over the training, ``(gamma + 1) tau^gamma / t^(gamma + 1)``
    on [0, t], whose inner products are known,

    .. math:: \langle p_{\gamma, t}, p_{\gamma', t'} \rangle =
        \frac{(\gamma + 1)(\gamma' + 1)}{\gamma + \gamma' + 1}
        \frac{(t / t')^{\gamma'}}{t'}, \qquad t \le t',

    under the condition that the coefficients add up to 1.

    Args:
        gammas: exponent of each of S snapshots, or one for all, > -1/2.
        steps: ``[S]``, after how many updates each was taken, > 0.
        gamma: exponent wanted; from a width by :func:`gamma_from_std`.
        step: at which of the steps, the last one if None; between two snapshots the error is large.

    Raises:
        ValueError: for exponents or steps out of range, or a step beyond the last snapshot.

    Examples:
        >>> narrow, wide = gamma_from_std(0.05), gamma_from_std(0.1)
        >>> steps = np.arange(8, 65, 8)
        >>> found = combination([narrow] * 8 + [wide] * 8, [*steps, *steps], gamma=10.0)
        >>> print(f"{found.coefficients.sum():.6f}", found.error < 0.02)
        1.000000 True

    References:
        Karras et al. 2024, arXiv 2312.02696, appendix C.
    """
    where = "combination"
    steps = np.asarray(steps, np.float64)
    check_shape(where, "steps", steps, (None,))
    gammas = np.asarray(gammas, np.float64)
    check_shape(where, "gammas", gammas, () if gammas.ndim == 0 else steps.shape, "one per step")
    gammas = np.broadcast_to(gammas, steps.shape)
    check_range(where, "steps", steps, 0, low_open=True, fix="a snapshot after the first update")
    for name, value in (("gammas", gammas), ("gamma", gamma)):
        check_range(where, name, value, -0.5, low_open=True)
    if not len(steps):
        raise fail(where, "no snapshots", "one at least", 0)
    last = float(steps.max())
    step = last if step is None else float(step)
    check_range(where, "step", step, 0, last, low_open=True, fix="only what is past is averaged")
    products = _inner(gammas[:, None], steps[:, None], gammas[None], steps[None])
    wanted, size = _inner(gammas, steps, gamma, step), _inner(gamma, step, gamma, step)
    # Scaled to unit diagonal; bordered by the condition.
    unit = np.sqrt(np.diag(products))
    system = np.zeros((len(steps) + 1, len(steps) + 1))
    system[:-1, :-1] = products / unit / unit[:, None]
    system[-1, :-1] = system[:-1, -1] = 1 / unit / np.mean(1 / unit)
    right = np.append(wanted / unit / size**0.5, 1 / np.mean(1 / unit) / size**0.5)
    solution = np.linalg.lstsq(system, right, rcond=1e-14)[0][:-1] * size**0.5
    found = solution / unit
    missed = size - 2 * found @ wanted + found @ products @ found
    return Combination(found / found.sum(), float(np.sqrt(max(missed, 0) / size)))


def reconstruct(averages: Iterable[Params], found: Combination) -> Params:
    """Return the average that a :func:`combination` of snapshots makes, in each leaf's dtype.

    Args:
        averages: the S snapshots in the order of the coefficients; an iterator is enough, one
            after the other is added in float64 on the host.
        found: from :func:`combination`.

    Raises:
        ValueError: if their numbers differ.

    Examples:
        >>> found = combination([7.0, 7.0], [10, 20], gamma=7.0, step=10)
        >>> snapshots = [{"w": np.float32(1.0)}, {"w": np.float32(3.0)}]
        >>> reconstruct(snapshots, found)["w"].round(5).item()
        1.0

    References:
        Karras et al. 2024, arXiv 2312.02696, section 3.2.
    """
    total, like, count = None, None, 0
    for coefficient, average in zip(found.coefficients, averages, strict=False):
        part = jax.tree.map(lambda a, c=coefficient: c * np.asarray(a, np.float64), average)
        total = part if total is None else jax.tree.map(np.add, total, part)
        like, count = average, count + 1
    if count != len(found.coefficients) or total is None:
        raise fail("reconstruct", "too few snapshots", len(found.coefficients), count)
    return jax.tree.map(lambda a, ref: a.astype(np.asarray(ref).dtype), total, like)


def _inner(gamma_a: Any, step_a: Any, gamma_b: Any, step_b: Any) -> Any:
    """Inner products of the weights of power averages, float64."""
    first, later = np.minimum(step_a, step_b), np.maximum(step_a, step_b)
    exponent = np.where(np.asarray(step_a) < step_b, gamma_b, gamma_a)
    head = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return head * np.exp(exponent * np.log(first / later)) / later
