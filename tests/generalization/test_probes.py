"""Probes against scikit-learn, the optimality conditions and a classifier known exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import data, distributions, generalization, linalg, schedules

SCHEDULE = schedules.VE()


@pytest.fixture(scope="module")
def digits():
    found = data.digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    x = found.images[order].reshape(-1, 64).astype(np.float32)
    return x, np.asarray(found.labels)[order].astype(np.int32)


fit = jax.jit(functools.partial(generalization.linear_probe, num_classes=10))


def test_linear_probe_is_the_logistic_regression_of_scikit_learn(digits):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = digits
    num, penalty = 600, 1e-2
    probe = fit(x[:num], y[:num], penalty=penalty)
    assert float(probe.gradient) < 1e-4
    mean, std = x[:num].mean(0), x[:num].std(0)
    z = (x - mean) / np.where(std > 0, std, 1)  # some pixels of the corners are always empty
    other = linear_model.LogisticRegression(C=1 / (penalty * num), tol=1e-6, max_iter=2000)
    other.fit(z[:num].astype(np.float64), y[:num])
    probabilities = jax.nn.softmax(probe(x[num:]))
    np.testing.assert_allclose(probabilities, other.predict_proba(z[num:]), atol=1e-3)
    accuracy = generalization.probe_accuracy(probe(x[num:]), y[num:])
    assert float(accuracy) == pytest.approx(other.score(z[num:], y[num:]), abs=2e-3)


def test_linear_probe_is_at_the_optimum(x64):
    """Zero gradient, by numpy, with an offset, a constant and two equal features; any units."""
    rng = np.random.default_rng(0)
    y, penalty = rng.integers(0, 3, 80), 1e-4
    h = rng.normal(size=(80, 5)) * [1, 10, 1e-3, 1, 1] + 100 + y[:, None]
    h[:, 4], h[:, 3] = 7, h[:, 0]
    probe = jax.jit(lambda h, y: generalization.linear_probe(h, y, 3, penalty=penalty))(h, y)
    weight, logits = np.asarray(probe.weight), np.asarray(probe(h))
    assert (weight[4] == 0).all()
    np.testing.assert_allclose(weight[0], weight[3])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[y]
    std = np.where(h.std(0) > 1e-9, h.std(0), 1)
    z = (h - h.mean(0)) / std
    gradient = z.T @ p / 80 + penalty * weight * std[:, None]
    np.testing.assert_allclose(gradient, 0, atol=1e-8)
    np.testing.assert_allclose(p.sum(0), 0, atol=1e-8)


def test_linear_probes_of_many_labellings_at_once(digits):
    """Under vmap each fit ends where it does alone; labels without meaning are told apart."""
    x, y = digits[0][:200], digits[1][:200]
    both = np.stack([y % 2, np.random.default_rng(0).integers(0, 2, 200)])
    one = functools.partial(generalization.linear_probe, x, num_classes=2, penalty=1e-2)
    probes = jax.jit(jax.vmap(one))(both)
    alone = jax.jit(one)(both[0])
    np.testing.assert_allclose(probes.weight[0], alone.weight, atol=1e-4)
    assert probes.gradient.max() < 1e-4


def test_neighbor_probe_is_that_of_scikit_learn(digits):
    sklearn = pytest.importorskip("sklearn.neighbors")
    x, y = digits
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    probe = jax.jit(functools.partial(generalization.neighbor_probe, num_classes=10, k=5))
    shares = probe(x[:600], y[:600])(x[600:900])
    other = sklearn.KNeighborsClassifier(5).fit(unit[:600], y[:600])
    np.testing.assert_allclose(shares, other.predict_proba(unit[600:900]), atol=1e-6)


def test_probe_of_energies_is_the_exact_classifier():
    """K = 2, d = 5, delta = .2: accuracies of the larger energy (papers, section 6.6)."""
    bases = linalg.random_frames(jax.random.key(0), 2, 12, 5, orthogonal=True)
    p = distributions.MoLRG.noisy(bases, 0.2)
    sigmas = [0.002, 0.296, 0.585, 1.09, 1.92]

    def energies(x_t, t):
        del t
        return jnp.sum(jnp.einsum("knd,bn->bkd", bases, x_t) ** 2, axis=-1)

    @jax.jit
    def run(key):
        x, labels = p.sample(key, 16_000)
        parts = (x[:4000], labels[:4000], x[4000:], labels[4000:])
        return generalization.probe_curve(
            key, energies, SCHEDULE, sigmas, *parts, num_classes=2, block=5000
        )

    curve = run(jax.random.key(1))
    np.testing.assert_allclose(curve.accuracy, [0.999, 0.984, 0.907, 0.731, 0.601], atol=0.012)
    np.testing.assert_allclose(curve.train_accuracy, curve.accuracy, atol=0.025)


def test_ensemble_beats_its_best_level_under_label_noise(digits):
    """Check 15, on what the exact denoiser of a Gaussian makes of noisy digits."""
    x, y = digits[0] / 127.5 - 1, digits[1]
    rng = np.random.default_rng(1)
    wrong = np.where(rng.random(600) < 0.4, rng.integers(0, 10, 600), y[:600]).astype(np.int32)
    denoise_fn = distributions.Gaussian.fit(x[:600]).denoiser(SCHEDULE)

    @jax.jit
    def run(key):
        return generalization.probe_curve(
            *(key, denoise_fn, SCHEDULE, [0.3, 0.4, 0.5, 0.6, 0.8]),
            *(x[:600], wrong, x[600:], y[600:], 10),
            fit=functools.partial(generalization.linear_probe, penalty=1e-2),
        )

    curve = run(jax.random.key(0))
    together = generalization.ensemble_scores(curve.scores, jnp.argmax(curve.accuracy))
    assert 0.5 < float(curve.accuracy.max()) < 0.9
    gain = generalization.probe_accuracy(together, y[600:]) - curve.accuracy.max()
    assert float(gain) > 0.01


def test_pooling_and_ensembles():
    h = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3)
    np.testing.assert_allclose(generalization.pool_features(h), h.mean((1, 2)))
    np.testing.assert_allclose(generalization.pool_features(h[0, 0]), h[0, 0])
    scores = np.arange(14.0).reshape(7, 2, 1)
    mean = lambda center: generalization.ensemble_scores(scores, center, 3)
    for center, used in ((0, [0, 1, 2]), (3, [2, 3, 4]), (6, [4, 5, 6])):
        np.testing.assert_allclose(mean(center), scores[used].mean(0))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda g, h, y: g.linear_probe(h, y + 1, 2), "labels out of range"),
        (lambda g, h, y: g.linear_probe(h, y[:2], 2), "wrong shape of labels"),
        (lambda g, h, y: g.linear_probe(h * jnp.inf, y, 2), "h not finite"),
        (lambda g, h, y: g.linear_probe(h, y, 2, penalty=0.0), "penalty"),
        (lambda g, h, y: g.neighbor_probe(h, y, 2, k=5), "at most the 4 examples"),
        (lambda g, h, y: g.neighbor_probe(h, y, 2, k=1)(h[:, :2]), "probe was fitted on"),
        (lambda g, h, y: g.ensemble_scores(h[:, None], 1, 5), "too few levels"),
        (
            lambda g, h, y: g.probe_curve(
                *(jax.random.key(0), lambda x, t: x, SCHEDULE, [0.0, 1.0]),
                *(h, y, h, y, 2),
            ),
            "leave out t = 0",
        ),
    ],
)
def test_bad_input(unchecked, call, match):
    h = jnp.arange(12.0).reshape(4, 3)
    with pytest.raises(ValueError, match=match):
        call(generalization, h, jnp.array([0, 1, 0, 1]))
