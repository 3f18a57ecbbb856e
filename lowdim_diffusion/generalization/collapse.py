r"""Models trained on what models have made: does the law survive the generations?

Generation 1 is fitted to N real examples. After each fit N new examples are made, by the model or,
a fixed share of them, drawn from the real law again; the next generation is fitted

* to these alone (*replace*): errors add up generation by generation, and directions of the data
  are lost one after another, though the total variance need not fall;
* to these and all before (*accumulate*): errors stay bounded.

Curation is a choice on the way: of every K examples made one is kept, with probability
``softmax(reward)``; :func:`curate` follows the same loop exactly, without samples.

For linear regression on d Gaussian features, N examples per generation and noise of standard
deviation s everything is known: :func:`linear_collapse`.

References:
    Gerstgrasser et al. 2024, "Is model collapse inevitable?", arXiv 2404.01413 (theorems 1 and 2);
    Ferbach et al. 2024, "Self-consuming generative models with curated data provably optimize human
    preferences", arXiv 2407.09499.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_choice, check_int, check_range, check_shape, fail
from lowdim_diffusion._types import Array, ArrayLike, Float, PRNGKey, PyTree, Scalar
from lowdim_diffusion.subspaces import principal_angles

Mix: TypeAlias = Literal["replace", "accumulate"]
"""What a generation is fitted to: the newest examples, or all so far."""


def self_consuming(
    key: PRNGKey,
    real: Callable[[PRNGKey, int], PyTree],
    fit: Callable[[PRNGKey, PyTree, Array], PyTree],
    sample: Callable[[PRNGKey, PyTree, int], PyTree],
    num_generations: int,
    num_samples: int,
    *,
    mix: Mix = "replace",
    real_share: float = 0.0,
    reward: Callable[[PyTree], Array] | None = None,
    num_candidates: int = 2,
    measure: Callable[[PRNGKey, PyTree], PyTree] = lambda key, model: model,
) -> PyTree:
    """Return what is measured of each generation: one ``lax.scan``, ready for ``jit`` and ``vmap``.

    Args:
        key: typed random key.
        real: ``(key, num) -> examples [num, ...]`` (any tree of arrays) of the true law.
        fit: ``(key, examples [m, ...], weights [m]) -> model``. Sizes do not change from one
            generation to the next: with ``mix="accumulate"`` there is room for all of them, and
            weights are 0 where there is nothing yet; else they are 1.
        sample: ``(key, model, num) -> examples [num, ...]``.
        num_generations: G >= 1, counted from the model of real examples.
        num_samples: N, made in each generation.
        mix: ``"replace"`` or ``"accumulate"``; the latter holds ``G N`` examples.
        real_share: share of each generation's N that is real, rounded to whole examples.
        reward: ``examples [num, ...] -> [num]``; if given, each example of a model is one of
            ``num_candidates``, chosen with probability ``softmax(reward)``.
        num_candidates: K >= 2.
        measure: ``(key, model) -> tree of arrays``; the model itself if not given.

    Returns:
        What ``measure`` returns, with a leading axis G.

    Raises:
        ValueError: for an unknown ``mix`` or numbers out of range.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> draw = lambda key, std, num: std * jax.random.normal(key, (num,))
        >>> fit = lambda key, x, w: jnp.sqrt(jnp.sum(w * x**2) / jnp.sum(w))
        >>> real = lambda key, num: draw(key, 1.0, num)
        >>> run = lambda mix: self_consuming(
        ...     jax.random.key(0), real, fit, draw, 100, 10, mix=mix
        ... )
        >>> bool(run("replace")[-1] < 0.1), bool(run("accumulate")[-1] > 0.5)
        (True, True)
    """
    where = "self_consuming"
    check_int(where, "num_generations", num_generations)
    check_int(where, "num_samples", num_samples)
    check_choice(where, "mix", mix, get_args(Mix))
    check_range(where, "real_share", real_share, 0, 1)
    check_int(where, "num_candidates", num_candidates, 2)
    num_real = round(real_share * num_samples)
    num_made = num_samples - num_real

    def made(key: Any, model: Any) -> Any:
        if reward is None:
            return sample(key, model, num_made)
        draw_key, choice_key = jax.random.split(key)
        candidates = sample(draw_key, model, num_made * num_candidates)
        scores = reward(candidates)
        check_shape(where, "reward", scores, (num_made * num_candidates,), "one per example")
        best = jax.random.categorical(choice_key, scores.reshape(num_made, num_candidates))
        rows = jnp.arange(num_made) * num_candidates + best
        return jax.tree.map(lambda a: a[rows], candidates)

    def next_examples(key: Any, model: Any) -> Any:
        made_key, real_key = jax.random.split(key)
        parts = [made(made_key, model)] if num_made else []
        parts += [real(real_key, num_real)] if num_real else []
        return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

    capacity = num_samples * (num_generations if mix == "accumulate" else 1)

    def generation(examples: Any, g: Array) -> tuple[Any, Any]:
        keys = jax.random.split(jax.random.fold_in(key, g + 1), 3)
        weights = (jnp.arange(capacity) < (g + 1) * num_samples).astype(float)
        model = fit(keys[0], examples, weights)
        new = next_examples(keys[1], model)
        if mix == "accumulate":  # the last ones have no place and no reader
            put = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, (g + 1) * num_samples, 0)
            new = jax.tree.map(put, examples, new)
        return new, measure(keys[2], model)

    first = real(jax.random.fold_in(key, 0), num_samples)
    for leaf in jax.tree.leaves(first):
        check_shape(where, "real", leaf, (num_samples, *leaf.shape[1:]), "num examples")
    room = lambda a: jnp.pad(a, ((0, capacity - num_samples), *((0, 0),) * (a.ndim - 1)))
    _, measured = jax.lax.scan(generation, jax.tree.map(room, first), jnp.arange(num_generations))
    return measured


def linear_collapse(
    num_generations: int,
    num_samples: int,
    dim: int,
    noise_std: Scalar = 1.0,
    *,
    mix: Mix = "replace",
) -> Float[Array, " num_generations"]:
    r"""Return the test error of least squares fitted to the labels of its predecessor.

    Labels of generation g are ``y = X w_{g-1} + s e`` with N Gaussian inputs; the error is
    ``E ||w_g - w||^2``. With ``e_1 = s^2 d / (N - d - 1)``,

    .. math:: E_g = g\, e_1 \ \text{(replace)}, \qquad
        E_g = e_1 \sum_{i \le g} i^{-2} < \tfrac{\pi^2}{6} e_1 \ \text{(accumulate)} .

    The latter is exact if every generation has the inputs of the first, and a bound if each draws
    its own.

    Args:
        num_generations: G.
        num_samples: N > d + 1; with fewer the mean error is infinite.
        dim: d.
        noise_std: s >= 0.
        mix: what a generation is fitted to.

    Returns:
        ``[G]``, from the model of real labels on.

    Examples:
        >>> linear_collapse(3, 12, 1).round(3).tolist()
        [0.10..., 0.20..., 0.30...]

    References:
        Gerstgrasser et al. 2024, arXiv 2404.01413, theorems 1 and 2.
    """
    where = "linear_collapse"
    check_int(where, "num_generations", num_generations)
    check_int(where, "dim", dim)
    check_range(where, "noise_std", noise_std, 0)
    check_choice(where, "mix", mix, get_args(Mix))
    check_int(where, "num_samples", num_samples, dim + 2, "the mean error is infinite")
    g = jnp.arange(1, num_generations + 1)
    growth = g if mix == "replace" else jnp.cumsum(1 / g**2)
    return noise_std**2 * dim / (num_samples - dim - 1) * growth


class Spread(NamedTuple):
    """How a law fills its space, from the eigenvalues of its covariance."""

    trace: Float[Array, "*b"]
    """Total variance. No measure of collapse: its mean can stay while directions die."""
    effective_rank: Float[Array, "*b"]
    """``exp`` of the entropy of the eigenvalues' shares: r for r equal ones, 1 for a line."""
    geometric_variance: Float[Array, "*b"]
    """Geometric mean of the leading eigenvalues; it dies with any of them."""
    largest_angle: Float[Array, "*b"]
    """Between the leading directions and the true subspace, in radians."""


def spread(factor: ArrayLike, basis: Float[Array, "n rank"]) -> Spread:
    """Return metrics of a covariance ``factor factor^T`` against a true subspace.

    Args:
        factor: ``[..., n, m]``, m >= rank: ``cov_factor`` of a Gaussian, or of examples
            ``(x - x.mean(0)).T / sqrt(N - 1)``.
        basis: ``[n, rank]``, orthonormal; as many leading directions are looked at.

    Examples:
        >>> import jax.numpy as jnp
        >>> found = spread(jnp.diag(jnp.array([2.0, 1.0, 0.0])), jnp.eye(3)[:, :2])
        >>> [round(float(value), 3) for value in found]
        [5.0, 1.649, 2.0, 0.0]

    References:
        Roy, Vetterli 2007, "The effective rank" (EUSIPCO).
    """
    factor = jnp.asarray(factor)
    rank = basis.shape[-1]
    if factor.ndim < 2 or factor.shape[-2] != basis.shape[0] or factor.shape[-1] < rank:
        expected = f"[..., {basis.shape[0]}, {rank} or more]"
        raise fail("spread", "wrong shape of factor", expected, factor.shape)
    u, s, _ = jnp.linalg.svd(factor, full_matrices=False)
    values = s**2
    trace = jnp.sum(values, axis=-1)
    share = values / jnp.where(trace == 0, 1, trace)[..., None]
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0), -1)
    geometric = jnp.exp(jnp.mean(jnp.log(values[..., :rank]), axis=-1))
    angle = principal_angles(u[..., :rank], jnp.broadcast_to(basis, (*u.shape[:-1], rank)))
    return Spread(trace, jnp.exp(entropy), geometric, angle[..., -1])


class Curation(NamedTuple):
    """A law on finitely many states from one generation to the next."""

    probabilities: Float[Array, "generations states"]
    """From the first law on."""
    utility: Float[Array, " generations"]
    """``E e^r``, which curation raises."""
    guaranteed: Float[Array, " generations"]
    """Below which the utility of the *next* law cannot lie, without real data."""


def curate(
    probabilities: Float[Array, " states"],
    rewards: Float[Array, " states"],
    num_generations: int,
    *,
    num_candidates: int | None = 2,
    made_weight: Scalar | None = None,
) -> Curation:
    r"""Return the laws of models that are fitted, without error, to curated samples of themselves.

    Of K samples one is kept with probability ``softmax(r)``:

    .. math:: p_{t+1}(x) = p_t(x)\, H_t(x), \qquad
        H_t(x) = E_{x_2..x_K \sim p_t} \frac{K e^{r(x)}}{e^{r(x)} + \sum_i e^{r(x_i)}} ,

    for K to infinity ``p e^r / E e^r``. Then ``E_{t+1} e^r >= E_t e^r + (K - 1)/K Var_t(e^r) /
    max e^r``: the law ends on the best state. With real data, ``p_{t+1} = (p_0 + w p_t H_t) /
    (1 + w)``, it stays near them. The expectation is exact for every K, by

    .. math:: \frac1{a + \sum_i b_i} = \int_0^\infty e^{-s a} \prod_i e^{-s b_i}\, ds

    and the trapezoidal rule in ``log s``, whose error is below rounding.

    Args:
        probabilities: ``[S]``, >= 0, of sum 1.
        rewards: ``[S]``.
        num_generations: G >= 0.
        num_candidates: K >= 2; None is infinity.
        made_weight: w >= 0, examples of the model to one real one; None uses no real data.

    Returns:
        :class:`Curation` with ``G + 1`` laws.

    Examples:
        >>> import jax.numpy as jnp
        >>> run = curate(jnp.array([0.5, 0.5]), jnp.log(jnp.array([1.0, 3.0])), 1)
        >>> run.probabilities[1].round(4).tolist()  # 3/4 of the mixed pairs: 1/4 + 1/2 * 3/4
        [0.375, 0.625]

    References:
        Ferbach et al. 2024, arXiv 2407.09499, lemmas 2.1 and 2.2 and section 2.2.
    """
    where = "curate"
    check_shape(where, "rewards", rewards, jnp.shape(probabilities), "one per state")
    check_range(where, "probabilities", probabilities, 0, 1)
    check_int(where, "num_generations", num_generations, 0)
    if num_candidates is not None:
        check_int(where, "num_candidates", num_candidates, 2)
    if made_weight is not None:
        check_range(where, "made_weight", made_weight, 0)
    p0 = probabilities / jnp.sum(probabilities)
    gain = jnp.exp(rewards - jnp.max(rewards))  # H does not depend on the unit of e^r

    def step(p: Array, _: None) -> tuple[Array, Array]:
        new = p * (_preference(p, gain, num_candidates))
        new = new / jnp.sum(new)  # rounding errors would double in every generation
        if made_weight is not None:
            new = (p0 + made_weight * new) / (1 + made_weight)
        return new, p

    last, before = jax.lax.scan(step, p0, None, length=num_generations)
    laws = jnp.concatenate([before, last[None]])
    mean = lambda a: jnp.sum(laws * a, axis=-1)
    utility = mean(gain[None])
    variance = mean((gain[None] - utility[:, None]) ** 2)
    factor = 1.0 if num_candidates is None else (num_candidates - 1) / num_candidates
    unit = jnp.exp(jnp.max(rewards))
    return Curation(laws, unit * utility, unit * (utility + factor * variance))


def _preference(p: Array, gain: Array, num_candidates: int | None) -> Array:
    """``H`` for each state."""
    if num_candidates is None:
        return gain / jnp.sum(p * gain)
    # e^{-s a} is 1 for log s below -39 (a <= 1) and gone 4 beyond the smallest a.
    ends = -39.0, 4.0 - jnp.min(jnp.log(gain))
    u = jnp.linspace(*ends, 512, dtype=gain.dtype)[:, None]
    decay = jnp.exp(-jnp.exp(u) * gain[None])
    others = jnp.sum(p[None] * decay, axis=-1, keepdims=True) ** (num_candidates - 1)
    integral = (u[1, 0] - u[0, 0]) * jnp.sum(jnp.exp(u) * decay * others, axis=0)
    return num_candidates * gain * integral
