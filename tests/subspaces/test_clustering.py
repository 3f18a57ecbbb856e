"""K-subspaces against brute force, closed forms and the phase transition N_k >= d."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import linalg, subspaces


def union(key, num_components, dim, rank, per_component, *, orthogonal=True, noise_std=0.0):
    frame_key, inner_key, noise_key = jax.random.split(key, 3)
    bases = linalg.random_frames(frame_key, num_components, dim, rank, orthogonal=orthogonal)
    inner = jax.random.normal(inner_key, (num_components, per_component, rank))
    x = jnp.einsum("knd,kbd->kbn", bases, inner).reshape(-1, dim)
    x = x + noise_std * jax.random.normal(noise_key, x.shape)
    return bases, x, np.repeat(np.arange(num_components), per_component)


def best_split(x, rank):
    """Smallest residual over all ways to split the rows in two, by brute force."""
    best = np.inf
    for bits in itertools.product((0, 1), repeat=len(x) - 1):
        labels = np.array((0, *bits))
        parts = [x[labels == k] for k in (0, 1)]
        rest = sum(np.sum(np.linalg.svd(p, compute_uv=False)[rank:] ** 2) for p in parts if len(p))
        best = min(best, rest / len(x))
    return best


@pytest.mark.slow
def test_finds_the_best_of_all_splits(x64):
    for seed in range(4):
        x = jax.random.normal(jax.random.key(seed), (11, 4))
        found = subspaces.k_subspaces(jax.random.key(1), x, 2, 2, num_restarts=200)
        assert float(found.loss) == pytest.approx(best_split(np.asarray(x), 2), rel=1e-6)
        residual = x - jax.vmap(linalg.project)(found.bases[found.labels], x)
        assert float(jnp.mean(jnp.sum(residual**2, 1))) == pytest.approx(float(found.loss))
        assert float(found.losses.min()) == float(found.loss)


@pytest.mark.slow
def test_one_subspace_is_pca(x64):
    x = jax.random.normal(jax.random.key(0), (30, 8)) * jnp.linspace(3, 1, 8)[None, :]
    found = subspaces.k_subspaces(jax.random.key(1), x, 1, 3, max_iters=2000)
    assert float(subspaces.projector_distance(found.bases[0], subspaces.pca(x, 3))) < 1e-6
    assert float(found.loss) == pytest.approx(
        np.sum(np.linalg.svd(np.asarray(x), compute_uv=False)[3:] ** 2) / 30
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_components, rank",
    [
        (2, 4),
        (3, 6),
        pytest.param(2, 2, marks=pytest.mark.slow),
        pytest.param(3, 3, marks=pytest.mark.slow),
    ],
)
def test_orthogonal_recovery_switches_on_at_d_points(num_components, rank):
    """Check 4, and the open challenge K = 3, d = 6: 0 at d - 1 points, nearly all from d on."""

    def error(key, per_component):
        key, data_key = jax.random.split(key)
        bases, x, _ = union(data_key, num_components, 48, rank, per_component, noise_std=1e-4)
        found = subspaces.k_subspaces(key, x, num_components, rank, orthogonal=True)
        return subspaces.match_components(bases, found.bases).distance.max()

    keys = jax.random.split(jax.random.key(3), 20)
    run = jax.jit(lambda keys, n: jax.vmap(lambda k: error(k, n))(keys), static_argnums=1)
    below, at, above = (np.asarray(run(keys, n)) for n in (rank - 1, rank, 2 * rank))
    assert np.all(below > 0.9)
    assert np.mean(at < 0.5) >= 0.9
    assert np.all(above < 0.05)


@pytest.mark.parametrize(
    "dim, num_components, rank",
    [
        (48, 3, 6),
        pytest.param(48, 2, 6, marks=pytest.mark.slow),
        pytest.param(100, 5, 10, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_random_unions_where_random_starts_fall_short(dim, num_components, rank):
    bases, x, labels = union(
        jax.random.key(5), num_components, dim, rank, 2 * rank, orthogonal=False
    )
    key = jax.random.key(1)
    run = lambda start, count: subspaces.k_subspaces(
        key, x, num_components, rank, start=start, num_restarts=count
    )
    found = run("mixed", 4)
    error = subspaces.match_components(bases, found.bases).distance / np.sqrt(2 * rank)
    assert float(error.max()) < 1e-3
    assert len(set(zip(labels.tolist(), found.labels.tolist(), strict=True))) == num_components
    assert float(run("random", 2).loss) > 1e3 * float(found.loss) + 1e-6


@pytest.mark.slow
def test_frames_are_orthonormal_together():
    _, x, _ = union(jax.random.key(0), 3, 20, 3, 8, orthogonal=False, noise_std=0.3)
    found = subspaces.k_subspaces(jax.random.key(1), x, 3, 3, orthogonal=True, num_restarts=3)
    joint = jnp.concatenate(list(found.bases), axis=1)
    np.testing.assert_allclose(joint.T @ joint, np.eye(9), atol=1e-5)


@pytest.mark.slow
def test_padding_and_masks_change_nothing():
    """Rows of zeros and unused columns: what lets sets of different size share a program."""
    bases, x, _ = union(jax.random.key(0), 2, 24, 3, 6)
    padded = jnp.concatenate([x, jnp.zeros((5, 24))])
    run = jax.jit(
        lambda x, d: subspaces.k_subspaces(
            jax.random.key(1), x, 2, 5, orthogonal=True, active_rank=d
        )
    )
    for data in (x, padded):
        found = run(data, 3)
        assert not np.any(np.asarray(found.bases[:, :, 3:]))
        distance = subspaces.match_components(bases, found.bases).distance
        assert float(distance.max()) < 1e-3
    noisy = lambda rows: run(jnp.pad(x + 0.1 * noise, ((0, rows), (0, 0))), 3).loss
    noise = jax.random.normal(jax.random.key(7), x.shape)
    np.testing.assert_allclose(noisy(20), noisy(0), rtol=1e-4)


def test_frames_that_are_none_and_points_that_are_none():
    bases, x, _ = union(jax.random.key(0), 2, 24, 3, 9)
    with pytest.raises(ValueError, match="bases is no frame: expected orthonormal columns"):
        subspaces.assign_points(x, bases.at[0].multiply(5))
    with pytest.raises(ValueError, match="x is not finite"):
        subspaces.assign_points(x.at[0, 0].set(jnp.nan), bases)
    with pytest.raises(ValueError, match="x is not finite"):
        subspaces.pca(x.at[0, 0].set(jnp.inf), 2)
    assert subspaces.assign_points(x, bases.at[:, :, 1:].set(0)).shape == (18,)  # absent columns


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e9])
def test_scale_of_the_data_changes_only_the_loss(scale):
    _, x, _ = union(jax.random.key(0), 2, 24, 3, 9)
    x = x + 0.1 * jax.random.normal(jax.random.key(7), x.shape)
    run = jax.jit(lambda x: subspaces.k_subspaces(jax.random.key(1), x, 2, 3))
    plain, scaled = run(x), run(scale * x)
    np.testing.assert_array_equal(plain.labels, scaled.labels)
    np.testing.assert_allclose(scaled.loss / scale**2, plain.loss, rtol=1e-4)


@pytest.mark.slow
def test_more_dimensions_than_points():
    bases, x, _ = union(jax.random.key(0), 2, 300, 3, 9, orthogonal=False)
    found = subspaces.k_subspaces(jax.random.key(1), x, 2, 3)
    assert found.bases.shape == (2, 300, 3)
    assert float(subspaces.match_components(bases, found.bases).distance.max()) < 1e-3


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.slow
def test_degenerate_points(orthogonal):
    """Copies of one point, zeros, fewer points than d: finite frames, small loss."""
    for x in (jnp.ones((6, 9)), jnp.zeros((6, 9)), jnp.eye(9)[:3]):
        found = subspaces.k_subspaces(jax.random.key(0), x, 2, 3, orthogonal=orthogonal)
        assert bool(jnp.all(jnp.isfinite(found.bases)))
        assert float(found.loss) < 1e-6


def test_errors(unchecked):
    x, key = jnp.ones((5, 4)), jax.random.key(0)
    with pytest.raises(ValueError, match=r"rank too large: expected at most .* 4, got 5"):
        subspaces.k_subspaces(key, x, 1, 5)
    with pytest.raises(ValueError, match="no room for mutually orthogonal subspaces"):
        subspaces.k_subspaces(key, x, 3, 2, orthogonal=True)
    with pytest.raises(ValueError, match="too few points: expected at least 6, got 5"):
        subspaces.k_subspaces(key, x, 6, 1)
    with pytest.raises(ValueError, match="x is not finite"):
        subspaces.k_subspaces(key, x.at[0, 0].set(jnp.nan), 2, 1)
    with pytest.raises(ValueError, match="unknown start"):
        subspaces.k_subspaces(key, x, 2, 1, start="oracle")
