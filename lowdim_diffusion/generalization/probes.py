r"""What features know of the class: linear and nearest-neighbour probes along the noise level.

A probe is fitted on the features of labelled examples and judged on those of others. The linear
one is multinomial logistic regression on standardised features z,

.. math:: \min_{W, b}\; \frac1N \sum_i -\log \operatorname{softmax}(W^T z_i + b)_{y_i}
    + \frac\lambda2 \lVert W \rVert_F^2 ,

a convex problem, solved here to its optimum so that probes differ by their features only. The
Hessian is at most ``(Z^T Z / N) / 2`` for every class (Boehning 1992). In the coordinates in which
that bound, with the penalty, is the identity, few conjugate gradient steps solve each of Newton's:
no learning rate, and a handful of passes whatever the spectrum of the features.

Diffusion models that generalize have their best features between the highest and the lowest noise
levels; in those that memorize, accuracy only falls with the noise. Several levels together
(:func:`ensemble_scores`) are better than the best of them.

References:
    Li et al. 2025, arXiv 2502.05743, sections 3-5; Xiang et al. 2023, arXiv 2303.09769 (features of
    denoising networks); Boehning 1992, Ann. Inst. Stat. Math. 44.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_int, check_range, check_shape, fail
from lowdim_diffusion._types import Array, ArrayLike, Float, PRNGKey, Schedule
from lowdim_diffusion.generalization._inputs import check_labels, flat_features, level_times
from lowdim_diffusion.linalg import conjugate_gradient, safe_sqrt
from lowdim_diffusion.neighbors import nearest
from lowdim_diffusion.sharding import example_keys

FeatureFn = Callable[[Array, Array], Array]
"""``(x_t: [b, *data], t: scalar) -> [b, *features]``."""

_INNER = 16  # conjugate gradient steps of one of Newton's
_HALVINGS = 12  # of its length


def pool_features(h: ArrayLike) -> Float[Array, "b c"]:
    """Return features averaged over places: ``[b, h, w, c]`` or ``[b, tokens, c]`` to ``[b, c]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> pool_features(jnp.ones((5, 4, 4, 32))).shape
        (5, 32)
    """
    h = jnp.asarray(h)
    if h.ndim < 2:
        raise fail("pool_features", "wrong shape of h", "[b, *places, channels]", h.shape)
    return jnp.mean(h, axis=tuple(range(1, h.ndim - 1)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Multinomial logistic regression: ``scores = (h - center) W + b``. A pytree.

    Attributes:
        center: ``[p]``, the mean of the features it was fitted on.
        weight: ``[p, K]``, in the units of the features.
        bias: ``[K]``.
        gradient: largest entry of the cost's gradient at the last step: rounding (below 1e-4 in
            float32) when the fit is at its optimum.
    """

    center: Array
    weight: Array
    bias: Array
    gradient: Array

    def __call__(self, h: ArrayLike) -> Float[Array, "b classes"]:
        """Return the logits."""
        h = _of_size("LinearProbe", h, len(self.center))
        return jnp.matmul(h - self.center[None], self.weight, precision="highest") + self.bias[None]


def linear_probe(
    h: ArrayLike,
    labels: ArrayLike,
    num_classes: int,
    *,
    penalty: ArrayLike = 1e-3,
    max_steps: int = 50,
) -> LinearProbe:
    """Return the linear probe fitted to features by logistic regression.

    Features are standardised first, so that the penalty means the same for all of them; constant
    ones get no weight. ``penalty = 1 / (C N)`` is scikit-learn's ``LogisticRegression(C=C)`` on
    standardised features. Gradients do not pass through the fit.

    Args:
        h: ``[N, *features]`` with p entries each. Memory is ``N p + p^2``: pool feature maps
            (:func:`pool_features`).
        labels: ``[N]``, in ``0 .. num_classes - 1``.
        num_classes: K.
        penalty: lambda > 0 of the module's formula.
        max_steps: of Newton's; the fit ends by itself where no step helps.

    Raises:
        ValueError: for labels that do not fit, features that are not finite, a penalty that is not
            positive (separable classes have no optimum without one).

    Examples:
        >>> import jax.numpy as jnp
        >>> h, labels = jnp.array([[-2.0], [-1.0], [1.0], [2.0]]), jnp.array([0, 0, 1, 1])
        >>> probe = linear_probe(h, labels, 2)
        >>> probe(h).argmax(1).tolist()
        [0, 0, 1, 1]
    """
    where = "linear_probe"
    h = flat_features(where, "h", h)
    check_int(where, "num_classes", num_classes, 2)
    check_int(where, "max_steps", max_steps)
    check_labels(where, labels, len(h), num_classes)
    check_range(where, "penalty", penalty, 0, low_open=True, high_open=True)
    (num, size), dtype = h.shape, h.dtype
    mm = lambda a, b: jnp.matmul(a, b, precision="highest")
    penalty = jnp.asarray(penalty, dtype)

    center = jnp.mean(h, axis=0)
    h = h - center[None]
    std = jnp.sqrt(jnp.mean(h**2, axis=0))
    varies = std > 10 * jnp.finfo(dtype).eps * (jnp.abs(center) + std)
    inverse = jnp.where(varies, 1 / jnp.where(varies, std, 1), 0)
    z = h * inverse[None]
    bound = mm(z.T, z) / (2 * num) + penalty * jnp.eye(size, dtype=dtype)
    factor = jnp.linalg.cholesky(bound)
    solve = lambda b, trans: jax.scipy.linalg.solve_triangular(factor, b, lower=True, trans=trans)
    # The bias is one more coordinate, which the penalty does not see.
    u = jnp.concatenate([solve(z.T, 0).T, jnp.full((num, 1), 2**0.5, dtype)], axis=1)
    truth = jax.nn.one_hot(labels, num_classes, dtype=dtype)

    def cost(weight: Array, logits: Array) -> Array:
        fit = jnp.sum(truth * jax.nn.log_softmax(logits), axis=1)
        return 0.5 * penalty * jnp.sum(weight**2) - jnp.mean(fit)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        v, logits, now, _, count, _ = state
        p = jax.nn.softmax(logits)
        shrunk = lambda d: jnp.zeros_like(d).at[:-1].set(penalty * solve(solve(d[:-1], 1), 0))
        gradient = mm(u.T, p - truth) / num + shrunk(v)

        def hessian(d: Array) -> Array:
            moved = p * mm(u, d[0])
            moved = moved - p * jnp.sum(moved, axis=1, keepdims=True)
            return (mm(u.T, moved) / num + shrunk(d[0]))[None]

        zero = jnp.zeros_like(gradient)[None]
        direction = conjugate_gradient(hessian, -gradient[None], zero, num_iters=_INNER)[0]
        ahead, plain = mm(u, direction), lambda v: solve(v[:-1], 1)
        lengths = 0.5 ** jnp.arange(_HALVINGS, dtype=dtype)
        here, there = plain(v), plain(direction)
        costs = jax.lax.map(lambda a: cost(here + a * there, logits + a * ahead), lengths)
        length, best = lengths[jnp.argmin(costs)], jnp.min(costs)
        better = best < now
        length = jnp.where(better, length, 0)
        largest = jnp.max(jnp.abs(gradient))
        best = jnp.minimum(best, now)
        return v + length * direction, logits + length * ahead, best, largest, count + 1, better

    v = jnp.zeros((size + 1, num_classes), dtype)
    logits = jnp.zeros((num, num_classes), dtype)
    worst = jnp.asarray(jnp.inf, dtype)
    start = (v, logits, worst, worst, jnp.asarray(0), jnp.asarray(True))
    going = lambda state: state[5] & (state[4] < max_steps)
    v, _, _, gradient, _, _ = jax.lax.while_loop(going, step, start)
    return LinearProbe(center, inverse[:, None] * solve(v[:-1], 1), v[-1] * 2**0.5, gradient)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class NeighborProbe:
    """Votes of the k nearest examples by angle. A pytree.

    Attributes:
        h: ``[N, p]``, the features voted by, of unit length.
        votes: ``[N, K]``, one-hot classes.
        k: number of voters.
    """

    h: Array
    votes: Array
    k: int = field(metadata={"static": True})

    def __call__(self, h: ArrayLike) -> Float[Array, "b classes"]:
        """Return the share of the votes for each class."""
        h = _unit(_of_size("NeighborProbe", h, self.h.shape[1]))
        return jnp.mean(self.votes[nearest(h, self.h, self.k).index], axis=1)


def neighbor_probe(
    h: ArrayLike, labels: ArrayLike, num_classes: int, *, k: int = 10
) -> NeighborProbe:
    """Return the probe by the k nearest examples, in the angle between features.

    Nothing is fitted, so it sees classes that are no half-spaces, and every feature counts by its
    own size.

    Args:
        h: ``[N, *features]``.
        labels: ``[N]``, in ``0 .. num_classes - 1``.
        num_classes: K.
        k: voters, at most N.

    Examples:
        >>> import jax.numpy as jnp
        >>> h, labels = jnp.array([[1.0, 0.1], [2.0, 0.0], [0.0, 3.0]]), jnp.array([0, 0, 1])
        >>> neighbor_probe(h, labels, 2, k=1)(jnp.array([[0.1, 0.5]])).tolist()
        [[0.0, 1.0]]
    """
    where = "neighbor_probe"
    h = flat_features(where, "h", h)
    check_int(where, "k", k)
    check_int(where, "num_classes", num_classes, 2)
    check_labels(where, labels, len(h), num_classes)
    if k > len(h):
        raise fail(where, "k too large", f"at most the {len(h)} examples", k)
    return NeighborProbe(_unit(h), jax.nn.one_hot(labels, num_classes, dtype=h.dtype), k)


def probe_accuracy(scores: ArrayLike, labels: ArrayLike) -> Float[Array, "*T"]:
    """Return the share of examples whose largest score is that of their class.

    Args:
        scores: ``[..., b, K]``, from a probe, from several levels, or averaged over them.
        labels: ``[b]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> probe_accuracy(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1])).item()
        0.5
    """
    scores = jnp.asarray(scores)
    check_labels("probe_accuracy", labels, scores.shape[-2], scores.shape[-1])
    labels = jnp.expand_dims(jnp.asarray(labels), tuple(range(scores.ndim - 2)))
    return jnp.mean(jnp.argmax(scores, axis=-1) == labels, axis=-1, dtype=scores.dtype)


def ensemble_scores(
    scores: ArrayLike, center: Any, num_levels: int = 5
) -> Float[Array, "b classes"]:
    """Return the scores averaged over neighbouring noise levels.

    Args:
        scores: ``[T, b, K]`` of :func:`probe_curve`, levels in the order of the noise.
        center: index of the middle one, e.g. ``jnp.argmax(accuracy)`` of examples apart; near an
            end, the levels next to the end are taken.
        num_levels: how many, published 5; at most T.

    Examples:
        >>> import jax.numpy as jnp
        >>> scores = jnp.array([1.0, 2.0, 6.0, 9.0])[:, None, None]
        >>> ensemble_scores(scores, 1, 3).item()
        3.0
    """
    scores = jnp.asarray(scores)
    check_int("ensemble_scores", "num_levels", num_levels)
    if num_levels > len(scores):
        got = f"{num_levels} levels"
        raise fail("ensemble_scores", "too few levels in scores", got, len(scores))
    first = jnp.clip(jnp.asarray(center) - num_levels // 2, 0, len(scores) - num_levels)
    return jnp.mean(jax.lax.dynamic_slice_in_dim(scores, first, num_levels), axis=0)


class ProbeCurve(NamedTuple):
    """Probes at T noise levels on held-out examples."""

    accuracy: Float[Array, " T"]
    scores: Float[Array, "T b classes"]
    """Of the held-out examples, for :func:`ensemble_scores`."""
    train_accuracy: Float[Array, " T"]


def probe_curve(
    key: PRNGKey,
    features_fn: FeatureFn,
    schedule: Schedule,
    ts: Any,
    x: ArrayLike,
    labels: ArrayLike,
    held_out: ArrayLike,
    held_out_labels: ArrayLike,
    num_classes: int,
    *,
    fit: Callable[[Array, Array, int], Callable[[Array], Array]] = linear_probe,
    block: int = 1024,
) -> ProbeCurve:
    """Return how well a probe tells the classes of noisy held-out examples, at each noise level.

    Every example is noised once per level, with its own noise; a probe is fitted on the features of
    ``x`` and judged on those of ``held_out`` at the same level.

    Args:
        key: that of example i at level j is ``fold_in(fold_in(key, j), i)``, held-out examples
            counted after the others.
        features_fn: ``(x_t, t) -> [b, *features]``, e.g. ``denoisers.features`` with network and
            tap bound, pooled if it has places; a denoiser too.
        schedule: the noise schedule that ``ts`` refer to.
        ts: ``[T]`` times, > 0.
        x: clean examples to fit on, ``[N, *data]``.
        labels: ``[N]``, in ``0 .. num_classes - 1``.
        held_out: clean examples to judge on, ``[b, *data]``.
        held_out_labels: ``[b]``.
        num_classes: K.
        fit: ``(features, labels, num_classes) -> probe``, traced; :func:`linear_probe`,
            :func:`neighbor_probe`, or one of them with its options bound.
        block: examples that go through ``features_fn`` at once.

    Examples:
        >>> import jax
        >>> from lowdim_diffusion import distributions, linalg, schedules
        >>> bases = linalg.random_frames(jax.random.key(0), 2, 20, 4, orthogonal=True)
        >>> x, labels = distributions.MoLRG(bases).sample(jax.random.key(1), 600)
        >>> energies = lambda x_t, t: (x_t @ bases).swapaxes(0, 1) ** 2  # along each direction
        >>> parts = x[:400], labels[:400], x[400:], labels[400:]
        >>> curve = probe_curve(
        ...     jax.random.key(2), energies, schedules.VE(), [0.1, 5.0], *parts, num_classes=2
        ... )
        >>> bool(curve.accuracy[0] > 0.95), bool(curve.accuracy[1] < 0.7)
        (True, True)
    """
    where = "probe_curve"
    x, held_out = jnp.asarray(x), jnp.asarray(held_out)
    check_shape(where, "held_out", held_out, (None, *x.shape[1:]), "the shape of x's examples")
    check_labels(where, labels, len(x), num_classes)
    check_labels(where, held_out_labels, len(held_out), num_classes)
    check_int(where, "block", block)
    ts = jnp.atleast_1d(level_times(where, schedule, ts, x.dtype))
    num, both = len(x), jnp.concatenate([x, held_out.astype(x.dtype)])
    num_blocks = math.ceil(len(both) / block)
    size = math.ceil(len(both) / num_blocks)

    def level(at: tuple[Array, Array]) -> ProbeCurve:
        j, t = at
        level_key = jax.random.fold_in(key, j)
        alpha, sigma = schedule.alpha(t).astype(x.dtype), schedule.sigma(t).astype(x.dtype)

        def features(i: Array) -> Array:
            index = i * size + jnp.arange(size)
            keys = example_keys(level_key, index)
            eps = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
            clean = both[jnp.minimum(index, len(both) - 1)]
            return features_fn(alpha * clean + sigma * eps, t)

        h = jax.lax.map(features, jnp.arange(num_blocks))
        h = h.reshape(num_blocks * size, -1)[: len(both)]
        scores = fit(h[:num], labels, num_classes)(h)
        return ProbeCurve(
            probe_accuracy(scores[num:], held_out_labels),
            scores[num:],
            probe_accuracy(scores[:num], labels),
        )

    return jax.lax.map(level, (jnp.arange(len(ts)), ts))


def _of_size(where: str, h: Any, size: int) -> Array:
    h = flat_features(where, "h", h)
    check_shape(where, "h", h, (None, size), "features of the tap that the probe was fitted on")
    return h


def _unit(h: Array) -> Array:
    length = safe_sqrt(jnp.sum(h**2, axis=1, keepdims=True))
    return h / jnp.where(length > 0, length, 1)
