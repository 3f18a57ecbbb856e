"""Intrinsic dimension against scikit-dimension, brute force, closed forms and measured tables."""

import csv
import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets

from experiments import intrinsic_dimension
from lowdim_diffusion import data, distributions, linalg, neighbors, schedules
from lowdim_diffusion.subspaces import dimension

# All of one shape, so that each estimator compiles once.


def gauss():
    g = np.random.default_rng(0)
    return g.standard_normal((300, 5)) @ g.standard_normal((5, 30))


def sphere():
    x = np.random.default_rng(1).standard_normal((300, 4))
    return np.pad(x / np.linalg.norm(x, axis=1, keepdims=True), ((0, 0), (0, 26)))


def pixels():
    g = np.random.default_rng(2)
    return np.tanh(g.standard_normal((300, 3)) @ g.standard_normal((3, 30))) * 255


def pairs():
    x = gauss()
    return np.concatenate([x[:280], x[:20]])


def crowd():
    """Pairs, and 30 equal points, more than any k below."""
    return np.concatenate([pairs()[10:280], np.repeat(pairs()[40:41], 30, axis=0)])


def compiled(fn, *args, **options):
    """Compiled whole: op by op costs several times as much."""
    return _jitted(fn, tuple(sorted(options.items())))(*args)


@functools.cache
def _jitted(fn, options):
    return jax.jit(lambda *args: fn(*args, **dict(options)))


# scikit-dimension 0.5.0 (numpy 2.4.6, scipy 1.17.1) on the three sets above:
# MLE(unbiased=normalizer == "k-2").fit(x, n_neighbors=k, comb="mle" or "mean"), TwoNN(...).fit(x),
# lPCA(ver, alphaRatio=0.95).fit_transform_pw(x, n_neighbors=60).mean(), lPCA(...).fit(x).
SCIKIT_DIMENSION = {
    gauss: {
        "mle": (4.734653236233456, 4.8702397825143375, 4.329102028901634),
        "mean": (5.501860325051926, 4.890542511157267),
        "pointwise": (3.8968662471506113, 4.376385298816979, 4.99840215513256),
        "two_nn": (4.573135415191521, 4.622726572706634, 4.734786578112573, 4.5485853149927316),
        "local_pca": (5.0, 4.996666666666667, 4.3995923241813095),
        "global_pca": (5.0, 5.0, 3.970066835397658),
    },
    sphere: {
        "mle": (2.9853865610037524, 2.9936753874617077, 2.6610447888548516),
        "mean": (3.3589180206419678, 2.9857049072373045),
        "pointwise": (1.4880710354812001, 5.442826490086696, 3.442609605177459),
        "two_nn": (2.828000646411396, 2.844393458531061, 2.8974566706165463, 2.839985289236528),
        "local_pca": (3.993333333333333, 3.0233333333333334, 3.075371954745367),
        "global_pca": (4.0, 4.0, 3.959850605682348),
    },
    pixels: {
        "mle": (2.728606806146205, 2.806275794180431, 2.494467372604828),
        "mean": (3.160533487522484, 2.809363100019987),
        "pointwise": (2.322803566238238, 2.4222843990761485, 3.8635750477362754),
        "two_nn": (3.0349225676884193, 3.0022417424183985, 3.049848031934603, 3.070353537801027),
        "local_pca": (3.86, 4.97, 2.8987648791036156),
        "global_pca": (3.0, 5.0, 3.2757366184785703),
    },
}


def all_variants(x):
    """In the order of the table."""
    near = dimension.neighbors(x, 20)
    rules = ("fo", "ratio", "participation")
    return {
        "mle": (*dimension.mle(near, (20, 10)), dimension.mle(near, 10, normalizer="k-2")),
        "mean": (
            dimension.mle(near, 10, average="mean", normalizer="k-1"),
            dimension.mle(near, 10, average="mean"),
        ),
        "pointwise": dimension.mle(near, 10, average=None)[:3],
        "two_nn": (
            dimension.two_nn(near),
            dimension.two_nn(near, discard=0.3),
            dimension.two_nn(near, method="unbiased"),
            dimension.two_nn(near, method="unbiased", discard=0.1),
        ),
        "local_pca": tuple(dimension.local_pca(x, 60, rule=rule) for rule in rules),
        "global_pca": tuple(dimension.global_pca(x, rule=rule) for rule in rules),
    }


@pytest.mark.parametrize("make", SCIKIT_DIMENSION)
def test_equals_scikit_dimension(x64, make):
    for name, values in compiled(all_variants, jnp.asarray(make())).items():
        expected = SCIKIT_DIMENSION[make][name]
        np.testing.assert_allclose(values, expected, rtol=1e-9, err_msg=name)


# --- Brute force ---------------------------------------------------------------------------------


def sorted_distances(x):
    """Distances to the others, ascending, float64, row by row."""
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    return np.stack([np.sort(np.delete(row, i)) for i, row in enumerate(d)])


def brute_mle(x, k, average, lost):
    """Zero distances dropped, then the textbook formula for what is left of each point."""
    sums, counts = [], []
    for row in sorted_distances(x):
        t = row[:k]
        t = t[t > 0]
        if len(t) > lost:
            sums.append(np.log(t[-1] / t[:-1]).sum())
            counts.append(len(t) - lost)
    sums, counts = np.asarray(sums), np.asarray(counts)
    return counts.sum() / sums.sum() if average == "inverse" else (counts / sums).mean()


def brute_two_nn(x, discard):
    d = sorted_distances(x)
    mu = np.sort(d[d[:, 0] > 0][:, 1] / d[d[:, 0] > 0][:, 0])
    m = int(len(mu) * (1 - discard))
    log_mu, share = np.log(mu[:m]), np.arange(1, m + 1) / len(mu)
    return np.linalg.lstsq(log_mu[:, None], -np.log(1 - share), rcond=None)[0][0]


VARIANTS = [
    (k, average, normalizer)
    for k in (3, 12)
    for average in ("inverse", "mean")
    for normalizer in ("k-1", "k-2")
]


def each_variant(x):
    return [dimension.mle(x, k, average=a, normalizer=b) for k, a, b in VARIANTS]


def each_two_nn(x):
    return (
        dimension.two_nn(x),
        dimension.two_nn(x, discard=0.5),
        dimension.two_nn(x, method="ml"),
        dimension.two_nn(x, method="ml", discard=0.25),
    )


@pytest.mark.parametrize("make", [pixels, pairs, crowd])
def test_mle_agrees_with_brute_force(make):
    x = make().astype(np.float32)
    got = compiled(each_variant, compiled(dimension.neighbors, x, k=12))
    for (k, average, normalizer), value in zip(VARIANTS, got, strict=True):
        few = make is pairs and (k, normalizer) == (3, "k-1")
        if average == "mean" and (make is crowd or few):
            assert np.isnan(value)  # all neighbours of some point are copies of one another
        else:
            expected = brute_mle(x, k, average, 1 if normalizer == "k-1" else 2)
            np.testing.assert_allclose(value, expected, rtol=2e-5)


@pytest.mark.parametrize("make", [pixels, crowd])
def test_two_nn_agrees_with_brute_force(make):
    x = make().astype(np.float32)
    fit, half, likely, censored = compiled(each_two_nn, compiled(dimension.neighbors, x, k=12))
    np.testing.assert_allclose(fit, brute_two_nn(x, 0.1), rtol=2e-5)
    np.testing.assert_allclose(half, brute_two_nn(x, 0.5), rtol=2e-5)
    d = sorted_distances(x)
    log_mu = np.sort(np.log(d[d[:, 0] > 0][:, 1] / d[d[:, 0] > 0][:, 0]))
    np.testing.assert_allclose(likely, len(log_mu) / log_mu.sum(), rtol=2e-5)
    m = int(len(log_mu) * 0.75)
    expected = m / (log_mu[:m].sum() + (len(log_mu) - m) * log_mu[m - 1])
    np.testing.assert_allclose(censored, expected, rtol=2e-5)


def test_two_nn_by_hand():
    """Points 0, 1, 3, 7 of a line: T_2 / T_1 = 3/1, 2/1, 3/2, 6/4; without the largest, i/N < 1."""
    x = np.array([[0.0], [1.0], [3.0], [7.0]])
    log_mu = np.log([1.5, 1.5, 2.0])
    rise = -np.log([0.75, 0.5, 0.25])
    slope = log_mu @ rise / (log_mu @ log_mu)

    @jax.jit
    def run(x):  # "fit" never uses the very last, where 1 - i/N = 0
        return dimension.two_nn(x), dimension.two_nn(x, discard=0), dimension.two_nn(x, method="ml")

    np.testing.assert_allclose(run(x), [slope, slope, 4 / np.log(13.5)], rtol=1e-6)


@pytest.mark.parametrize("k", [12, 50])
def test_local_and_global_pca_agree_with_numpy(k):
    """Fewer neighbours than coordinates and more, by numpy.cov and a plain search."""
    g = np.random.default_rng(4)
    x = (g.standard_normal((80, 25)) * np.linspace(1, 0.1, 25)).astype(np.float32)
    settings = (("fo", 0.2), ("ratio", 0.8), ("participation", None))

    def counts(points):
        var = np.linalg.eigvalsh(np.cov(np.asarray(points, np.float64).T))[::-1]
        share = np.cumsum(var) / var.sum()
        fo = (var > 0.2 * var[0]).sum()
        return fo, np.searchsorted(share, 0.8) + 1, var.sum() ** 2 / (var**2).sum()

    @jax.jit
    def run(x):
        each = [
            dimension.local_pca(x, k, rule=rule, threshold=threshold, average=None)
            for rule, threshold in settings
        ]
        mean = dimension.local_pca(x, k, rule="participation")
        whole = [dimension.global_pca(x, rule=r, threshold=threshold) for r, threshold in settings]
        return jnp.stack(each), mean, jnp.stack(whole)

    d = ((x[:, None].astype(np.float64) - x[None]) ** 2).sum(-1)
    np.fill_diagonal(d, np.inf)
    expected = np.array([counts(x[np.argsort(row)[:k]]) for row in d]).T
    each, mean, whole = run(x)
    np.testing.assert_allclose(each, expected, rtol=1e-4)
    np.testing.assert_allclose(mean, expected[2].mean(), rtol=1e-4)
    np.testing.assert_allclose(whole, counts(x), rtol=1e-4)


def test_neighbors_leaves_out_the_point_itself_but_not_its_copies():
    x = crowd().astype(np.float32)
    near = compiled(dimension.neighbors, x, k=12)
    rows = np.arange(len(x))[:, None]
    assert not np.any(np.asarray(near.index) == rows)
    np.testing.assert_allclose(near.distance, sorted_distances(x)[:, :12], rtol=1e-5, atol=1e-6)
    again = np.linalg.norm(x[rows] - x[np.asarray(near.index)], axis=-1)
    np.testing.assert_allclose(near.distance, again, rtol=1e-5)
    assert float((near.distance == 0).sum(1).max()) == 12


# --- What the normalisers mean -------------------------------------------------------------------


def test_the_four_normalisers_on_independent_exponentials(x64):
    """Rates (T_j / T_k)^d uniform, as theory has it: two are unbiased, two miss by (k-1)/(k-2)."""
    g, d, k, num = np.random.default_rng(5), 7, 4, 60_000
    t = np.sort(g.random((num, k)), axis=1)
    t[:, :-1] = np.sort(g.random((num, k - 1)), axis=1) * t[:, -1:]
    near = neighbors.Nearest(jnp.asarray(t ** (1 / d)), jnp.full((num, k), num))

    def get(average, normalizer):
        return float(compiled(dimension.mle, near, k=k, average=average, normalizer=normalizer))

    assert get("inverse", "k-1") == pytest.approx(d, rel=0.01)  # 4 standard errors
    assert get("mean", "k-2") == pytest.approx(d, rel=0.02)
    assert get("mean", "k-1") == pytest.approx(d * 3 / 2, rel=0.02)
    assert get("inverse", "k-2") == pytest.approx(d * 2 / 3, rel=0.01)
    assert get("inverse", None) == get("inverse", "k-1")
    assert get("mean", None) == get("mean", "k-2")
    each = compiled(dimension.mle, near, k=k, average=None)
    np.testing.assert_allclose(each.mean(), get("mean", "k-2"), rtol=1e-12)
    several = compiled(dimension.mle, near, k=(2, 4, 3))
    assert several.shape == (3,) and float(several[1]) == get("inverse", "k-1")
    assert compiled(dimension.mle, near, k=(3, 4), average=None).shape == (2, num)


# --- Hostile data --------------------------------------------------------------------------------

ESTIMATES = {
    "mle": lambda x: dimension.mle(x, 8),
    "mle_mean": lambda x: dimension.mle(x, 8, average="mean"),
    "two_nn": dimension.two_nn,
    "local_pca": lambda x: dimension.local_pca(x, 20, rule="participation"),
    "global_pca": lambda x: dimension.global_pca(x, rule="participation"),
}


def small():
    g = np.random.default_rng(6)
    return (g.standard_normal((100, 4)) @ g.standard_normal((4, 25))).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATES)
def test_an_offset_a_unit_an_order_or_a_shape_changes_nothing(name):
    """One program for all of them."""
    x = small()
    run = jax.jit(chex.assert_max_traces(ESTIMATES[name], 1))
    chex.clear_trace_counter()
    expected = run(x)
    assert expected.shape == () and expected.dtype == jnp.float32
    shifted = x + np.float32(1e4)
    base = shifted - np.float32(1e4)  # exact: the rounding by the offset is in both
    np.testing.assert_allclose(run(shifted), run(base), rtol=1e-4)
    np.testing.assert_allclose(run(shifted), expected, rtol=2e-3)
    np.testing.assert_allclose(run(3 * x[::-1]), expected, rtol=1e-4)
    for unit in (1e-30, 1e30):
        np.testing.assert_allclose(run(x * np.float32(unit)), expected, rtol=1e-4)
    pictures = np.round(30 * x + 128).clip(0, 255).astype(np.uint8)
    stack = jnp.stack([pictures, pictures[::-1]]).reshape(2, 100, 5, 5, 1)
    both = jax.jit(jax.vmap(ESTIMATES[name]))(stack)
    np.testing.assert_allclose(both, run(pictures.astype(np.float32)), rtol=1e-4)


def test_float64_data_are_centred_before_they_become_float32():
    x = small().astype(np.float64)
    expected = compiled(dimension.mle, x, k=8)
    np.testing.assert_allclose(dimension.mle(x + 1e6, 8), expected, rtol=1e-4)
    half = compiled(dimension.mle, x.astype(np.float16), k=8)
    assert half.dtype == jnp.float32 and abs(float(half / expected) - 1) < 0.01


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_whole_numbers_far_from_zero_are_exact(dtype):
    """2^30 (2^60) beyond what float32 resolves; and differences that overflow the type."""
    x = np.round(1000 * small()).astype(np.int64)
    expected = compiled(dimension.mle, x.astype(np.float32), k=8)
    far = (x + (2**60 if dtype.endswith("64") else 2**30)).astype(dtype)
    np.testing.assert_allclose(dimension.mle(far, 8), expected, rtol=1e-4)
    if dtype == "int32":
        np.testing.assert_allclose(
            compiled(dimension.mle, jnp.asarray(far), k=8), expected, rtol=1e-4
        )
        wide = (x * (2**31 // np.abs(x).max())).astype(dtype)
        np.testing.assert_allclose(dimension.mle(wide, 8), expected, rtol=1e-3)


def test_estimates_are_differentiable(x64):
    x = jnp.asarray(np.concatenate([small()[:40], small()[:3]]), jnp.float64)  # with copies
    v = jnp.asarray(np.random.default_rng(0).standard_normal(x.shape))
    v = v.at[-3:].set(v[:3])  # copies stay copies

    @jax.jit
    def both(x):
        return jnp.stack([ESTIMATES["mle"](x), ESTIMATES["mle_mean"](x), dimension.two_nn(x)])

    slope = (both(x + 1e-6 * v) - both(x - 1e-6 * v)) / 2e-6
    grads = jax.jit(jax.jacrev(both))(x)
    assert jnp.isfinite(grads).all()
    np.testing.assert_allclose(jnp.sum(grads * v[None], axis=(1, 2)), slope, rtol=1e-5)


def test_flat_data_have_exactly_their_dimension():
    g = np.random.default_rng(7)
    plane = (g.random((100, 2)) @ g.standard_normal((2, 25))).astype(np.float32)
    local = lambda x, rule: dimension.local_pca(x, 20, rule=rule, threshold=0.9999)

    @jax.jit
    def run(x):
        return local(x, "ratio"), dimension.global_pca(x, threshold=1e-6)

    assert run(plane) == (2, 2)
    assert run(np.ones_like(plane)) == (0, 0)
    for rule in ("fo", "ratio", "participation"):
        assert float(compiled(dimension.global_pca, np.ones_like(plane), rule=rule)) == 0


@pytest.mark.slow
def test_data_without_an_estimate_are_an_error_not_a_number():
    grid = np.stack(np.meshgrid(*[np.arange(6.0)] * 2), -1).reshape(-1, 2)
    same = np.ones_like(grid)
    find = lambda x: compiled(dimension.neighbors, x, k=8)
    with pytest.raises(ValueError, match=r"mle: no estimate: expected .*unique"):
        dimension.mle(same, 3)
    with pytest.raises(ValueError, match=r"two_nn: no estimate: expected .*unique"):
        dimension.two_nn(find(same))
    assert np.isnan(jax.jit(dimension.mle, static_argnums=1)(find(same), 3))
    assert np.isnan(jax.jit(dimension.two_nn)(find(same)))
    holed = np.where(np.arange(36)[:, None] == 7, np.nan, grid)

    @jax.jit
    def run(x):  # values cannot raise
        near = dimension.neighbors(x, 8)
        local = dimension.local_pca(x, 8, rule="ratio")
        return dimension.mle(near, 8), dimension.two_nn(near), local, dimension.global_pca(x)

    assert np.isnan(run(holed)).all() and np.isfinite(run(grid + 0.1 * grid**2)[0])
    for average in ("inverse", "mean", None):
        with pytest.raises(ValueError, match=r"no estimate: expected .*unique"):
            dimension.mle(find(same), 3, average=average)
    for method in ("fit", "ml"):
        with pytest.raises(ValueError, match="no estimate"):
            dimension.two_nn(find(grid), method=method)  # T_1 = T_2 everywhere
    with pytest.raises(ValueError, match='average="inverse"'):
        dimension.mle(find(grid), 3, average="mean")  # inside, all three are at distance 1
    assert np.isfinite(dimension.mle(find(grid), 3))  # the edge has others
    doubled = find(np.concatenate([grid[:18] ** 1.5] * 2))
    assert 1 < float(dimension.mle(doubled, 8)) < 3
    with pytest.raises(ValueError, match="no estimate"):
        dimension.two_nn(doubled)


def test_bad_arguments_are_refused(unchecked):
    x = small()
    for k in (100, 500):
        with pytest.raises(ValueError, match=f"too few points: expected more than the {k}"):
            dimension.mle(x, k)
    near = compiled(dimension.neighbors, x, k=99)
    assert np.isfinite(dimension.mle(near, 99))
    for bad in (
        lambda: dimension.mle(x[:1]),
        lambda: dimension.two_nn(x[:2]),
        lambda: dimension.local_pca(x[:50]),
        lambda: dimension.neighbors(x[:3], 3),
        lambda: dimension.global_pca(x[:1]),
    ):
        with pytest.raises(ValueError, match="too few points"):
            bad()
    for value in (np.nan, np.inf):
        for estimate in ESTIMATES.values():
            with pytest.raises(ValueError, match="NaN or infinity in 1 of 100 examples"):
                estimate(np.where(np.arange(100)[:, None] == 3, value, x))
    for empty in (x[:0], x[:, :0], x[:, 0], np.float32(1)):
        with pytest.raises(ValueError, match=r"wrong shape of x: expected \[N, \*data\]"):
            dimension.mle(empty)
    with pytest.raises(ValueError, match="k too small: expected at least 2"):
        dimension.mle(x, 1)
    with pytest.raises(ValueError, match="k too small: expected at least 3"):
        dimension.mle(x, (5, 2), normalizer="k-2")
    with pytest.raises(ValueError, match="no k"):
        dimension.mle(x, ())
    with pytest.raises(TypeError, match="k must be an int"):
        dimension.mle(x, (5, 2.5))
    with pytest.raises(ValueError, match="unknown average"):
        dimension.mle(x, average="median")
    with pytest.raises(ValueError, match="unknown normalizer"):
        dimension.mle(x, normalizer="k")
    with pytest.raises(ValueError, match="unknown method"):
        dimension.two_nn(x, method="linear")
    with pytest.raises(ValueError, match="discard out of range"):
        dimension.two_nn(x, discard=1.0)
    with pytest.raises(ValueError, match="no estimate"):
        dimension.two_nn(near, discard=0.99)
    with pytest.raises(ValueError, match="unknown rule"):
        dimension.local_pca(x, 20, rule="Fan")
    with pytest.raises(ValueError, match="threshold out of range"):
        dimension.global_pca(x, rule="ratio", threshold=95)
    with pytest.raises(ValueError, match="None, it has none"):
        dimension.local_pca(x, 20, rule="participation", threshold=0.5)
    with pytest.raises(ValueError, match="too few neighbours: expected at least 100, got 99"):
        dimension.mle(near, 100)
    with pytest.raises(ValueError, match="points that are their own"):
        dimension.mle(neighbors.Nearest(near.distance, jnp.arange(99)[None] + 0 * near.index))


# --- Measured tables -----------------------------------------------------------------------------


def on_sphere(g, d):
    x = g.standard_normal((2000, d + 1))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def in_subspaces(g, n, num_components, d, orthogonal=True):
    if orthogonal:
        q = np.linalg.qr(g.standard_normal((n, num_components * d)))[0]
        bases = q.reshape(n, num_components, d).transpose(1, 0, 2)
    else:
        bases = np.linalg.qr(g.standard_normal((num_components, n, d)))[0]
    labels = g.integers(num_components, size=2000)
    return np.einsum("bnd,bd->bn", bases[labels], g.standard_normal((2000, d)))


# metrics.md, section 3, N = 2000, mean over 5 seeds (numpy, scipy and scikit-dimension):
# MLE k=10 inverse k-1, k=20 inverse k-1, k=20 mean k-2, TwoNN fit, TwoNN ML, global PCA FO,
# local PCA FO with 100 neighbours.
SYNTHETIC = {
    "sphere 2": (lambda g: on_sphere(g, 2), (2.00, 1.99, 1.99, 1.97, 1.96, 3, 2.00)),
    "sphere 10": (lambda g: on_sphere(g, 10), (9.10, 8.94, 8.93, 9.29, 9.34, 11, 10.71)),
    "cube 5": (
        lambda g: g.random((2000, 5)) @ np.linalg.qr(g.standard_normal((20, 5)))[0].T,
        (4.51, 4.47, 4.48, 4.60, 4.62, 5, 5),
    ),
    "MoLRG 48 2 6": (lambda g: in_subspaces(g, 48, 2, 6), (5.90, 5.85, 5.88, 6.14, 6.10, 12, 6.30)),
    "MoLRG 48 3 6": (
        lambda g: in_subspaces(g, 48, 3, 6, orthogonal=False),
        (5.91, 5.81, 5.83, 6.02, 6.01, 18, 7.64),
    ),
    "MoLRG 100 4 10": (
        lambda g: in_subspaces(g, 100, 4, 10),
        (8.93, 8.56, 8.55, 9.59, 9.58, 40, 14.3),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_table(name):
    make, expected = SYNTHETIC[name]

    @jax.jit
    def row(x):
        near = dimension.neighbors(x, 20)
        return jnp.stack(
            [
                *dimension.mle(near, (10, 20)),
                dimension.mle(near, average="mean"),
                dimension.two_nn(near),
                dimension.two_nn(near, method="ml"),
                dimension.global_pca(x),
            ]
        )

    sets = [jnp.asarray(make(np.random.default_rng(seed))) for seed in range(5)]
    rows = np.stack([row(x) for x in sets])
    # Five other seeds: within four standard errors of the difference, and the table's rounding.
    error = 4 * np.sqrt(2 / 5) * rows.std(0, ddof=1) + 0.01 * rows.mean(0)
    assert np.all(np.abs(rows.mean(0) - expected[:-1]) < error), rows.mean(0)
    # One seed: it varies little, and many small eigenproblems are slow on a busy machine.
    local = compiled(dimension.local_pca, sets[0])
    assert float(local) == pytest.approx(expected[-1], rel=0.05)


def images(root, name, num, split="test"):
    x = data.load(root / name, split=split, num_examples=num).images
    return x.reshape(num, -1).astype(np.float32) / 255


def test_real_digits_agree_with_brute_force():
    """Ties abound: whole numbers from 0 to 16."""
    x = sklearn.datasets.load_digits().data[:300]
    near = compiled(dimension.neighbors, x.astype(np.uint8), k=20)
    got = compiled(dimension.mle, near), compiled(dimension.mle, near, average="mean")
    expected = brute_mle(x, 20, "inverse", 1), brute_mle(x, 20, "mean", 2)
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    np.testing.assert_allclose(compiled(dimension.two_nn, near), brute_two_nn(x, 0.1), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected", "pca"),
    [
        ("mnist", (11.93, 11.58, 13.49, 13.21, 13.25), (84, 141, 296, 31.06)),
        ("fashion-mnist", (11.59, 10.61, 12.19, 14.02, 13.55), (75, 159, 386, 7.63)),
    ],
)
def test_first_2000_test_images(data_root, name, expected, pca):
    """metrics.md, section 3: float64, exact distances; here float32."""
    x = images(data_root, name, 2000)
    near = jax.jit(lambda x: dimension.neighbors(x, 20))(x)
    got = (
        *dimension.mle(near, (10, 20)),
        dimension.mle(near, average="mean"),
        dimension.two_nn(near),
        dimension.two_nn(near, method="ml"),
    )
    np.testing.assert_allclose(got, expected, atol=0.0051)
    counts = [dimension.global_pca(x, rule="ratio", threshold=q) for q in (0.9, 0.95, 0.99)]
    np.testing.assert_array_equal(counts, pca[:3])
    ratio = dimension.global_pca(x, rule="participation")
    np.testing.assert_allclose(ratio, pca[3], atol=0.0051)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Extended Yale B", "COIL-20"])
def test_faces_and_objects(data_root, name, monkeypatch):
    """metrics.md, section 3: every estimate that has a reference there, to its printed digits."""
    monkeypatch.setattr(intrinsic_dimension, "FOLDERS", {name: intrinsic_dimension.FOLDERS[name]})
    preset = intrinsic_dimension.PRESETS["cpu"]._replace(num_local=300)
    x = intrinsic_dimension.image_sets(data_root, preset)[name, ""]
    rows = intrinsic_dimension.sample_estimates(name, "", x, preset)
    pairs = [(row.estimate, row.reference) for row in rows if row.reference is not None]
    assert len(pairs) == 9
    np.testing.assert_allclose(*np.transpose(pairs), atol=0.0051)


@pytest.mark.slow
def test_mnist_by_digit_and_the_published_normaliser(data_root):
    """metrics.md: per digit of the test set; Pope's k-2 at k = 3 is half of the unbiased value."""
    loaded = data.load(data_root / "mnist", split="test")
    x = loaded.images.reshape(10_000, -1).astype(np.float32) / 255
    expected = (11.16, 7.84, 12.83, 13.63, 11.66, 12.74, 11.02, 10.51, 14.26, 11.35)
    got = [float(dimension.mle(x[loaded.labels == digit])) for digit in range(10)]
    np.testing.assert_allclose(got, expected, atol=0.0051)
    near = dimension.neighbors(x, 3)
    ratio = dimension.mle(near, 3, normalizer="k-2") / dimension.mle(near, 3)
    assert float(ratio) == pytest.approx(0.5, rel=1e-6)


# --- Denoisers -----------------------------------------------------------------------------------


def union(dtype):
    """Ranks 3, 6, 9 in R^50, variances .5 to 2, means of length 3: related_systems.md's G50."""
    bases = np.zeros((3, 50, 9))
    scales = np.zeros((3, 9))
    g = np.random.default_rng(0)
    for i, d in enumerate((3, 6, 9)):
        bases[i] = np.linalg.qr(g.standard_normal((50, 9)))[0]
        scales[i, :d] = np.sqrt(np.linspace(0.5, 2, d))
    means = g.standard_normal((3, 50))
    means *= 3 / np.linalg.norm(means, axis=1, keepdims=True)
    as_type = lambda a: jnp.asarray(a, dtype)
    p = distributions.MoLRG(as_type(bases), means=as_type(means), scales=as_type(scales))
    x, labels = jax.jit(lambda key: p.sample(key, 30))(jax.random.key(1))
    return p, x, jnp.asarray([3, 6, 9])[labels]


def test_flipd_of_one_gaussian_in_closed_form(x64):
    """metrics.md: d / (1 + sigma^2) + sigma^2 ||x||^2 / (1 + sigma^2)^2 under VE."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 4)))[0]
    p = distributions.MoLRG(jnp.asarray(basis)[None])
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4)) @ basis.T)
    ve = schedules.VE()
    run = jax.jit(lambda t: dimension.flipd(p.denoiser(ve), ve, x, t))
    for sigma in (jnp.full(3, 1e-3), jnp.asarray([0.3, 1.0, 30.0])):  # one per example
        expected = 4 / (1 + sigma**2) + sigma**2 * (x**2).sum(1) / (1 + sigma**2) ** 2
        np.testing.assert_allclose(run(sigma), expected, rtol=1e-9)
    np.testing.assert_allclose(run(1e-3), run(jnp.full(3, 1e-3)), rtol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "t"),
    [(schedules.VPLinear(), 0.2), (schedules.VPCosine(), 0.5), (schedules.RectifiedFlow(), 0.7)],
)
def test_flipd_is_its_definition_from_the_score(x64, schedule, t):
    """n + sigma^2 (div s + ||s||^2) by differentiating the exact score, a noise floor included."""
    g = np.random.default_rng(2)
    bases = jnp.asarray(np.linalg.qr(g.standard_normal((2, 8, 3)))[0])
    p = distributions.MoLRG(bases, noise_std=0.1, means=jnp.asarray(g.standard_normal((2, 8))))
    x = jnp.asarray(g.standard_normal((4, 2, 2, 2)))  # images
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    score = lambda y: p.score(y[None], alpha, sigma)[0]

    def definition(x):
        y = alpha * x.reshape(-1)
        divergence = jnp.trace(jax.jacfwd(score)(y))
        return 8 + sigma**2 * (divergence + jnp.sum(score(y) ** 2))

    flipd = lambda x: dimension.flipd(p.denoiser(schedule), schedule, x, t, chunk=3)
    got, expected = jax.jit(lambda x: (flipd(x), jax.vmap(definition)(x)))(x)
    np.testing.assert_allclose(got, expected, rtol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)])
def test_denoiser_estimates_of_a_union_of_three_dimensions(x64, dtype):
    """related_systems.md, 7.5: mean absolute error of FLIPD .48, .11, .03, .008; normal bundle
    right for .07, .35, .80, 1.00 of the points; Jacobian for all of them."""
    p, x, true = union(dtype)
    ve = schedules.VE()
    denoise_fn = p.denoiser(ve)

    @jax.jit
    def run(t):
        flipd = dimension.flipd(denoise_fn, ve, x, t)
        normal = dimension.normal_bundle(jax.random.key(0), denoise_fn, ve, x, t)
        above = dimension.jacobian_rank(denoise_fn, ve, x, t, rule="above")
        return flipd, normal, above

    for t, error, share in ((0.5, 0.48, 0.07), (0.1, 0.03, 0.80), (0.05, 0.008, 1.0), (1e-3, 0, 1)):
        flipd, normal, above = run(jnp.asarray(t, dtype))
        assert flipd.dtype == dtype and normal.dtype == above.dtype == jnp.int32
        assert float(jnp.abs(flipd - true).mean()) == pytest.approx(error, rel=0.35, abs=1e-5)
        assert float((normal == true).mean()) == pytest.approx(share, abs=0.15)
        assert float((above == true).mean()) >= 0.95
        if t <= 0.1:
            np.testing.assert_array_equal(above, true)
    np.testing.assert_allclose(flipd, true, atol=1e-4)  # sigma = 1e-3, float32 as well
    np.testing.assert_array_equal(normal, true)


@pytest.mark.slow
def test_hutchinson_is_unbiased_with_the_stated_variance(x64):
    p, x, _ = union(jnp.float64)
    ve, t, num = schedules.VE(), 0.4, 200
    x = x[:4]
    exact = jax.jit(lambda x: dimension.flipd(p.denoiser(ve), ve, x, t))(x)
    probe = lambda x, key: dimension.flipd(p.denoiser(ve), ve, x, t, num_probes=num, key=key)
    run = jax.jit(probe)
    got = run(x, jax.random.key(0))
    jacobian = np.asarray(p.posterior_jacobian(x, 1.0, t))
    off = jacobian * (1 - np.eye(50))
    std = np.sqrt(2 * (off**2).sum((1, 2)) / num)
    score = np.asarray(got - exact) / std
    assert np.abs(score).max() < 4
    assert np.abs(score).max() > 0.05  # it is an estimate
    spread = jnp.stack([run(x, jax.random.key(i)) for i in range(1, 9)]) - exact[None]
    assert 0.6 < float(jnp.sqrt((spread**2).mean()) / np.sqrt((std**2).mean())) < 1.5
    np.testing.assert_allclose(run(x[:2], jax.random.key(0)), got[:2], rtol=1e-12)


def test_one_sign_vector_is_exact_for_a_diagonal_jacobian():
    p = distributions.MoLRG(jnp.eye(6)[None, :, :2])
    ve, x = schedules.VE(), jnp.ones((3, 6)).at[:, 2:].set(0)
    run = jax.jit(
        lambda x, key: (
            dimension.flipd(p.denoiser(ve), ve, x, 0.1, num_probes=1, key=key),
            dimension.flipd(p.denoiser(ve), ve, x, 0.1),
        )
    )
    np.testing.assert_allclose(*run(x, jax.random.key(3)), rtol=1e-6)


def test_flipd_is_differentiable_and_maps(x64):
    p, x, _ = union(jnp.float64)
    ve, x = schedules.VE(), x[:2]
    curve = jax.jit(lambda x, t: dimension.flipd(p.denoiser(ve), ve, x, t, chunk=50).sum())
    grad = jax.jit(jax.grad(curve))(x, 0.5)
    v = jax.random.normal(jax.random.key(0), x.shape, x.dtype)
    slope = (curve(x + 1e-5 * v, 0.5) - curve(x - 1e-5 * v, 0.5)) / 2e-5
    np.testing.assert_allclose(jnp.sum(grad * v), slope, rtol=1e-6)
    ts = jnp.asarray([0.1, 0.5])
    expected = [curve(x, t) for t in ts]
    np.testing.assert_allclose(jax.jit(jax.vmap(curve, (None, 0)))(x, ts), expected, rtol=1e-9)


@pytest.mark.slow
def test_normal_bundle_spectrum_and_options(key):
    """Across the set the scaled scores are standard normal: singular values 1 +- sqrt((n-d)/m)."""
    basis = linalg.random_frames(key, 1, 20, 5)
    p = distributions.MoLRG(basis)
    schedule, t = schedules.VPLinear(), jnp.asarray([0.003, 0.004, 0.005])
    x = p.sample(key, 3)[0].reshape(3, 5, 4)
    denoise_fn = p.denoiser(schedule)

    def run(**options):
        call = lambda x: dimension.normal_bundle(
            key, denoise_fn, schedule, x, t, return_spectrum=True, **options
        )
        return jax.jit(call)(x)

    dims, s = run(num_scores=2000)
    assert dims.tolist() == [5, 5, 5] and s.shape == (3, 20)
    edge = np.sqrt(15 / 2000)
    assert 1 - 1.5 * edge < float(s[:, 14].min()) < float(s[:, 0].max()) < 1 + 1.5 * edge
    assert float(s[:, 15:].max()) < 0.15
    again, chunked = run(num_scores=2000, chunk=77)
    np.testing.assert_allclose(chunked, s, atol=1e-3)
    assert again.tolist() == [5, 5, 5]
    dims, s = run()
    assert dims.tolist() == [5, 5, 5]
    one = jax.jit(
        lambda x, t: dimension.normal_bundle(key, denoise_fn, schedule, x, t, return_spectrum=True)
    )(x[:1], t[:1])
    np.testing.assert_allclose(one[1], s[:1], atol=1e-3)  # small ones are rounding


def test_jacobian_rank_rules():
    """Of 60 equal values the energy rule counts 59: sqrt(58.8 / 60) = 0.99."""
    p = distributions.MoLRG(jnp.eye(64)[None, :, :60])
    schedule = schedules.VPLinear()
    x = jnp.ones((2, 64)).at[:, 60:].set(0)

    @jax.jit
    def ranks(t):
        settings = (
            {},
            {"rule": "above"},
            {"threshold": 0.5},
            {"rule": "above", "threshold": 0.499},
            {"rule": "above", "threshold": 0.501},
        )
        rank = lambda s: dimension.jacobian_rank(p.denoiser(schedule), schedule, x, t, **s)
        return jnp.stack([rank(s) for s in settings], axis=1)

    noisy = schedule.t_from_log_snr(0.0)  # alpha^2 = sigma^2: the values are exactly 1/2
    got = ranks(jnp.stack([jnp.asarray(0.01), noisy]))
    assert got[0].tolist() == [59, 60, 16, 60, 60]
    assert got[1, jnp.asarray([0, 2, 3, 4])].tolist() == [59, 16, 60, 0]


def test_denoiser_estimates_refuse_bad_arguments(unchecked, key):
    p, ve = distributions.MoLRG(jnp.eye(4)[None, :, :2]), schedules.VE()
    denoise_fn, x = p.denoiser(ve), jnp.ones((3, 4))
    flipd = lambda x=x, t=0.1, fn=denoise_fn, **options: dimension.flipd(fn, ve, x, t, **options)
    bundle = lambda x=x, t=0.1, **options: dimension.normal_bundle(
        key, denoise_fn, ve, x, t, **options
    )
    with pytest.raises(ValueError, match=r"sigma\(t\) out of range: expected \(0"):
        flipd(t=0.0)
    with pytest.raises(ValueError, match="wrong shape of t"):
        flipd(t=jnp.ones(2))
    with pytest.raises(ValueError, match="num_probes and key together, got only key"):
        flipd(key=key)
    with pytest.raises(ValueError, match="num_probes and key together, got only num_probes"):
        flipd(num_probes=3)
    with pytest.raises(ValueError, match="num_probes too small"):
        flipd(num_probes=0, key=key)
    with pytest.raises(
        ValueError, match=r"flipd: x_t has shape \(3, 4\) but denoise_fn returned \(3, 2\)"
    ):
        flipd(fn=lambda x, t: x[:, :2])
    with pytest.raises(ValueError, match=r"sigma\(t\) out of range"):
        bundle(t=0.0)
    with pytest.raises(ValueError, match="num_scores too small: expected at least 4"):
        bundle(num_scores=3)
    with pytest.raises(ValueError, match="too few numbers per example"):
        bundle(x=jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="unknown rule"):
        dimension.jacobian_rank(denoise_fn, ve, x, 0.1, rule="half")
    with pytest.raises(ValueError, match="threshold out of range"):
        dimension.jacobian_rank(denoise_fn, ve, x, 0.1, threshold=1.5)


# --- The experiment ------------------------------------------------------------------------------


@pytest.mark.slow
def test_experiment_reproduces_its_references_and_the_truth():
    """Every value that a reference stands beside, and the exact denoiser at small noise."""
    preset = intrinsic_dimension.PRESETS["smoke"]
    (key, x), *others = intrinsic_dimension.image_sets(None, preset).items()
    assert not others and key == ("digits", "train") and x.shape == (500, 64)
    rows = intrinsic_dimension.sample_estimates(*key, x, preset)
    compared = [row for row in rows if row.reference is not None]
    assert len(compared) == 5
    for row in compared:
        assert row.estimate == pytest.approx(row.reference, abs=0.0051), row
    small = [r for r in intrinsic_dimension.denoiser_estimates(12, 2, 0) if r.sigma < 0.01]
    assert len(small) == 12
    for row in small:
        assert row.estimate == pytest.approx(row.true, abs=1e-3), row


@pytest.mark.slow
def test_experiment_writes_its_results(tmp_path, data_root):
    command = [sys.executable, "-m", "experiments.intrinsic_dimension", "--preset", "smoke"]
    command += ["--data", str(data_root), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = {f"{name}.png" for name in intrinsic_dimension.DENOISER_ESTIMATORS.values()}
    expected = figures | {"neighbours.png", "intrinsic_dimension.csv", "report.html"}
    assert {p.name for p in tmp_path.iterdir()} == expected
    with open(tmp_path / "intrinsic_dimension.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["data"] for r in rows} >= {"digits", "MNIST", "Fashion-MNIST", "CIFAR-10"}
    assert np.isfinite([float(r["estimate"]) for r in rows]).all()
    command[command.index(str(data_root))] = str(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "none of the folders mnist" in done.stderr
