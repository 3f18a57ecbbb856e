"""Energy outside subspaces against explicit projectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import linalg, subspaces


def shares(x, spans):
    """Share of energy outside each span, by dense projectors in float64."""
    out = []
    for a in spans:
        u, s, _ = np.linalg.svd(a, full_matrices=False)
        u = u[:, s > 1e-10 * s[0]]
        out.append(np.sum((x - x @ u @ u.T) ** 2, -1) / np.sum(x**2, -1))
    return np.stack(out)


@pytest.mark.parametrize("overlap", [False, True])
def test_energies_against_projectors(overlap, x64):
    g = np.random.default_rng(0)
    bases = g.standard_normal((3, 10, 2))
    if overlap:
        bases[1, :, 0] = bases[0, :, 0] + bases[0, :, 1]  # the sum has 5 dimensions, not 6
    x = g.standard_normal((7, 10)) * 10.0 ** np.arange(-3, 4)[:, None]
    span = subspaces.off_span_energy(jnp.asarray(x), jnp.asarray(bases))
    np.testing.assert_allclose(span, shares(x, [np.concatenate(list(bases), 1)])[0], rtol=1e-10)
    union = subspaces.off_union_energy(jnp.asarray(x), jnp.asarray(bases))
    np.testing.assert_allclose(union, shares(x, bases).min(0), rtol=1e-10)


def test_energy_is_found_where_differences_would_cancel():
    bases = linalg.random_frames(jax.random.key(0), 2, 20, 3)
    inside = bases[0] @ jnp.array([1.0, -2.0, 0.5])
    normal = jax.random.normal(jax.random.key(1), (20,))
    normal = normal - linalg.project(jnp.linalg.qr(jnp.concatenate(list(bases), 1))[0], normal)
    x = (1e4 * inside / jnp.linalg.norm(inside) + normal / jnp.linalg.norm(normal))[None]
    assert float(subspaces.off_span_energy(x, bases)[0]) == pytest.approx(1e-8, rel=0.01)


def test_edges():
    bases = linalg.random_frames(jax.random.key(0), 2, 6, 3)
    zero = jnp.zeros((2, 6))
    assert subspaces.off_span_energy(zero, bases).tolist() == [0, 0]
    assert subspaces.off_union_energy(zero, bases).tolist() == [0, 0]
    x = jax.random.normal(jax.random.key(1), (4, 3, 6))
    found = jax.jit(subspaces.off_span_energy)(x, bases)
    assert found.shape == (4, 3) and bool(jnp.all(found < 1e-10))  # six directions span R^6
    assert float(subspaces.off_span_energy(x, 1e-30 * bases).max()) < 1e-10


def test_leading_axes_broadcast(x64):
    """Two sets of subspaces and five vectors; and a set of its own for each batch of vectors."""
    g = np.random.default_rng(1)
    bases, x = g.standard_normal((2, 3, 10, 2)), g.standard_normal((5, 10))
    for fn in (subspaces.off_span_energy, subspaces.off_union_energy):
        alone = np.stack([jax.jit(fn)(jnp.asarray(x), jnp.asarray(b)) for b in bases])
        both = jax.jit(fn)(jnp.asarray(x), jnp.asarray(bases)[:, None])
        np.testing.assert_allclose(both, alone, rtol=1e-12)
        assert jax.eval_shape(fn, jnp.asarray(x[0]), jnp.asarray(bases)).shape == (2,)


@pytest.mark.parametrize("fn", [subspaces.off_span_energy, subspaces.off_union_energy])
def test_gradients(fn, x64):
    """Orthonormal bases have equal singular values; the true gradient is that of the projector."""
    bases = linalg.random_frames(jax.random.key(3), 2, 9, 3, orthogonal=True, dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(4), (4, 9), jnp.float64)

    def explicit(x, bases):
        if fn is subspaces.off_span_energy:
            bases = jnp.concatenate(list(bases), axis=1)[None]
        p = bases @ jnp.linalg.solve(jnp.swapaxes(bases, 1, 2) @ bases, jnp.swapaxes(bases, 1, 2))
        return jnp.sum(1 - jnp.max(jnp.einsum("bn,knm,bm->bk", x, p, x), 1) / jnp.sum(x**2, 1))

    slope = jax.jit(jax.grad(lambda x, b: jnp.sum(fn(x, b)), (0, 1)))
    wanted = jax.jit(jax.grad(explicit, (0, 1)))(x, bases)
    for mine, other in zip(slope(x, bases), wanted, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-12)
    dependent = bases.at[1, :, 0].set(bases[0, :, 0]).at[1, :, 2].set(0)
    for grads in (slope(x, dependent), slope(x.at[0].set(0), bases)):
        assert all(np.isfinite(g).all() for g in grads)


def test_other_dimensions_are_refused(unchecked):
    with pytest.raises(ValueError, match="ambient dimensions differ: expected 6 in x, got 5"):
        subspaces.off_span_energy(jnp.ones((2, 5)), jnp.ones((1, 6, 1)))


def test_matching_with_unequal_ranks():
    bases = linalg.random_frames(jax.random.key(2), 3, 12, 3)
    bases = bases.at[1, :, 2].set(0).at[2, :, 1:].set(0)
    found = jax.jit(subspaces.match_components)(bases, bases[jnp.array([2, 0, 1])])
    assert found.perm.tolist() == [1, 2, 0]
    assert float(found.distance.max()) < 1e-5
