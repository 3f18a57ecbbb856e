"""Marks against numpy's DFT, p-values against scipy and their law, exact mixtures end to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lowdim_diffusion import distributions, editing, linalg, safety, schedules, solvers
from lowdim_diffusion.safety import attacks, watermark
from lowdim_diffusion.safety._chi2 import noncentral_chi2_cdf

KEY = jax.random.key(0)
VE = schedules.VE(1e-4, 100.0)


def dft(x):
    return np.fft.fft2(np.asarray(x, np.float64), axes=(-3, -2), norm="ortho")


def test_noncentral_chi_square_is_scipys():
    cases = [(13, 0, 4), (13, 13, 3), (49, 60, 40), (200, 200, 215), (2, 3000, 2700)]
    cases += [(2000, 2500, 4000), (2000, 2500, 4600)]
    df, noncentrality, x = np.array(cases, np.float32).T
    law = scipy.stats.ncx2(df, np.maximum(noncentrality, 1e-9))
    np.testing.assert_allclose(noncentral_chi2_cdf(x, df, noncentrality), law.cdf(x), rtol=1e-3)


def test_noncentral_chi_square_in_double_precision(x64):
    for df, noncentrality, x in [(13, 13, 3), (2000, 2500, 3500), (20_000, 30_000, 47_000)]:
        found = float(noncentral_chi2_cdf(float(x), df, float(noncentrality)))
        assert found == pytest.approx(
            scipy.stats.ncx2.cdf(x, df, noncentrality), rel=1e-5
        )  # jax's gammainc


@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 10, 3)])
@pytest.mark.parametrize("band", ["high", "low"])
@pytest.mark.parametrize("pattern", ["rings", "noise"])
def test_injection_replaces_the_masked_entries_and_no_others(shape, band, pattern):
    mark = watermark.make_mark(KEY, shape, radius=2.5, channels=[0], band=band, pattern=pattern)
    x = jax.random.normal(jax.random.key(1), (3, *shape))
    before, after, wanted = dft(x), dft(watermark.inject(x, mark)), np.asarray(mark.spectrum)
    inside = mark.mask
    np.testing.assert_allclose(after[:, inside], wanted[None, inside].repeat(3, 0), atol=1e-5)
    np.testing.assert_allclose(after[:, ~inside], before[:, ~inside], atol=1e-5)
    middle = np.array([s // 2 if band == "high" else 0 for s in shape[:2]])
    assert inside[(*middle, 0)] and not inside[..., 1:].any()
    away = [np.fft.fftfreq(s) * s for s in shape[:2]]
    if band == "low":
        np.testing.assert_array_equal(
            inside[..., 0], np.hypot(away[0][:, None], away[1][None]) <= 2.5
        )


def test_rings_stay_under_turns_and_flips_and_numbers_are_as_many_as_needed():
    rings = watermark.make_mark(KEY, (9, 9, 2), radius=3)
    w = np.asarray(rings.spectrum)
    image = np.fft.ifft2(w, axes=(0, 1), norm="ortho")
    assert np.abs(image.imag).max() < 1e-6
    turned = image.real[::-1].transpose(1, 0, 2)
    np.testing.assert_allclose(dft(np.roll(turned, 1, axis=1)), w, atol=1e-5)
    noise = watermark.make_mark(KEY, (9, 9, 2), radius=3, pattern="noise", scale=3.0)
    # Real degrees of freedom of a real image are as many as entries, and orthonormal.
    assert noise.values.shape == (noise.mask.sum(),)
    power = np.sum(np.abs(np.asarray(noise.spectrum)) ** 2)
    assert power == pytest.approx(float(jnp.sum(noise.values**2)), rel=1e-5)
    assert power == pytest.approx(9 * noise.mask.sum(), rel=1e-5)


def uniform(p):
    return scipy.stats.kstest(np.asarray(p), "uniform").pvalue


def test_p_values_of_white_noise_are_uniform():
    x = 1.7 * jax.random.normal(jax.random.key(1), (1000, 8, 8, 1))
    mark = watermark.make_mark(KEY, (8, 8, 1), radius=2, scale=1.3)
    by_angle, known = jax.jit(
        lambda x: (watermark.match(x, mark).p_value, watermark.p_value(x[:400], mark, std=1.7))
    )(x)
    assert uniform(by_angle) > 0.01 and uniform(known) > 0.01
    # As released: noncentral chi-square with the variance of the same numbers. Counting each
    # number once it is too careful, counting it twice too bold.
    x = x[:400]
    found, w = dft(x)[:, mark.mask], np.asarray(mark.spectrum)[mark.mask]
    variance = np.mean(np.abs(found) ** 2, axis=1)
    statistic = np.sum(np.abs(found - w) ** 2, axis=1) / variance
    means = np.sum(np.abs(w) ** 2) / variance
    once, twice = (
        scipy.stats.ncx2.cdf(k * statistic, k * found.shape[1], k * means) for k in (1, 2)
    )
    mine = watermark.p_value(x, mark, std=jnp.sqrt(jnp.asarray(variance, jnp.float32)))
    np.testing.assert_allclose(mine, once, rtol=1e-3, atol=1e-6)
    low, high = (np.mean((p < 0.05) | (p > 0.95)) for p in (once, twice))
    assert low < 0.08 < 0.12 < high


def test_p_value_of_any_image_is_uniform_over_keys():
    image = jnp.linspace(-1, 1, 64).reshape(1, 8, 8, 1) ** 3
    one = lambda key: watermark.p_value(
        image, watermark.make_mark(key, (8, 8, 1), band="low", pattern="noise")
    )[0]
    assert uniform(jax.jit(jax.vmap(one))(jax.random.split(KEY, 2000))) > 0.01


def test_scores_by_hand():
    mark = watermark.make_mark(KEY, (8, 8, 2), pattern="noise")
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 2))
    found, w = dft(x)[:, mark.mask], np.asarray(mark.spectrum)[mark.mask]
    q = jax.jit(watermark.match)(x, mark)
    np.testing.assert_allclose(q.distance, np.abs(found - w).mean(1), rtol=1e-5)
    square = lambda a: np.sum(np.abs(a) ** 2, axis=-1)
    np.testing.assert_allclose(q.eta, square(found - w) / square(found), rtol=1e-5)
    cosine = np.sum((found * w.conj()).real, 1) / np.sqrt(square(found) * square(w))
    np.testing.assert_allclose(q.cosine, cosine, atol=1e-6)
    # The angle of a random direction in m dimensions is that of a correlation's t-test.
    m = mark.mask.sum()
    t = cosine * np.sqrt((m - 1) / (1 - cosine**2))
    np.testing.assert_allclose(q.p_value, scipy.stats.t.sf(t, m - 1), rtol=1e-4)
    assert float(watermark.match(jnp.zeros((1, 8, 8, 2)), mark).p_value[0]) == 0.5


@pytest.mark.parametrize("pattern", ["rings", "noise"])
def test_a_message_is_read(pattern):
    bits = [1, 0, 0, 1, 1, 1, 0]
    make = lambda **more: watermark.make_mark(KEY, (16, 16, 3), radius=8, pattern=pattern, **more)
    x = watermark.inject(jax.random.normal(KEY, (4, 16, 16, 3)), make(message=bits))
    found = watermark.decode(x, make(), 7)
    np.testing.assert_array_equal(found, np.array([bits] * 4, bool))


def test_threshold_bounds_the_share_above_it():
    scores = np.random.default_rng(0).normal(size=200)
    for share in (0, 0.01, 0.1, 0.5):
        limit = watermark.threshold(scores, share)
        assert np.mean(scores > limit) == pytest.approx(share)
    assert watermark.threshold(scores, 1) == -np.inf
    assert watermark.threshold(scores[:50], 0.01) == scores[:50].max()


def mixture(delta, frames):
    return distributions.MoLRG(frames, noise_std=delta)


FRAMES = linalg.random_frames(jax.random.key(7), 2, 64, 6, orthogonal=True)


def test_a_random_step_moves_the_prediction_by_the_jacobians_norm():
    """E ||J dx||^2 = ||J||_F^2 / n for unit dx, and at most L^2 rank / n."""
    p = mixture(0.0, FRAMES)
    x = jax.random.normal(KEY, (1, 64))
    steps = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    steps = steps / np.linalg.norm(steps, axis=1, keepdims=True)
    mean = lambda x: p.posterior_mean(x, 1.0, 0.5)
    pushed = jax.jit(jax.vmap(lambda v: jax.jvp(mean, (x,), (v[None],))[1][0]))(steps)
    jacobian = np.asarray(jax.jit(lambda x: p.posterior_jacobian(x, 1.0, 0.5))(x)[0])
    exact = np.sum(jacobian**2) / 64
    assert float(jnp.mean(jnp.sum(pushed**2, axis=1))) == pytest.approx(exact, rel=0.05)
    size = np.linalg.svd(jacobian, compute_uv=False)
    assert exact <= size[0] ** 2 * np.sum(size > 1e-5) / 64


@jax.jit
def end_to_end(delta, ts):
    """Images of a mixture, a pattern in them, and both carried up after an attack."""
    p = mixture(delta, FRAMES)
    flat = p.denoiser(VE)
    denoise_fn = lambda x, t: flat(x.reshape(-1, 64), t).reshape(x.shape)
    x = p.sample(jax.random.key(2), 800)[0].reshape(-1, 8, 8, 1)
    mark = watermark.make_mark(jax.random.key(3), (8, 8, 1), radius=2, scale=0.65)
    marked = watermark.embed(denoise_fn, VE, ts, x[:400], mark)
    both = jnp.concatenate([marked, x[400:]])
    noisy = attacks.noise(jax.random.key(4), both, 0.1)
    up = watermark.recover(denoise_fn, VE, ts, jnp.concatenate([both, noisy]))
    # Published detection: DDIM, the relative distance.
    return marked, x[:400], -watermark.match(up, mark).eta.reshape(2, 800)


def rates(scores):
    is_marked = np.arange(800) < 400
    return [float(safety.true_positive_rate(s, is_marked)) for s in scores]


def test_a_mixture_with_a_floor_carries_the_mark_and_one_without_does_not():
    """With a floor of .3 (arXiv 2410.21088): TPR 1 clean and under noise, PSNR above 20 dB."""
    ts = watermark.grid(VE, 0.65, sigma_min=0.01)
    marked, x, scores = end_to_end(0.3, ts)
    psnr = editing.round_trip_error(x, marked, data_range=float(np.ptp(np.asarray(x)))).psnr
    assert 22 < float(jnp.mean(psnr)) < 26
    clean, noisy = rates(scores)
    assert clean == 1 and noisy > 0.95
    # Without a floor the mark leaves with the noise, and any noise on the way hides the rest.
    clean, noisy = rates(end_to_end(0.0, ts)[2])
    assert noisy < 0.05
    # Unless the image keeps as much of it as it is to bear.
    clean, noisy = rates(end_to_end(0.0, watermark.grid(VE, 0.65, sigma_min=0.15))[2])
    assert clean == 1 and noisy > 0.95


@pytest.mark.slow
def test_the_mark_shrinks_as_the_flow_does():
    """``sqrt((delta^2 + s_0^2) / (delta^2 + s^2))`` in the null space of a Gaussian's Jacobian."""
    delta, t, last = 0.2, 0.8, 0.05
    basis = np.eye(64)[:, :4].astype(np.float32)
    p = distributions.MoLRG(basis[None], noise_std=delta)
    flat = p.denoiser(VE)
    denoise_fn = lambda x, t: flat(x.reshape(-1, 64), t).reshape(x.shape)
    x = p.sample(KEY, 2)[0].reshape(-1, 8, 8, 1)
    mark = watermark.make_mark(KEY, (8, 8, 1), pattern="noise", scale=t)
    ts = watermark.grid(VE, t, num_steps=30, sigma_min=last)
    up = watermark.recover(denoise_fn, VE, ts, x)
    change = np.asarray(watermark.inject(up, mark) - up).reshape(2, 64)[:, 4:]
    marked = watermark.embed(denoise_fn, VE, ts, x, mark)
    arrived = np.asarray(marked - x).reshape(2, 64)[:, 4:]
    shrunk = np.sqrt((delta**2 + last**2) / (delta**2 + t**2))
    np.testing.assert_allclose(arrived, shrunk * change, atol=2e-3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: watermark.make_mark(KEY, (64,)), r"expected \(height, width, channels\), got"),
        (lambda: watermark.make_mark(KEY, (8, 8, 1), radius=5), r"\[0, 4\], got 5"),
        (lambda: watermark.make_mark(KEY, (8, 8, 1), radius=0.5), "two entries or more, got 0.5"),
        (lambda: watermark.make_mark(KEY, (8, 8, 3), channels=[3]), r"one or more of 0 .. 2"),
        (lambda: watermark.make_mark(KEY, (8, 8, 1), message=[0, 2]), "zeros and ones"),
        (lambda: watermark.make_mark(KEY, (8, 8, 1), message=[1] * 9), "at most 3 bits .* got 9"),
        (
            lambda: watermark.Mark(jnp.zeros(3), (8, 8, 1), 2.0, (0,)),
            r"expected \(2,\), got \(3,\); the key belongs to another shape",
        ),
        (
            lambda: watermark.inject(jnp.zeros((2, 9, 8, 1)), watermark.make_mark(KEY, (8, 8, 1))),
            "expected (any, 8, 8, 1), got (2, 9, 8, 1); the mark was made for images of another",
        ),
        (
            lambda: watermark.decode(
                jnp.zeros((2, 8, 8, 1)), watermark.make_mark(KEY, (8, 8, 1)), 4
            ),
            "at most 3 for this mark, got 4",
        ),
        (
            lambda: watermark.p_value(
                jnp.zeros((2, 8, 8, 1)), watermark.make_mark(KEY, (8, 8, 1)), std=0.0
            ),
            "std out of range",
        ),
        (lambda: watermark.threshold([0.1], 1.5), r"max_fpr out of range: expected \[0, 1\]"),
        (lambda: watermark.threshold([], 0.5), "scores of unmarked images"),
        (lambda: watermark.grid(VE, 200.0), "t out of range.*a time of the schedule"),
        (lambda: watermark.grid(schedules.VPLinear(), 0.0), "t out of range"),
        (
            lambda: watermark.recover(
                lambda x, t: x, VE, [1.0, 0.1], jnp.zeros((1, 8)), solver=solvers.bdia()
            ),
            "reversible",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, said, unchecked):
    with pytest.raises(ValueError, match=said if "\\" in said or ".*" in said else None) as error:
        make()
    assert "\\" in said or ".*" in said or said in str(error.value)
