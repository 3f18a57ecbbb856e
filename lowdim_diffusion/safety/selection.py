"""Scores put to use: the best of several, chosen and judged honestly; the calmest samples kept."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_range, check_shape, fail
from lowdim_diffusion._types import ArrayLike, Float, Int, Schedule
from lowdim_diffusion.safety.detectors import trajectory_variance
from lowdim_diffusion.safety.rates import auroc, true_positive_rate
from lowdim_diffusion.sampling import SampleResult
from lowdim_diffusion.schedules import noise_levels


class Chosen(NamedTuple):
    """A score, and how well it separates examples that it was not chosen on."""

    name: str
    sign: int
    """1 if positives score high, -1 if they score low."""
    auroc: float
    """Of the score times its sign."""
    true_positive_rate: float


def choose_score(
    scores: Mapping[str, ArrayLike], is_positive: ArrayLike, *, max_fpr: float = 0.01
) -> Chosen:
    """Return the score that separates best on every other example, judged on the rest.

    Which layer and noise level separate copies from new samples, and whether copies score high or
    low there, differs between networks (of EDM's parametrization, late layers spread less on
    copies); the best of many on the same examples would look better than it is.

    Args:
        scores: name to ``[n]``, high for positives or low for them.
        is_positive: ``[n]`` boolean, two or more of either kind.
        max_fpr: of the true positive rate.

    Raises:
        ValueError: for no scores, other lengths, or fewer than two of either kind.

    Examples:
        >>> scores = {"good": [0, 1, 4, 5], "bad": [0, 5, 4, 1]}
        >>> choose_score(scores, [False, False, True, True])
        Chosen(name='good', sign=1, auroc=1.0, true_positive_rate=1.0)
    """
    where = "choose_score"
    check_range(where, "max_fpr", max_fpr, 0, 1)
    is_positive = np.asarray(is_positive)
    if not scores:
        raise fail(where, "no scores", "at least one", 0)
    kinds = [np.flatnonzero(is_positive), np.flatnonzero(~is_positive)]
    if min(map(len, kinds)) < 2:
        got = f"{len(kinds[0])} positives of {len(is_positive)}"
        raise fail(where, "too few examples", "two or more of either kind", got)
    first = np.concatenate([rows[::2] for rows in kinds])
    rest = np.concatenate([rows[1::2] for rows in kinds])
    arrays = {name: np.asarray(values) for name, values in scores.items()}
    for name, values in arrays.items():
        check_shape(where, name, values, is_positive.shape, "one per example")
    areas = {
        name: float(auroc(values[first], is_positive[first])) for name, values in arrays.items()
    }
    name = max(areas, key=lambda name: abs(areas[name] - 0.5))
    sign = 1 if areas[name] >= 0.5 else -1
    values, kind = sign * arrays[name][rest], is_positive[rest]
    rate = float(true_positive_rate(values, kind, max_fpr))
    return Chosen(name, sign, float(auroc(values, kind)), rate)


class Calm(NamedTuple):
    """The samples whose predictions moved least."""

    rows: Int[np.ndarray, " m"]
    """Which they are, in their own order."""
    scores: Float[np.ndarray, " n"]
    """Of all samples, high for a suspected hallucination."""


def keep_calmest(
    result: SampleResult, schedule: Schedule, fraction: float, *, max_sigma: float
) -> Calm:
    """Return the share of a run's samples whose predictions moved least at low noise.

    The filter of hallucinations: the score is :func:`trajectory_variance` over the steps at noise
    levels up to ``max_sigma``. Not for use inside ``jit``.

    Args:
        result: of ``sampling.sample(..., save="denoised")``, or ``sample_batched``.
        schedule: that of the run.
        fraction: share to keep, in (0, 1], rounded up.
        max_sigma: largest ``sigma / alpha`` looked at, > 0; about three standard deviations of a
            mode of the data.

    Raises:
        ValueError: without predictions, or with fewer than two of them in the window.

    Examples:
        >>> import jax
        >>> from lowdim_diffusion import sampling, schedules, solvers
        >>> white = lambda x, t: x / (1 + t**2)
        >>> ve, ts = schedules.VE(), schedules.karras_grid(18)
        >>> run = sampling.sample(
        ...     *(jax.random.key(0), white, ve, ts, (100, 2)),
        ...     solver=solvers.heun(),
        ...     save="denoised",
        ... )
        >>> keep_calmest(run, ve, 0.96, max_sigma=0.5).rows.shape
        (96,)

    References:
        Aithal et al. 2024, arXiv 2406.09358.
    """
    where = "keep_calmest"
    check_range(where, "fraction", fraction, 0, 1, low_open=True)
    check_range(where, "max_sigma", max_sigma, 0, low_open=True)
    if result.trajectory is None or result.ts is None:
        raise fail(where, "no predictions", 'a run with save="denoised"', "none")
    levels = np.asarray(noise_levels(schedule, jnp.asarray(result.ts)))
    window = levels <= max_sigma
    if window.sum() < 2:
        expected = f"2 steps or more at noise levels up to {max_sigma:g}"
        got = f"{window.sum()}; the lowest are " + ", ".join(f"{s:.3g}" for s in levels[-2:])
        raise fail(where, "window too short", expected, got, "take more steps, or raise max_sigma")
    scores = np.asarray(trajectory_variance(jnp.asarray(result.trajectory), window))
    num = int(np.ceil(round(fraction * len(scores), 9)))
    return Calm(np.sort(np.argsort(scores, kind="stable")[:num]), scores)
