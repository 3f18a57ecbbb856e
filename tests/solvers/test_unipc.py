"""UniPC against the paper's algorithm, whose weights come from a Vandermonde system."""

import math

import jax
import numpy as np
import pytest

from lowdim_diffusion import sampling, schedules, solvers

VP, FLOW = schedules.VPLinear(), schedules.RectifiedFlow()


def bent(y):
    return np.tanh(y) * 0.8 + 0.1 * y


def weights(ratios, h, order, variant):
    """Rows of the system R rho = b for the derivatives of the prediction, h < 0 for data."""
    scale = -h if variant == "bh1" else math.expm1(-h)
    phi, factorial, b = math.expm1(-h) / -h - 1, 1, []
    for i in range(1, order + 1):
        b.append(phi * factorial / scale)
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    rows = np.stack([np.asarray(ratios) ** i for i in range(order)])
    return rows, np.array(b), scale


def reference(schedule, ts, x, order, variant):
    """Algorithms 1 and 2 with data prediction, and the usual half for a single weight."""
    alpha, sigma = (np.asarray(f(ts), np.float64) for f in (schedule.alpha, schedule.sigma))
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    seen, last = [], None
    for i in range(len(ts) - 1):
        new = bent(x / alpha[i])
        if last is not None:  # correct the step i - 1 -> i
            start, p = last
            h = lam[i] - lam[i - 1]
            old = [seen[-1 - j] for j in range(1, p)]
            ratios = [(lam[i - 1 - j] - lam[i - 1]) / h for j in range(1, p)] + [1.0]
            rows, b, scale = weights(ratios, h, p, variant)
            rho = np.array([0.5]) if p == 1 else np.linalg.solve(rows, b)
            slopes = [(o - seen[-1]) / r for o, r in zip(old, ratios[:-1], strict=True)]
            slopes.append(new - seen[-1])
            x = sigma[i] / sigma[i - 1] * start - alpha[i] * math.expm1(-h) * seen[-1]
            x = x - alpha[i] * scale * sum(r * s for r, s in zip(rho, slopes, strict=True))
        seen.append(new)
        p, start = min(order, i + 1), x
        h = lam[i + 1] - lam[i]
        ratios = [(lam[i - j] - lam[i]) / h for j in range(1, p)]
        x = sigma[i + 1] / sigma[i] * start - alpha[i + 1] * math.expm1(-h) * new
        if p > 1:
            rows, b, scale = weights(ratios, h, p - 1, variant)
            rho = np.array([0.5]) if p == 2 else np.linalg.solve(rows, b)
            slopes = [(seen[-1 - j] - new) / ratios[j - 1] for j in range(1, p)]
            x = x - alpha[i + 1] * scale * sum(r * s for r, s in zip(rho, slopes, strict=True))
        last = start, p
    return x


@pytest.mark.parametrize(
    ("order", "variant", "name"),
    [
        (2, "bh1", "vp"),
        (3, "bh2", "flow"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(1, "bh2", "vp"), (1, "bh1", "flow"), (2, "bh2", "flow"), (3, "bh1", "vp")]
        ),
    ],
)
def test_is_the_papers_algorithm(order, variant, name, x64):
    schedule = {"vp": VP, "flow": FLOW}[name]
    ts = np.linspace(0.98, 0.2, 9) ** 2
    x_T = np.random.default_rng(0).standard_normal((5, 3))
    denoise_fn = lambda x, t: (lambda y: jax.numpy.tanh(y) * 0.8 + 0.1 * y)(x / schedule.alpha(t))
    solver = solvers.unipc(order, variant)
    run = lambda: sampling.sample(jax.random.key(0), denoise_fn, schedule, ts, x_T, solver=solver)
    expected = reference(schedule, ts, x_T, order, variant)
    np.testing.assert_allclose(jax.jit(run)().x, expected, rtol=1e-8)


def test_starts_and_ends_are_steps_of_euler():
    """Neither pure noise (alpha = 0) nor the clean example enters a polynomial."""
    ts = np.array([1.0, 0.8, 0.5, 0.3, 0.1, 0.0])
    c = solvers.plan(solvers.unipc(3), FLOW, ts).coefficients
    assert all(np.isfinite(part).all() for part in c)
    assert not c.predict[0].any() and not c.predict[-1].any() and c.predict[3].all()
    assert not c.correct[:2].any() and c.correct[-1].all()


def test_choices_are_checked(unchecked):
    assert solvers.unipc() == solvers.unipc(3, "bh2") != solvers.unipc(3, "bh1")
    with pytest.raises(ValueError, match="unipc: unknown order: expected one of 1, 2, 3, got 4"):
        solvers.unipc(4)
    with pytest.raises(ValueError, match="unipc: unknown variant"):
        solvers.unipc(2, "bh3")
