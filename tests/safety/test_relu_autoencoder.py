"""The closed form of the ReLU autoencoder against the true network, noise and gates included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import safety

SIGMA, DECAY = 0.2, 1e-3


def centred_points(num=5, dim=50):
    """The published check: d = 50, n = 5 centred points."""
    x = np.random.default_rng(0).normal(size=(num, dim))
    return x - x.mean(0)


def rich_clusters():
    """Two clusters of 200 around opposite means, deviations of rank 3, and 40 copies of a third."""
    draw = np.random.default_rng(1)
    axes = np.linalg.qr(draw.normal(size=(12, 8)))[0].T
    first, second = 6 * axes[:2]
    means = np.stack([first, second - first / 2, -second - first / 2])
    spread = axes[2:].reshape(2, 3, 12) * np.array([0.6, 0.4, 0.3])[:, None]
    tight = [means[k] + draw.normal(size=(200, 3)) @ spread[k] for k in range(2)]
    return [*tight, np.repeat(means[2:], 40, 0)]


def loss_of(weights, x, noise):
    """The denoising loss as it is defined, of untied ``(encoder, decoder)``, with noise drawn."""

    def one(example):
        y = example[None] + SIGMA * noise
        out = jax.nn.relu(y @ weights[0]) @ weights[1].T
        return jnp.mean(jnp.sum((out - example[None]) ** 2, axis=1))

    return jnp.mean(jax.lax.map(one, x)) + DECAY * sum(jnp.sum(w**2) for w in weights)


def solve(clusters, units, decay=DECAY):
    """The network, the codes of all examples and their images, as one program."""
    x = np.concatenate(clusters)

    def run(clusters):
        net = safety.relu_autoencoder(clusters, units, SIGMA, weight_decay=decay)
        return net, net.code(x), net(x)

    net, code, out = jax.jit(run)(list(clusters))
    return jax.tree.map(np.asarray, net), np.asarray(code), np.asarray(out)


def size(tree):
    return np.sqrt(sum(np.sum(np.asarray(w) ** 2) for w in tree))


def antithetic(num, dim):
    half = np.random.default_rng(2).normal(size=(num // 2, dim))
    return np.concatenate([half, -half])


def test_memorizing_optimum_is_stationary_with_the_published_loss(x64):
    """Check 21: gradient / parameter < 1 %, loss .049 against .040 and the decay."""
    x = centred_points()
    silent = np.zeros((50, 25))  # p = 30 units in all
    net, _, _ = solve(x[:, None], [1] * 5)
    weights = np.concatenate([net.weights, silent], axis=1)
    value, slope = jax.jit(jax.value_and_grad(loss_of))((weights, weights), x, antithetic(8000, 50))
    assert size(slope) < 0.01 * size((weights, weights))
    assert size((weights, weights)) == pytest.approx(3.16, abs=0.01)
    assert float(value) == pytest.approx(0.05, abs=0.001)
    decay = DECAY * 2 * np.sum(weights**2)
    assert float(value) == pytest.approx(float(net.loss) + decay, rel=0.02)


def test_memorizing_columns_and_spikes(x64):
    x = centred_points()
    net, code, _ = solve(x[:, None], [1] * 5)
    power = np.sum(x**2, axis=1)
    r = np.sqrt((power - 5 * DECAY) / (power**2 + SIGMA**2 * power))
    np.testing.assert_allclose(net.weights, (r[:, None] * x).T, rtol=1e-9)
    np.testing.assert_allclose(code.max(1) / code.sum(1), 1.0)
    free, _, _ = solve(x[:, None], [1] * 5, decay=0.0)
    expected = np.mean(SIGMA**2 * power / (SIGMA**2 + power))
    assert float(free.loss) == pytest.approx(expected, rel=1e-9) and expected < SIGMA**2


def test_blocks_are_wiener_filters_and_stationary(x64):
    clusters, units = rich_clusters(), [4, 3, 2]
    net, code, out = solve(clusters, units)
    assert net.separated
    starts = np.cumsum([0, *units])
    ends = np.cumsum([0, *map(len, clusters)])
    total = ends[-1]
    for k, x in enumerate(clusters):
        block = net.weights[:, starts[k] : starts[k + 1]]
        mine = ends[k] + np.arange(len(x))
        powers, frame = np.linalg.eigh(x.T @ x / len(x))
        powers, frame = powers[::-1][: units[k]], frame[:, ::-1][:, : units[k]]
        gain = np.maximum(powers - DECAY * total / len(x), 0) / (powers + SIGMA**2)
        np.testing.assert_allclose(block @ block.T, (frame * gain) @ frame.T, atol=1e-9)
        others = np.delete(code[mine], np.s_[starts[k] : starts[k + 1]], axis=1)
        assert (others == 0).all()
        np.testing.assert_allclose(out[mine], x @ block @ block.T, atol=1e-9)
    x = np.concatenate(clusters)
    pair = (net.weights, net.weights)
    value, slope = jax.jit(jax.value_and_grad(loss_of))(pair, x, antithetic(1000, 12))
    assert size(slope) < 0.01 * size(pair)
    decay = DECAY * 2 * np.sum(net.weights**2)
    assert float(value) == pytest.approx(float(net.loss) + decay, rel=0.02)


def test_copies_give_spikes_and_rich_clusters_balanced_codes():
    """The mixed regime: one network memorizes the copied example and generalizes on the rest."""
    clusters = rich_clusters()
    _, code, _ = solve(clusters, [4, 4, 4])
    share = code.max(1) / code.sum(1)
    copied = np.arange(len(code)) >= 400
    assert share[copied].min() > 1 - 1e-6 and share[~copied].max() < 0.5
    unit = code / np.linalg.norm(code, axis=1, keepdims=True)
    spread = np.asarray(safety.representation_spread(unit))
    assert float(safety.auroc(spread, copied)) == 1.0


def test_says_when_the_clusters_do_not_point_away_from_each_other():
    x = np.array([[[1.0, 0.1]], [[1.0, -0.1]]])
    assert not solve(x, [1, 1])[0].separated
    assert solve([x[0], -x[0]], [1, 2])[0].separated


@pytest.mark.parametrize(
    ("clusters", "units", "options", "match"),
    [
        ([], [], {}, "wrong number of num_units: expected one per cluster"),
        ([np.ones((2, 3))], [1, 1], {}, r"one per cluster, of which there are 1 .*got 2"),
        ([np.ones((2, 3)), np.ones((2, 4))], [1, 1], {}, r"wrong shape of cluster 1.*\(any, 3\)"),
        ([np.ones((0, 3))], [1], {}, "cluster 0 is empty"),
        ([np.ones((2, 3))], [4], {}, "too many units for cluster 0: expected at most the 3"),
        ([np.ones((2, 3))], [1], {"sigma": 0.0}, "sigma out of range"),
        ([np.ones((2, 3))], [1], {"weight_decay": -1.0}, "weight_decay out of range"),
    ],
)
def test_bad_input(clusters, units, options, match):
    options = {"sigma": 0.1} | options
    sigma = options.pop("sigma")
    with pytest.raises(ValueError, match=match):
        safety.relu_autoencoder(clusters, units, sigma, **options)
