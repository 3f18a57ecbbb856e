"""Weights of the multistep methods against textbook numbers and scipy's quadrature."""

import numpy as np
import pytest
import scipy.integrate

from lowdim_diffusion import schedules, solvers

VE, VP = schedules.VE(), schedules.VPLinear()


def weights(solver, schedule, ts):
    return np.asarray(solvers.plan(solver, schedule, ts).coefficients.weights)


@pytest.mark.parametrize(
    ("order", "textbook"),
    [(2, [-1 / 2]), (3, [-16 / 12, 5 / 12]), (4, [-59 / 24, 37 / 24, -9 / 24])],
)
def test_equal_steps_have_the_textbook_weights(order, textbook):
    """Hairer, Norsett & Wanner, table III.1.1; all weights add up to the step."""
    ts = np.linspace(10.0, 1.0, 19)  # VE: t is rho
    found = weights(solvers.adams_bashforth(order), VE, ts)
    np.testing.assert_allclose(
        found[order - 1 :] / -0.5, np.tile(textbook, (19 - order, 1)), rtol=1e-9
    )
    assert not found[0].any() and not found[1, 1:].any()  # the start


def lagrange(places, j, at):
    others = [p for i, p in enumerate(places) if i != j]
    return np.prod([(at - p) / (places[j] - p) for p in others])


def test_deis_weights_are_integrals_over_time():
    ts = np.linspace(1.0, 0.05, 9) ** 2
    found = weights(solvers.deis(3), VP, ts)
    log_alpha = lambda t: -0.25 * t**2 * 19.9 - 0.05 * t
    rho = lambda t: np.sqrt(np.expm1(-2 * log_alpha(t)))
    slope = lambda t: (19.9 * t / 2 + 0.05) * np.exp(-2 * log_alpha(t)) / rho(t)  # d rho / dt
    for i in (2, 5, 7):
        places = ts[i], ts[i - 1], ts[i - 2]
        for j in (1, 2):
            integrand = lambda t, j=j, places=places: lagrange(places, j, t) * slope(t)
            expected = scipy.integrate.quad(integrand, ts[i], ts[i + 1], epsabs=1e-13)[0]
            np.testing.assert_allclose(
                found[i, j - 1], np.exp(log_alpha(ts[i + 1])) * expected, rtol=1e-9
            )


def test_dpmpp_3m_weights_are_integrals_over_log_snr():
    ts = np.linspace(1.0, 0.05, 9) ** 2
    found = weights(solvers.dpmpp_3m(), VP, ts)
    half = np.asarray(VP.log_snr(ts), np.float64) / 2
    sigma = np.asarray(VP.sigma(ts), np.float64)
    for i in (2, 7):
        places = half[i], half[i - 1], half[i - 2]
        for j in (1, 2):
            integrand = lambda a, j=j, places=places: lagrange(places, j, a) * np.exp(a)
            expected = scipy.integrate.quad(integrand, half[i], half[i + 1])[0]
            np.testing.assert_allclose(found[i, j - 1], sigma[i + 1] * expected, rtol=1e-4)


@pytest.mark.parametrize("schedule", [VP, schedules.RectifiedFlow()])
def test_ends_at_infinite_log_snr_are_steps_of_euler(schedule):
    """Pure noise (alpha = 0) enters no polynomial, the clean example ends on the prediction."""
    ts = np.array([schedule.t_max, 0.9, 0.7, 0.4, 0.1, 0.0])
    for make in (solvers.deis, solvers.adams_bashforth, lambda order: solvers.dpmpp_3m()):
        found = weights(make(3), schedule, ts)
        assert np.isfinite(found).all() and not found[-1].any() and not found[0].any()
        assert found[3].all()
        if schedule.alpha(schedule.t_max) == 0:
            assert not found[1].any() and not found[2, 1].any()


def test_order_one_is_euler_and_orders_are_checked():
    for make in (solvers.deis, solvers.adams_bashforth):
        assert make(1) == make(1) and make(2) != make(3) and hash(make(3)) == hash(make(3))
        assert weights(make(1), VP, [0.9, 0.5, 0.1]).shape == (2, 0)
        with pytest.raises(ValueError, match="unknown order: expected one of 1, 2, 3, 4, got 5"):
            make(5)
