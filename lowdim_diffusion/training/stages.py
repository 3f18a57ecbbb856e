r"""Where to divide the noise levels: intervals in which the optimal denoiser hardly changes.

For one clean example y and one noise ``eps``, seen at two levels, the similarity is

.. math:: S(a, b; y, \epsilon) = \tfrac1n \#\bigl\{ i :
    |f_a(\alpha_a y + \sigma_a\epsilon)_i - f_b(\alpha_b y + \sigma_b\epsilon)_i| \le \eta \bigr\},

with f the optimal denoiser's prediction of the noise, or of the clean example. The first stage ends
at the largest ``t_1`` such that ``S(t, t_min)`` has a mean of at least ``alpha`` over ``t <= t_1``;
the last starts at the smallest ``t_2`` such that ``S(t, t_max)`` has one over ``t >= t_2``.

The networks ``multistage_unet`` and ``multistage_mlp`` have a decoder for each of these stages.

References:
    Zhang, Lu, Zhang, Qu 2023, arXiv 2312.09181, section 4.2 and algorithm 1.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_choice, check_int, check_range, fail
from lowdim_diffusion._types import Array, DenoiseFn, Float, PRNGKey, Scalar, Schedule
from lowdim_diffusion.linalg import expand_right
from lowdim_diffusion.losses import Level, draw_times, uniform

__all__ = ["StageSimilarity", "denoiser_similarity", "find_stages", "stage_similarity"]

Prediction = Literal["eps", "x0"]


class StageSimilarity(NamedTuple):
    """Similarities of the optimal denoiser at drawn times to those at both ends."""

    t: Float[Array, " num_draws"]
    """Ascending."""
    to_clean: Float[Array, " num_draws"]
    """To the denoiser at ``t_min``."""
    to_noise: Float[Array, " num_draws"]
    """To the denoiser at ``t_max``."""


def denoiser_similarity(
    denoise_fn: DenoiseFn,
    schedule: Schedule,
    x0: Float[Array, "b *data"],
    eps: Float[Array, "b *data"],
    a: Any,
    b: Any,
    *,
    eta: Scalar = 2 / 256,
    predict: Prediction = "eps",
) -> Float[Array, " b"]:
    """Return the share of coordinates in which predictions at two times agree up to ``eta``.

    Args:
        denoise_fn: the denoiser, an exact one or that of a network.
        schedule: noise schedule.
        x0: clean examples ``[b, *data]``.
        eps: their noise, the same at both times.
        a: time, scalar or ``[b]``.
        b: the other time, scalar or ``[b]``.
        eta: largest difference that counts as agreement, >= 0, in units of the data (for ``"x0"``).
        predict: which prediction to compare, of the noise (``"eps"``) or the example (``"x0"``).

    Examples:
        >>> import jax.numpy as jnp
        >>> from lowdim_diffusion import distributions, schedules
        >>> p, s = distributions.Empirical(jnp.array([[-1.0], [1.0]])), schedules.VE()
        >>> x0, eps = jnp.ones((1, 1)), jnp.full((1, 1), 0.1)
        >>> print(denoiser_similarity(p.denoiser(s), s, x0, eps, 0.1, 0.2))  # both find the example
        [1.]
    """
    check_choice("denoiser_similarity", "predict", predict, ("eps", "x0"))
    check_range("denoiser_similarity", "eta", eta, 0)

    def error(t: Any) -> Array:
        # What the prediction is wrong by: the truth is the same at both times.
        scale = lambda c: expand_right(jnp.broadcast_to(c, x0.shape[:1]), x0.ndim).astype(x0.dtype)
        alpha, sigma = scale(schedule.alpha(t)), scale(schedule.sigma(t))
        wrong = denoise_fn(alpha * x0 + sigma * eps, t) - x0
        if predict == "x0":
            return wrong
        noisy = sigma > 0  # else the limit, 0: the posterior is sharper than sigma is small
        return jnp.where(noisy, -alpha * wrong / jnp.where(noisy, sigma, 1), 0)

    close = jnp.abs(error(a) - error(b)) <= eta
    return jnp.mean(close.reshape(x0.shape[0], -1), axis=1, dtype=x0.dtype)


def stage_similarity(
    key: PRNGKey,
    distribution: Any,
    schedule: Schedule,
    *,
    num_draws: int = 10_000,
    eta: Scalar = 2 / 256,
    predict: Prediction = "eps",
    level: Level | None = None,
    batch_size: int = 256,
) -> StageSimilarity:
    """Return the similarity of the optimal denoiser at drawn times to those at both ends.

    Examples and noise are drawn anew for each time, ``batch_size`` at once, so memory does not grow
    with the number of draws; an ``Empirical`` visits its data in blocks, however many.

    Args:
        key: typed random key. Draw i depends on it and on i only.
        distribution: what has the optimal denoiser: ``distributions.Empirical(images)`` for a
            training set, or any other exact distribution. Hand it to a jitted function as an
            argument.
        schedule: noise schedule.
        num_draws: times, spread evenly over the probability of ``level``; the paper has 50,000.
        eta: see :func:`denoiser_similarity`; 2 / 256 is two grey levels of [0, 1] images.
        predict: which prediction to compare.
        level: distribution of the times, uniform in t by default.
        batch_size: draws computed at once.

    Examples:
        >>> from lowdim_diffusion import data, distributions, schedules
        >>> digits = distributions.Empirical(data.digits().images.reshape(-1, 64) / 127.5 - 1)
        >>> draw = jax.jit(lambda key: stage_similarity(key, digits, schedules.VPLinear(),
        ...     num_draws=256))
        >>> t1, t2 = find_stages(draw(jax.random.key(0)))
        >>> 0.12 < t1 < 0.24 and 0.81 < t2 < 0.93
        True
    """
    check_int("stage_similarity", "num_draws", num_draws)
    check_int("stage_similarity", "batch_size", batch_size)
    level = uniform() if level is None else level
    denoise_fn = distribution.denoiser(schedule)
    time_key, data_key, noise_key = jax.random.split(key, 3)
    index = jnp.arange(num_draws, dtype=jnp.int32)
    ts, _, _ = draw_times(time_key, schedule, level, index, num_strata=num_draws)

    def some(drawn: tuple[Array, Array]) -> tuple[Array, Array]:
        i, t = drawn
        keys = lambda k: jax.vmap(lambda i: jax.random.fold_in(k, i))(i)
        x0 = jax.vmap(lambda k: distribution.sample(k, 1)[0][0])(keys(data_key))
        normal = lambda k: jax.random.normal(k, x0.shape[1:], x0.dtype)
        eps = jax.vmap(normal)(keys(noise_key))
        to = lambda end: denoiser_similarity(
            *(denoise_fn, schedule, x0, eps, t, end), eta=eta, predict=predict
        )
        return to(schedule.t_min), to(schedule.t_max)

    size = min(batch_size, num_draws)
    num = -(-num_draws // size)
    pad = lambda a: jnp.pad(a, (0, num * size - num_draws), mode="edge").reshape(num, size)
    found = jax.lax.map(some, (pad(index), pad(ts)))
    return StageSimilarity(ts, *(a.reshape(-1)[:num_draws] for a in found))


def find_stages(similarity: StageSimilarity, alpha: float = 0.9) -> tuple[float, float]:
    """Return the times ``(t1, t2)`` that divide the noise levels into three stages.

    Args:
        similarity: from :func:`stage_similarity`.
        alpha: mean similarity within the first and the last stage, in (0, 1].

    Raises:
        ValueError: if no time is similar enough to an end, or ``t1 < t2`` does not hold. The
            predicted noise is that of the draw at both ends, so a low ``alpha`` is reached by all.

    Examples:
        >>> t = jnp.linspace(0, 1, 11)
        >>> find_stages(StageSimilarity(t, jnp.where(t < 0.25, 1, 0), jnp.where(t > 0.75, 1, 0)))
        (0.20000000298023224, 0.800000011920929)
    """
    check_range("find_stages", "alpha", alpha, 0, 1, low_open=True)
    t, to_clean, to_noise = (np.asarray(a, np.float64) for a in similarity)
    count = np.arange(1, len(t) + 1)
    first = np.flatnonzero(np.cumsum(to_clean) / count >= alpha)
    last = np.flatnonzero(np.cumsum(to_noise[::-1]) / count >= alpha)
    fix = "choose another alpha, or another eta for the similarities"
    if not len(first) or not len(last):
        best = min(to_clean.max(), to_noise.max())
        raise fail("find_stages", "no time is similar to an end", f"mean {alpha}", best, fix)
    t1, t2 = float(t[first[-1]]), float(t[len(t) - 1 - last[-1]])
    if not t1 < t2:
        raise fail("find_stages", "stages overlap", "t1 < t2", f"t1 = {t1:.3g}, t2 = {t2:.3g}", fix)
    return t1, t2
