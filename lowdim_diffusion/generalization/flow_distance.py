r"""Probability flow distance: how far apart two models carry the same noise.

The probability-flow ODE of a model p is a map ``Phi_p`` from noise to data. Two models meet on the
same noises:

.. math:: \mathrm{PFD}(p, q) = \big(E_{x_T}
    \|\Psi(\Phi_p(x_T)) - \Psi(\Phi_q(x_T))\|^2\big)^{1/2},

with Psi the identity or an embedding. On any set of noises it is a metric of the maps: zero for
equal models, symmetric, with the triangle inequality. For two Gaussians, and noise without bound,

.. math:: \mathrm{PFD}^2 = \|m_p - m_q\|^2 + \|C_p^{1/2} - C_q^{1/2}\|_F^2,

the squared Wasserstein distance if the covariances commute and more if they do not. A flow from
noise ``N(0, T^2 I)`` misses it by ``C / T^2`` relative to the second term and, since the noise is
not centred on the mean, by ``C^{1/2} / T`` relative to the first.

In the teacher-student protocol the teacher defines the truth and generates the training data.
``E_gen = PFD(teacher, student)`` says how far the student is from the truth, ``E_mem =
PFD(p_emp, student)`` how far from replaying its N training examples, where ``p_emp`` is sampled
through the optimal denoiser. Over students of independent training sets,

.. math:: E[E_\mathrm{gen}^2] = \underbrace{E\|\Phi_p - \bar\Phi\|^2}_{\text{bias}^2}
    + \underbrace{E\|\Phi_q - \bar\Phi\|^2}_\text{variance},\qquad \bar\Phi = E_q \Phi_q .

A denoiser is a function, so an exact law and a trained network serve alike as teacher.

References:
    Zhang et al. 2025, arXiv 2505.20123 (the distance, the protocol and the decomposition);
    Zhang et al. 2023, arXiv 2310.05264 (the optimal denoiser of a training set).
"""

import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lowdim_diffusion._checks import check_shape, fail
from lowdim_diffusion._types import Array, ArrayLike, DenoiseFn, Float, PRNGKey, Schedule
from lowdim_diffusion.distributions import Empirical
from lowdim_diffusion.generalization._inputs import check_finite, check_pairs
from lowdim_diffusion.generalization.embeddings import Embedding, no_embedding
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.neighbors import _flat
from lowdim_diffusion.sampling import sample_batched
from lowdim_diffusion.solvers import Solver, heun

MIN_STEPS = 72
"""Steps below which the optimal denoiser's flow often ends on another training example."""


class FlowDistance(NamedTuple):
    """A probability flow distance, measured on a finite number of noises."""

    distance: Float[Array, ""]
    """Root mean square over the noises."""
    std_error: Float[Array, ""]
    """Standard error of ``distance``: how much it varies with the draw of the noises."""
    scale: Float[Array, ""]
    """Root mean square norm of the first model's (embedded) samples, to read the distance by."""

    @property
    def relative(self) -> Float[Array, ""]:
        """``distance / scale``; independent samples of one centred law are sqrt(2) apart."""
        return self.distance / self.scale


class BiasVariance(NamedTuple):
    """The mean squared error of several students, and the two parts that it is the sum of."""

    squared_error: Float[Array, ""]
    """Mean over the students of their squared distance to the teacher."""
    squared_bias: Float[Array, ""]
    """Squared distance of the mean student; unbiased, so it may come out below zero."""
    variance: Float[Array, ""]
    """Mean squared distance of a student to the mean student; unbiased."""


def rms_distance(a: ArrayLike, b: ArrayLike, *, embed: Embedding = no_embedding) -> FlowDistance:
    """Return the root mean square distance of the pairs ``(a[i], b[i])``.

    The probability flow distance of samples that are there already, e.g. of one teacher beside
    many students. The standard error comes from the spread of the squared distances.

    Args:
        a: ``[b, *data]``, samples of one model, b >= 2.
        b: ``[b, *data]``, of the other, from the same noises in the same order.
        embed: ``[b, *data] -> [b, *features]``; the samples themselves by default.

    Raises:
        ValueError: if the sets differ in shape, are too small, or (outside ``jit``) not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> found = rms_distance(jnp.zeros((2, 3)), jnp.array([[3.0, 0.0, 4.0], [0.0, 5.0, 0.0]]))
        >>> float(found.distance), float(found.std_error)
        (5.0, 0.0)
    """
    where = "rms_distance"
    check_pairs(where, a, b)
    if jnp.ndim(a) < 2 or jnp.shape(a)[0] < 2:
        raise fail(where, "too few samples", "[b, *data] with b >= 2", jnp.shape(a))
    a, b = _flat(embed(jnp.asarray(a))), _flat(embed(jnp.asarray(b)))
    num = a.shape[0]
    squared = jnp.sum((a - b) ** 2, axis=-1)
    distance = safe_sqrt(squared.mean())
    spread = safe_sqrt(squared.var(ddof=1) / num)
    positive = distance > 0
    error = jnp.where(positive, spread / (2 * jnp.where(positive, distance, 1)), 0)
    return FlowDistance(distance, error, safe_sqrt(jnp.sum(a**2, axis=-1).mean()))


def probability_flow_distance(
    key: PRNGKey,
    denoise_p: DenoiseFn,
    denoise_q: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    shape_or_x_T: Any,
    *,
    solver: Solver | None = None,
    embed: Embedding = no_embedding,
    batch_size: int = 256,
    mesh: Mesh | None = None,
) -> FlowDistance:
    """Return the distance of what two models make of the same noises.

    Both flows are run with the same solver on the same grid, ``batch_size`` noises at a time.

    Args:
        key: typed random key for the noises; not used if they are given.
        denoise_p: first model; its samples set the scale of ``relative``.
        denoise_q: second model.
        schedule: noise schedule of both.
        ts: ``[num_steps + 1]`` times, noise to data.
        shape_or_x_T: ``(num_noises, *data)``, or the noises themselves at ``ts[0]``.
        solver: a deterministic one; Heun's method by default.
        embed: ``[b, *data] -> [b, *features]``; the samples themselves by default.
        batch_size: noises in flight, over all devices together.
        mesh: one-axis mesh ``("data",)`` from ``sharding.data_mesh`` to split them over.

    Raises:
        ValueError: for a stochastic solver, a bad grid, models of another shape, or (outside
            ``jit``) samples that are not finite.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from lowdim_diffusion import schedules
        >>> from lowdim_diffusion.distributions import Gaussian
        >>> ve, ts = schedules.VE(), schedules.karras_grid(18)
        >>> p, q = (Gaussian(m * jnp.ones(2), jnp.eye(2)).denoiser(ve) for m in (0.0, 3.0))
        >>> found = probability_flow_distance(jax.random.key(0), p, q, ve, ts, (100, 2))
        >>> round(float(found.distance), 2)  # 3 sqrt(2), but for noise of 80 instead of infinity
        4.19

    References:
        Zhang et al. 2025, arXiv 2505.20123.
    """
    where = "probability_flow_distance"
    solver = heun() if solver is None else solver
    if solver.stochastic:
        fix = "e.g. solvers.heun(), or solvers.ddim(eta=0.0)"
        raise fail(where, "the solver draws noise", "a deterministic solver", solver.name, fix)
    if not isinstance(shape_or_x_T, tuple | list):
        check_finite(where, "x_T", shape_or_x_T)
    a, b = (
        sample_batched(
            key,
            denoise_fn,
            schedule,
            ts,
            shape_or_x_T,
            solver=solver,
            batch_size=batch_size,
            mesh=mesh,
        ).x
        for denoise_fn in (denoise_p, denoise_q)
    )
    return rms_distance(a, b, embed=embed)


def generalization_error(
    key: PRNGKey,
    teacher: DenoiseFn,
    student: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    shape_or_x_T: Any,
    **options: Any,
) -> FlowDistance:
    """Return ``E_gen``, the probability flow distance of a student to its teacher.

    Args:
        key: typed random key for the noises.
        teacher: what generated the training data: the denoiser of an exact law, or a network.
        student: the model trained on them.
        schedule: noise schedule of both.
        ts: ``[num_steps + 1]`` times, noise to data.
        shape_or_x_T: ``(num_noises, *data)``, or the noises.
        **options: those of :func:`probability_flow_distance`.
    """
    return probability_flow_distance(key, teacher, student, schedule, ts, shape_or_x_T, **options)


def memorization_error(
    key: PRNGKey,
    train: ArrayLike,
    student: DenoiseFn,
    schedule: Schedule,
    ts: Any,
    shape_or_x_T: Any,
    **options: Any,
) -> FlowDistance:
    """Return ``E_mem``, the probability flow distance of a student to replaying its training data.

    The replay is the flow of the optimal denoiser, which ends on training examples. It is stiff:
    with 18 Heun steps some 4 % of the noises end on another example than with many, so both flows
    want 72 steps or more. With fewer a warning is given. As N grows the training set tends to the
    teacher, and ``E_mem`` to ``E_gen``.

    Args:
        key: typed random key for the noises.
        train: ``[N, *data]``, what the student was trained on.
        student: the model.
        schedule: its noise schedule.
        ts: ``[num_steps + 1]`` times, noise to data, ``num_steps >= 72``.
        shape_or_x_T: ``(num_noises, *data)``, or the noises.
        **options: those of :func:`probability_flow_distance`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from lowdim_diffusion import schedules
        >>> from lowdim_diffusion.distributions import Empirical
        >>> ve, ts, train = schedules.VE(), schedules.karras_grid(72), jnp.eye(3)
        >>> copy = Empirical(train).denoiser(ve)
        >>> float(memorization_error(jax.random.key(0), train, copy, ve, ts, (20, 3)).distance)
        0.0
    """
    where = "memorization_error"
    given = isinstance(shape_or_x_T, tuple | list)
    shape = tuple(shape_or_x_T) if given else jnp.shape(shape_or_x_T)
    check_shape(where, "train", train, (None, *shape[1:]), "as large as the samples")
    check_finite(where, "train", train)
    num_steps = np.shape(ts)[0] - 1
    if num_steps < MIN_STEPS:
        warnings.warn(
            f"{where}: {num_steps} steps are few for the stiff flow of the optimal denoiser, which "
            f"then ends on other training examples; give {MIN_STEPS} or more.",
            stacklevel=2,
        )
    optimum = Empirical(train).denoiser(schedule)
    return probability_flow_distance(key, optimum, student, schedule, ts, shape_or_x_T, **options)


def bias_variance(
    teacher: ArrayLike, students: ArrayLike, *, embed: Embedding = no_embedding
) -> BiasVariance:
    r"""Return the squared bias and the variance of students trained on independent data.

    With ``e_s`` the error of student s, averaged over the noises, and S students,

    .. math:: \text{bias}^2 = \frac{1}{S(S-1)}\sum_{s\ne s'} \langle e_s, e_{s'}\rangle,\qquad
       \text{variance} = \frac1S\sum_s \|e_s\|^2 - \text{bias}^2 ,

    both without the bias of order 1/S that the mean of few students brings: its squared distance to
    the teacher is ``bias^2 + variance / S``. The two add up to the mean squared error exactly.

    Args:
        teacher: ``[b, *data]``, the teacher's samples.
        students: ``[S, b, *data]``, each student's of the same noises in the same order, S >= 2.
        embed: ``[b, *data] -> [b, *features]``; the samples themselves by default.

    Raises:
        ValueError: for fewer than two students, sets of another shape, or (outside ``jit``) samples
            that are not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> students = jnp.array([[[3.0]], [[1.0]]])  # 2 +/- 1 where the teacher has 0
        >>> print(*bias_variance(jnp.zeros((1, 1)), students))
        5.0 3.0 2.0

    References:
        Zhang et al. 2025, arXiv 2505.20123 (the decomposition).
    """
    where = "bias_variance"
    check_shape(where, "students", students, (None, *jnp.shape(teacher)), "give [S, b, *data]")
    num = jnp.shape(students)[0]
    if num < 2:
        fix = "the spread of one student is not known"
        raise fail(where, "too few students", "at least 2", num, fix)
    check_finite(where, "teacher", teacher)
    check_finite(where, "students", students)
    count = jnp.shape(teacher)[0]
    true = _flat(embed(jnp.asarray(teacher)))
    errors = jnp.stack([(_flat(embed(s)) - true).reshape(-1) for s in jnp.asarray(students)])
    products = jnp.matmul(errors, errors.T, precision="highest") / count
    own = jnp.trace(products) / num
    bias = (products.sum() - jnp.trace(products)) / (num * (num - 1))
    return BiasVariance(own, bias, own - bias)
