"""Class-signal-to-noise ratios against the energies' own law, published tables and numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import denoisers, distributions, generalization, linalg, networks, schedules

SCHEDULE = schedules.VE()
SIGMAS = np.array([0.002, 0.008, 0.023, 0.06, 0.14, 0.296, 0.585, 1.088, 1.923])
# (K, d, delta): the exact denoiser's ratio by Monte Carlo in float64 (papers, section 6.3).
TABLE = {
    (2, 5, 0.2): [25.1, 25.1, 25.4, 27.1, 36.3, 58.7, 21.8, 4.06, 1.62],
    (3, 5, 0.2): [12.4, 12.4, 12.5, 13.4, 18.0, 30.4, 13.1, 2.46, 0.82],
    (10, 5, 0.3): [1.23, 1.23, 1.24, 1.27, 1.45, 1.99, 1.81, 0.52, 0.17],
}
TRAINED = [24.88, 25.15, 26.95, 35.84, 58.27, 20.84, 4.05, 1.57]
"""Published for a trained autoencoder, K = 2, from sigma .008 on (Li et al. 2025, table 4)."""


def from_energies(num_classes, rank, delta, sigma, num=400_000):
    """The ratio from ``||U_l^T x||^2`` alone: independent multiples of chi-square numbers."""
    own, other = 1 + sigma**2, delta**2 + sigma**2
    energy = np.random.default_rng(0).chisquare(rank, size=(num // num_classes, num_classes))
    energy = energy * np.where(np.arange(num_classes) == 0, own, other)
    logit = energy * (1 / other - 1 / own) / 2
    w = np.exp(logit - logit.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True)
    kept = (delta**2 / other * (1 - w) + w / own) ** 2 * energy
    return kept[:, 0].sum() / kept[:, 1:].sum()


@pytest.mark.slow
@pytest.mark.parametrize("case", TABLE)
def test_exact_denoiser_follows_the_table(case):
    """Check 14: within 5 % of the table; n matters through K d <= n only."""
    expected = [from_energies(*case, sigma) for sigma in SIGMAS]
    np.testing.assert_allclose(expected, TABLE[case], rtol=0.05)
    num_classes, rank, delta = case
    bases = linalg.random_frames(
        jax.random.key(0), num_classes, num_classes * rank + 1, rank, orthogonal=True
    )
    p = distributions.MoLRG.noisy(bases, delta)

    @jax.jit
    def run(key):
        x, labels = p.sample(jax.random.fold_in(key, 1), 80_000 // num_classes)
        return generalization.denoiser_snr(
            key, p.denoiser(SCHEDULE), SCHEDULE, SIGMAS, x, labels, bases
        )

    found = run(jax.random.key(2))
    np.testing.assert_allclose(found.overall, expected, rtol=0.04)
    assert found.per_class.shape == (9, num_classes)
    np.testing.assert_allclose(found.per_class[:4].mean(1), expected[:4], rtol=0.03)
    if case == (2, 5, 0.2):
        np.testing.assert_allclose(expected[1:], TRAINED, rtol=0.05)


def test_closed_form_of_the_theory():
    """Values of papers, section 6.3; without noise 1 / ((K - 1) delta^2)."""
    table = [25.0, 25.0, 25.3, 27.2, 36.5, 73.3, 153, 7.8, 1.6]
    found = generalization.approximate_class_snr(SIGMAS, 2, 5, 0.2)
    np.testing.assert_allclose(found, table, rtol=0.01)
    for num_classes, delta in ((2, 0.2), (10, 0.3)):
        limit = generalization.approximate_class_snr(0.0, num_classes, 5, delta)
        assert float(limit) == pytest.approx(1 / ((num_classes - 1) * delta**2), rel=1e-5)


@pytest.mark.slow
def test_gated_features_have_the_ratio_of_the_output():
    """The tap of the low-rank network holds its output's coordinates, one block per class."""
    bases = linalg.random_frames(jax.random.key(0), 2, 10, 3, orthogonal=True)
    net = networks.make(
        "lowrank", data_shape=(10,), num_components=2, rank=3, joint=True, cross_std=0.3
    )
    params = {"bases": bases}
    blocks = jnp.eye(6).reshape(6, 2, 3).swapaxes(0, 1)

    @jax.jit
    def run(key):
        x, labels = distributions.MoLRG.noisy(bases, 0.3).sample(key, 2000)
        snr = functools.partial(
            generalization.denoiser_snr, key, schedule=SCHEDULE, ts=SIGMAS, x=x, labels=labels
        )
        tap = functools.partial(denoisers.features, net, params, SCHEDULE, taps="gated")
        output = snr(denoisers.from_network(net, params, SCHEDULE), bases=bases)
        return output, snr(tap, bases=blocks)

    output, gated = run(jax.random.key(1))
    np.testing.assert_allclose(gated.overall, output.overall, rtol=1e-3)
    np.testing.assert_allclose(gated.per_class, output.per_class, rtol=1e-3)


def test_real_features_against_numpy():
    """Unit length, mean removed, leading right singular vectors of each class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    h = rng.normal(size=(90, 2, 4)) + 3 * rng.normal(size=(3, 2, 4))[labels]
    z = h.reshape(90, 8) / np.linalg.norm(h.reshape(90, 8), axis=1, keepdims=True)
    z = z - z.mean(0)
    signal, total, bases = np.zeros(3), np.zeros(3), []
    for k in range(3):
        mine = z[labels == k]
        v = np.linalg.svd(mine, full_matrices=False)[2][:2].T
        bases.append(v @ v.T)
        signal[k], total[k] = np.sum((mine @ v) ** 2), np.sum(mine**2)
    h = jnp.asarray(h, jnp.float32)
    found = generalization.class_bases(h, labels, 3, rank=2)
    np.testing.assert_allclose(found @ found.swapaxes(1, 2), bases, atol=1e-4)
    snr = jax.jit(lambda h, labels: generalization.feature_snr(h, labels, 3, rank=2))(h, labels)
    np.testing.assert_allclose(snr.per_class, signal / (total - signal), rtol=1e-4)
    np.testing.assert_allclose(snr.overall, signal.sum() / (total - signal).sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda g, h: g.class_snr(h, jnp.array([0, 2]), jnp.ones((2, 3, 1))),
            "labels out of range",
        ),
        (lambda g, h: g.class_snr(h, jnp.array([0, 1]), jnp.ones((2, 4, 1))), "shape of bases"),
        (lambda g, h: g.feature_snr(h, jnp.array([0, 1]), 2, rank=4), "at most the 3 features"),
        (lambda g, h: g.approximate_class_snr(0.1, 1, 5, 0.2), "num_classes too small"),
        (lambda g, h: g.approximate_class_snr(0.1, 2, 5, 0.0), "cross_std"),
    ],
)
def test_bad_input(unchecked, call, match):
    with pytest.raises(ValueError, match=match):
        call(generalization, jnp.ones((2, 3)))
