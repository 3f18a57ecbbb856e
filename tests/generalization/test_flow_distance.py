"""Probability flow distances against the closed forms of Gaussians, and the axioms of a metric."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import generalization, linalg, sampling, schedules, sharding, solvers
from lowdim_diffusion.distributions import Empirical, Gaussian, MoLRG

VE = schedules.VE()
DIM = 5


def gaussian(seed, dim=DIM):
    """A Gaussian whose covariance commutes with that of no other seed."""
    rng = np.random.default_rng(seed)
    return Gaussian(rng.standard_normal(dim), rng.standard_normal((dim, 3)) / 2, 0.3)


def root(covariance):
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def affine_flow(p, alpha, sigma):
    """The map ``x_T -> A x_T + c`` of a Gaussian by matrix roots, float64."""
    mean, covariance = (np.asarray(m, np.float64) for m in p.moments())
    noisy = alpha**2 * covariance + sigma**2 * np.eye(len(mean))
    matrix = root(covariance) @ np.linalg.inv(root(noisy))
    return matrix, mean - alpha * matrix @ mean


def closed_form(p, q, alpha, sigma):
    """Distance for noise ``N(0, sigma^2 I)``, expectation taken exactly."""
    (a, c), (b, d) = affine_flow(p, alpha, sigma), affine_flow(q, alpha, sigma)
    return np.sqrt(np.sum((c - d) ** 2) + sigma**2 * np.sum((a - b) ** 2))


@pytest.mark.parametrize("name", ["VE", pytest.param("VP", marks=pytest.mark.slow)])
def test_gaussians_that_do_not_commute_have_the_closed_form_distance(name, key):
    schedule = {"VE": VE, "VP": schedules.VPLinear()}[name]
    ts = schedules.times_from_sigmas(schedule, schedules.karras_grid(40))
    p, q = gaussian(0), gaussian(1)
    alpha, sigma = float(schedule.alpha(ts[0])), float(schedule.sigma(ts[0]))
    x_T = sampling.initial_noise(key, schedule, ts[0], (400, DIM))
    measure = jax.jit(
        lambda p, q: generalization.probability_flow_distance(
            key, p.denoiser(schedule), q.denoiser(schedule), schedule, ts, (400, DIM)
        )
    )
    found = measure(p, q)
    # On these noises, to the accuracy of the solver.
    (a, c), (b, d) = affine_flow(p, alpha, sigma), affine_flow(q, alpha, sigma)
    ends = np.asarray(x_T, np.float64) @ (a - b).T + (c - d)
    np.testing.assert_allclose(found.distance, np.sqrt((ends**2).sum(1).mean()), rtol=2e-3)
    # Over all noises, within the stated error.
    assert abs(found.distance - closed_form(p, q, alpha, sigma)) < 4 * found.std_error
    scale = np.sqrt(np.trace(p.moments()[1]) + np.sum(np.square(p.mean)))
    np.testing.assert_allclose(found.scale, scale, rtol=0.1)
    np.testing.assert_allclose(found.relative, found.distance / found.scale)


def test_limit_of_large_noise_and_its_bias():
    """papers 9.3: |m1 - m2|^2 + |C1^1/2 - C2^1/2|^2, and more than Wasserstein's distance."""
    p, q = gaussian(0), gaussian(1)
    (m, c), (n, d) = ([np.asarray(a, np.float64) for a in g.moments()] for g in (p, q))
    shape = np.sum((root(c) - root(d)) ** 2)
    limit = np.sqrt(np.sum((m - n) ** 2) + shape)
    np.testing.assert_allclose(closed_form(p, q, 1, 1e5), limit, rtol=1e-4)
    wasserstein = np.trace(c + d - 2 * root(root(c) @ d @ root(c)))
    assert shape > 1.005 * wasserstein
    centred = [Gaussian(np.zeros(DIM), g.cov_factor, g.noise_std) for g in (p, q)]
    bias = [abs(closed_form(*centred, 1, t) - np.sqrt(shape)) for t in (20.0, 80.0)]
    assert 12 < bias[0] / bias[1] < 20  # of order 1 / T^2 where the means do not count
    key, flow = jax.random.key(0), lambda g, x: g.flow(x, 1.0, 80.0, 1.0, 0.0)
    x_T = 80 * jax.random.normal(key, (20_000, DIM))
    found = generalization.rms_distance(flow(centred[0], x_T), flow(centred[1], x_T))
    np.testing.assert_allclose(found.distance, np.sqrt(shape), rtol=2e-2)


def test_standard_error_is_the_spread_over_draws():
    p, q = gaussian(0), gaussian(1)

    def draw(key):
        x_T = 80 * jax.random.normal(key, (50, DIM))
        a, b = (g.flow(x_T, 1.0, 80.0, 1.0, 0.0) for g in (p, q))
        found = generalization.rms_distance(a, b)
        return found.distance, found.std_error

    distance, error = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 400))
    np.testing.assert_allclose(error.mean(), distance.std(), rtol=0.15)
    np.testing.assert_allclose(distance.mean(), closed_form(p, q, 1, 80), rtol=0.01)


def mixture(seed):
    return MoLRG(linalg.random_frames(jax.random.key(seed), 2, 12, 2))


def test_is_a_metric_on_mixtures(key):
    ts, x_T = schedules.karras_grid(12), 80 * jax.random.normal(key, (60, 12))
    laws = [mixture(0), mixture(1), mixture(2)]
    measure = jax.jit(
        lambda p, q: generalization.probability_flow_distance(
            key, p.denoiser(VE), q.denoiser(VE), VE, ts, x_T, solver=solvers.euler()
        )
    )
    found = [[measure(p, q) for q in laws] for p in laws]
    distance = np.array([[d.distance for d in row] for row in found])
    assert (np.diag(distance) == 0).all() and float(found[0][0].std_error) == 0
    np.testing.assert_allclose(distance, distance.T, rtol=1e-5)
    assert (distance[~np.eye(3, dtype=bool)] > 0.5).all()
    for i in range(3):
        assert (distance[i] <= distance[i, :, None] + distance + 1e-5).all()


def test_does_not_depend_on_batches_and_devices(key):
    ts, p, q = schedules.karras_grid(6), gaussian(0).denoiser(VE), gaussian(1).denoiser(VE)
    run = lambda **options: jax.jit(
        lambda: generalization.probability_flow_distance(
            key, p, q, VE, ts, (37, DIM), solver=solvers.euler(), **options
        )
    )()
    split = run(batch_size=16, mesh=sharding.data_mesh(8))
    np.testing.assert_allclose(split, run(batch_size=64), rtol=1e-4)


def test_embedding_is_what_is_compared():
    a, b = jax.random.normal(jax.random.key(0), (2, 9, 4, 4, 1))
    total = lambda x: x.reshape(x.shape[0], -1).sum(1, keepdims=True)
    found = generalization.rms_distance(a, b, embed=total)
    sums = np.asarray(a).reshape(9, -1).sum(1), np.asarray(b).reshape(9, -1).sum(1)
    np.testing.assert_allclose(found.distance, np.sqrt(((sums[0] - sums[1]) ** 2).mean()), 1e-5)
    np.testing.assert_allclose(found.scale, np.sqrt((sums[0] ** 2).mean()), 1e-5)
    students = jnp.stack([a + 1, a - 1])  # errors of the sums: +16, -16
    parts = generalization.bias_variance(a, students, embed=total)
    np.testing.assert_allclose(parts, [256, -256, 512], rtol=1e-3)


def test_gradient_vanishes_where_the_models_agree(x64):
    a = jnp.ones((4, 3))
    grad = jax.grad(lambda b: generalization.rms_distance(a, b).distance)
    assert (np.asarray(grad(a)) == 0).all()
    np.testing.assert_allclose(grad(a + 1), np.full((4, 3), 1 / (4 * np.sqrt(3))), atol=1e-12)


def test_teacher_and_student(key):
    """A student that replays its data is on the optimum, and far from its teacher."""
    teacher, ts = mixture(0), schedules.karras_grid(72)
    train = teacher.sample(key, 16)[0]
    copy = Empirical(train).denoiser(VE)
    arguments, options = (copy, VE, ts, (40, 12)), {"solver": solvers.euler()}

    @jax.jit
    def measure():
        truth = teacher.denoiser(VE)
        gen = generalization.generalization_error(key, truth, *arguments, **options)
        return gen, generalization.memorization_error(key, train, *arguments, **options)

    gen, mem = measure()
    assert float(mem.distance) == 0 and 0.5 < float(gen.relative) < 2
    np.testing.assert_allclose(gen.scale, 2**0.5, rtol=0.2)
    norms = np.linalg.norm(train, axis=1)
    assert norms.min() <= mem.scale <= norms.max()


def test_bias_and_variance_of_fitted_means_have_the_closed_form():
    """Students N(m + delta, C), delta ~ N(b, tau^2 I): |b|^2 and n tau^2, at any number of them."""
    rng = np.random.default_rng(0)
    shift, tau, num_students, dim = np.array([0.6, 0.0, -0.3, 0.0]), 0.5, 2, 4
    teacher = rng.standard_normal((30, dim)).astype(np.float32)

    def group(key):
        delta = shift.astype(np.float32)[None] + tau * jax.random.normal(key, (num_students, dim))
        return generalization.bias_variance(teacher, teacher[None] + delta[:, None])

    found = jax.jit(jax.vmap(group))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(found.squared_error, found.squared_bias + found.variance, atol=1e-5)
    means = [np.mean(np.asarray(part, np.float64)) for part in found]
    errors = [np.std(np.asarray(part)) / np.sqrt(4000) for part in found]
    bias, variance = np.sum(shift**2), dim * tau**2
    for mean, error, expected in zip(means, errors, (bias + variance, bias, variance), strict=True):
        assert abs(mean - expected) < 4 * error
    naive = bias + variance / num_students  # the squared distance of the mean of two students
    assert abs(means[1] - naive) > 20 * errors[1]


def test_identity_of_bias_and_variance():
    """Mean of E_gen^2 = bias^2 + variance; the error of the mean student contains both."""
    rng, num_students = np.random.default_rng(0), 5
    true = rng.standard_normal((200, DIM))
    own = rng.standard_normal((num_students, 1, DIM)) / 5  # each student's shift and scale
    students = true * (1 + own) + own + 0.1
    parts = generalization.bias_variance(true, students)
    errors = [generalization.rms_distance(true, s).distance for s in students]
    np.testing.assert_allclose(parts.squared_error, np.mean(np.square(errors)), rtol=1e-5)
    np.testing.assert_allclose(parts.squared_bias + parts.variance, parts.squared_error, rtol=1e-5)
    mean_student = generalization.rms_distance(true, students.mean(0)).distance ** 2
    expected = parts.squared_bias + parts.variance / num_students
    np.testing.assert_allclose(mean_student, expected, rtol=1e-4)


def test_few_steps_of_the_stiff_flow_are_warned_about(key):
    train, student = jnp.eye(3), gaussian(0, 3).denoiser(VE)
    measure = lambda steps: jax.eval_shape(
        lambda: generalization.memorization_error(
            key, train, student, VE, schedules.karras_grid(steps), (4, 3)
        )
    )
    with pytest.warns(UserWarning, match="71 steps are few for the stiff flow"):
        measure(71)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(72)


def test_bad_input_is_refused(key):
    ts, p = schedules.karras_grid(3), gaussian(0).denoiser(VE)
    distance = lambda *args, **options: generalization.probability_flow_distance(
        key, p, p, VE, ts, *args, **options
    )
    ones = jnp.ones((4, DIM))
    with pytest.raises(ValueError, match=r"shape of b: expected that of a, \(4, 5\), got \(3, 5\)"):
        generalization.rms_distance(ones, ones[:3])
    with pytest.raises(ValueError, match=r"too few samples: expected \[b, \*data\] with b >= 2"):
        generalization.rms_distance(ones[:1], ones[:1])
    with pytest.raises(ValueError, match="b not finite: expected numbers, got 2 of 4"):
        generalization.rms_distance(ones, ones.at[1:3, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="x_T not finite"):
        distance(ones.at[0, 0].set(jnp.inf))
    with pytest.raises(ValueError, match="the solver draws noise: expected a deterministic"):
        distance((4, DIM), solver=solvers.ancestral())
    with pytest.raises(ValueError, match="wrong shape of x"):
        distance((4, DIM + 1))
    with pytest.raises(ValueError, match=r"wrong shape of train: expected \(any, 5\), got"):
        generalization.memorization_error(key, jnp.ones((9, 6)), p, VE, ts, (4, DIM))
    with pytest.raises(ValueError, match="train not finite: expected numbers, got 1 of 9"):
        train = jnp.ones((9, DIM)).at[3].set(jnp.nan)
        generalization.memorization_error(key, train, p, VE, ts, (4, DIM))
    with pytest.raises(ValueError, match="too few students: expected at least 2, got 1"):
        generalization.bias_variance(ones, ones[None])
    with pytest.raises(ValueError, match=r"wrong shape of students: expected \(any, 4, 5\)"):
        generalization.bias_variance(ones, jnp.ones((2, 3, DIM)))
