"""Low-rank denoisers trained on points, against PCA, closed forms and plain gradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowdim_diffusion import linalg, subspaces, training
from lowdim_diffusion.training import optimizers


def points(key, rank=4, count=16, dim=48, noise_std=0.01):
    frame_key, inner_key, noise_key = jax.random.split(key, 3)
    basis = linalg.random_frames(frame_key, 1, dim, rank)[0]
    x = jax.random.normal(inner_key, (count, rank)) @ basis.T
    return basis, x + noise_std * jax.random.normal(noise_key, x.shape)


# ---- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("assignment", ["soft", "hard"])
def test_analytic_loss_is_the_mean_over_noise(assignment):
    """Check 1 for the whole objective: K = 1 and hard assignment integrate in closed form."""
    from lowdim_diffusion.training import subspace

    count = 1 if assignment == "soft" else 3
    bases = linalg.random_frames(jax.random.key(0), count, 12, 2)
    x = jax.random.normal(jax.random.key(1), (6, 12))
    sigmas = (0.05, 3.0)
    exact = float(subspace._analytic(x, bases, subspace._mean_gain(sigmas, 25.0)))
    many = jnp.tile(x, (4000, 1))
    drawn = training.denoising_loss(
        jax.random.key(2), many, bases, assignment=assignment, sigmas=sigmas
    )
    # 16 noise levels by the midpoint rule: .3 %; Monte-Carlo: 24,000 x 4 draws at each.
    assert float(drawn) == pytest.approx(exact, rel=1e-2)


def test_rows_of_zeros_are_absent():
    bases = linalg.random_frames(jax.random.key(0), 2, 8, 2)
    x = jax.random.normal(jax.random.key(1), (64, 8))
    padded = jnp.concatenate([x, jnp.zeros((64, 8))])
    a, b = (float(training.denoising_loss(jax.random.key(2), y, bases)) for y in (x, padded))
    assert a == pytest.approx(b, rel=0.05)  # other noise, not half the loss


# ---- optimizers on frames -----------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
def test_frames_stay_frames_and_reach_the_optimum(joint, x64):
    """sgd on frames maximises tr(U^T S U): the leading eigenvectors (jointly: of K d of them)."""
    g = np.random.default_rng(0)
    a = g.standard_normal((9, 9))
    scatter = jnp.asarray(a @ a.T)
    optimizer = optimizers.on_frames(optax.sgd(0.01), joint=joint)
    bases = linalg.random_frames(jax.random.key(0), 2, 9, 2, orthogonal=joint, dtype=jnp.float64)
    bases = bases.at[1, :, 1].set(0)  # an unused column
    loss = lambda u: -jnp.einsum("knd,nm,kmd->", u, scatter, u)

    def step(carry, _):
        bases, state = carry
        updates, state = optimizer.update(jax.grad(loss)(bases), state, bases)
        return (optax.apply_updates(bases, updates), state), None

    bases, _ = jax.lax.scan(step, (bases, optimizer.init(bases)), None, length=4000)[0]
    assert not np.any(np.asarray(bases[1, :, 1]))
    values = np.linalg.eigvalsh(np.asarray(scatter))[::-1]
    top = values[:3].sum() if joint else values[:2].sum() + values[0]
    assert float(-loss(bases)) == pytest.approx(top, rel=1e-6)
    used = np.concatenate([bases[0], bases[1][:, :1]], axis=1)
    gram = used.T @ used
    held = gram if joint else gram[:2, :2]
    np.testing.assert_allclose(held, np.eye(len(held)), atol=1e-12)


# ---- training is PCA, training is clustering ----------------------------------------------------


def test_denoising_loss_wants_frames_and_points(key):
    bases = linalg.random_frames(key, 2, 12, 3)
    with pytest.raises(ValueError, match="denoising_loss: bases is no frame"):
        training.denoising_loss(key, jnp.ones((4, 12)), 2 * bases)
    with pytest.raises(ValueError, match="denoising_loss: x is not finite"):
        training.denoising_loss(key, jnp.full((4, 12), jnp.nan), bases)
    with pytest.raises(ValueError, match="no points"):
        training.denoising_loss(key, jnp.ones((0, 12)), bases)


@pytest.mark.parametrize("objective, tol", [("analytic", 1e-3), ("monte-carlo", 0.05)])
def test_one_subspace_is_pca(objective, tol):
    """Check 3: N >= 2 d, noise .01."""

    @jax.jit
    def run(key, x):
        found = training.fit_subspaces(key, x, 1, 4, objective=objective, num_steps=1000)
        return found, subspaces.projector_distance(found.bases[0], subspaces.pca(x, 4))

    for seed in range(3):
        _, x = points(jax.random.key(seed))
        found, distance = run(jax.random.key(9), x)
        assert float(distance) < tol
        assert found.history.shape == (1, 1000)


def test_fewer_points_than_dimensions_leave_the_error_of_theory():
    """Check 2 for the trained denoiser: sqrt(2 (d - N)) below N = d, nothing from there on."""

    def error(key, count):
        key, data_key = jax.random.split(key)
        basis, x = points(data_key, rank=4, count=8, noise_std=0.0)
        x = jnp.where((jnp.arange(8) < count)[:, None], x, 0)
        found = training.fit_subspaces(key, x, 1, 4, objective="analytic", num_steps=800)
        return subspaces.projector_distance(found.bases[0], basis)

    keys = jax.random.split(jax.random.key(4), 3)
    run = jax.jit(lambda keys, n: jax.vmap(lambda k: error(k, n))(keys))
    for count in (1, 2, 3):
        # The directions that no point shows are where they started: nearly, but not quite, normal.
        np.testing.assert_allclose(run(keys, count), np.sqrt(2 * (4 - count)), rtol=0.1)
    for count in (4, 6):
        assert float(run(keys, count).max()) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("assignment", [pytest.param("hard", marks=pytest.mark.slow), "soft"])
def test_two_subspaces_from_good_starts(assignment):
    frame_key, inner_key, key = jax.random.split(jax.random.key(0), 3)
    bases = linalg.random_frames(frame_key, 2, 24, 3, orthogonal=True)
    x = jnp.einsum("knd,kbd->kbn", bases, jax.random.normal(inner_key, (2, 9, 3))).reshape(18, 24)
    found = training.fit_subspaces(
        key,
        x,
        2,
        3,
        assignment=assignment,
        orthogonal=True,
        num_steps=400,
        num_restarts=2,
        start="mixed",
    )
    assert float(subspaces.match_components(bases, found.bases).distance.max()) < 0.1
    assert float(found.loss) == float(found.losses.min())
    labels = found.labels.reshape(2, 9)
    assert len(np.unique(labels[0])) == len(np.unique(labels[1])) == 1
    assert labels[0, 0] != labels[1, 0]
    joint = jnp.concatenate(list(found.bases), axis=1)
    np.testing.assert_allclose(joint.T @ joint, np.eye(6), atol=1e-5)


@pytest.mark.slow
def test_hard_assignment_never_beats_k_subspaces():
    """The analytic objective is K-subspaces': its optimum cannot hold more energy than theirs."""
    data_key, key, restart_key = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(data_key, (24, 10)) * jnp.linspace(2, 0.5, 10)[None, :]
    fitted = training.fit_subspaces(
        key, x, 2, 2, assignment="hard", objective="analytic", num_restarts=8, start="mixed"
    )
    best = subspaces.k_subspaces(restart_key, x, 2, 2, num_restarts=256, start="random")
    inside = jnp.einsum("bn,knd->bkd", x, fitted.bases)
    residual = jnp.mean(jnp.sum(x**2, 1) - jnp.max(jnp.sum(inside**2, -1), 1))
    assert float(best.loss) <= float(residual) * (1 + 1e-4)
    assert float(residual) <= 1.15 * float(best.loss)


@pytest.mark.slow
def test_masks_change_the_noise_only():
    basis, x = points(jax.random.key(1), rank=3, count=10)
    padded = jnp.concatenate([x, jnp.zeros((6, 48))])
    run = jax.jit(
        lambda x, d: training.fit_subspaces(
            jax.random.key(2), x, 1, 5, objective="analytic", active_rank=d, num_steps=500
        )
    )
    for data in (x, padded):
        found = run(data, 3)
        assert not np.any(np.asarray(found.bases[:, :, 3:]))
        assert float(subspaces.projector_distance(found.bases[0], basis)) < 0.1


def test_errors(unchecked):
    x, key = jnp.ones((5, 4)), jax.random.key(0)
    with pytest.raises(ValueError, match="expected one subspace or hard assignment"):
        training.fit_subspaces(key, x, 2, 1, objective="analytic")
    with pytest.raises(ValueError, match=r"^fit_subspaces: rank too large"):
        training.fit_subspaces(key, x, 1, 5)
    with pytest.raises(ValueError, match=r"^fit_subspaces: no room for mutually orthogonal"):
        training.fit_subspaces(key, x, 3, 2, orthogonal=True)
    with pytest.raises(ValueError, match=r"^fit_subspaces: x is not finite"):
        training.fit_subspaces(key, x.at[0, 0].set(jnp.nan), 1, 2)
    with pytest.raises(
        ValueError, match=r"^fit_subspaces: too few points: expected at least 2, got 1"
    ):
        training.fit_subspaces(key, x[:1], 2, 1)
    with pytest.raises(ValueError, match=r"^fit_subspaces: active_rank out of range"):
        training.fit_subspaces(key, x, 1, 2, active_rank=3)
    with pytest.raises(
        ValueError, match=r"^fit_subspaces: wrong shape of x: .* one example per row"
    ):
        training.fit_subspaces(key, x[None], 1, 2)
    with pytest.raises(ValueError, match="unknown assignment"):
        training.fit_subspaces(key, x, 1, 2, assignment="medium")
    with pytest.raises(ValueError, match="lr out of range"):
        training.fit_subspaces(key, x, 1, 2, lr=0.0)
