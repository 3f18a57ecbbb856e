"""Principal angles against published values, scipy and constructions with known angles."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from lowdim_diffusion import linalg, subspaces
from lowdim_diffusion.subspaces._assignment import assign


def _all(u, v):
    """Every distance in one program: op by op costs several times as much."""
    return {
        "angles": subspaces.principal_angles(u, v),
        "projector": subspaces.projector_distance(u, v),
        "chordal": subspaces.chordal_distance(u, v),
        "geodesic": subspaces.geodesic_distance(u, v),
        "affinity": subspaces.affinity(u, v),
    }


measure = jax.jit(_all)
match_components = jax.jit(subspaces.match_components)
random_frames = jax.jit(linalg.random_frames, static_argnums=(1, 2, 3))


def frames_at(angles, dim, q=None, seed=0):
    """Two frames with exactly these principal angles, in random bases and a random rotation."""
    p = len(angles)
    q = p if q is None else q
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    u = np.eye(dim)[:, :p]
    v = np.zeros((dim, q))
    v[np.arange(p), np.arange(p)] = np.cos(angles)
    v[q + np.arange(p), np.arange(p)] = np.sin(angles)
    v[np.arange(p, q), np.arange(p, q)] = 1
    mix = lambda r: np.linalg.qr(rng.standard_normal((r, r)))[0]
    return rotation @ u @ mix(p), rotation @ v @ mix(q)


def test_published_check_values(x64):
    rng = np.random.default_rng(0)
    u, v = jnp.asarray(rng.standard_normal((20, 5))), jnp.asarray(rng.standard_normal((20, 5)))
    expected = [
        0.52983130893180,
        0.96640240290775,
        1.11736424153419,
        1.23708315118279,
        1.56606911385430,
    ]
    got = measure(u, v)
    np.testing.assert_allclose(got["angles"], expected, atol=1e-13)
    np.testing.assert_allclose(got["geodesic"], 2.53891804925317, atol=1e-13)
    np.testing.assert_allclose(got["chordal"], 1.90611882258521, atol=1e-13)
    np.testing.assert_allclose(got["projector"], 2.69565909039464, atol=1e-13)
    np.testing.assert_allclose(got["affinity"], 0.52282139089528, atol=1e-13)
    rng = np.random.default_rng(1)
    u, v = jnp.asarray(rng.standard_normal((30, 3))), jnp.asarray(rng.standard_normal((30, 7)))
    expected = [0.87105592220293, 1.07116349639620, 1.24956855732360]
    for got in (measure(u, v), measure(v, u)):
        np.testing.assert_allclose(got["angles"], expected, atol=1e-13)
        np.testing.assert_allclose(got["projector"], 2.91753761692849, atol=1e-13)


def test_tiny_and_wide_angles_together(x64):
    for angles in (
        [1e-12, 1e-9, 1e-6, 0.7, np.pi / 2 - 1e-9],
        [0.0, 0.0, 3e-9, np.pi / 4, np.pi / 2],
        [1e-9, np.pi / 4 - 1e-8, np.pi / 4, np.pi / 4 + 1e-8, 1.5],
        [1e-9] * 5,
    ):
        u, v = frames_at(np.array(angles), 14)
        got = measure(jnp.asarray(u), jnp.asarray(v))["angles"]
        np.testing.assert_allclose(got, angles, atol=5e-15)


def test_tiny_angles_in_float32():
    u, v = frames_at(np.array([1e-5, 0.5, 1.5707]), 10)
    got = measure(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))["angles"]
    np.testing.assert_allclose(got, [1e-5, 0.5, 1.5707], atol=1e-6)


@pytest.mark.parametrize(("n", "p", "q"), [(1, 1, 1), (6, 2, 6), (12, 5, 3)])
def test_agrees_with_scipy_and_projectors(x64, n, p, q):
    rng = np.random.default_rng(n)
    us, vs = rng.standard_normal((8, n, p)), rng.standard_normal((8, n, q))
    vs[4:, :, : min(p, q)] = us[4:, :, : min(p, q)] + 10.0 ** -rng.integers(1, 9, (4, n, 1))
    projector = lambda a: a @ np.linalg.pinv(a)
    a, b = jnp.asarray(us), jnp.asarray(vs)
    got = measure(a, b)
    angles, distance, share = got["angles"], got["projector"], got["affinity"]
    for i, (u, v) in enumerate(zip(us, vs, strict=True)):
        np.testing.assert_allclose(angles[i], scipy.linalg.subspace_angles(u, v)[::-1], atol=5e-8)
        pu, pv = projector(u), projector(v)
        np.testing.assert_allclose(distance[i], np.linalg.norm(pu - pv), atol=1e-7)
        np.testing.assert_allclose(share[i] ** 2, np.trace(pu @ pv) / min(p, q), atol=1e-9)


def test_same_span_in_other_bases_and_scales(x64):
    rng = np.random.default_rng(3)
    u = rng.standard_normal((9, 4))
    scales = np.array([1e-7, 1.0, 1e6, 1e-200])
    v = (u @ rng.standard_normal((4, 4))) * scales
    got = measure(jnp.asarray(u), jnp.asarray(v))["angles"]
    np.testing.assert_allclose(got, 0, atol=1e-13)


def test_contained_orthogonal_full_and_one_dimensional():
    eye = jnp.eye(6)
    inside = measure(eye[:, :2], eye[:, :5])
    assert inside["angles"].tolist() == [0, 0]
    np.testing.assert_allclose(inside["projector"], np.sqrt(3), rtol=1e-6)
    assert float(inside["chordal"]) == float(inside["geodesic"]) == 0
    apart = measure(eye[:, :2], eye[:, 2:4])
    np.testing.assert_allclose(apart["angles"], np.pi / 2)
    np.testing.assert_allclose(apart["projector"], 2)
    np.testing.assert_allclose(apart["geodesic"], np.pi / np.sqrt(2), rtol=1e-6)
    assert float(apart["affinity"]) < 1e-7
    np.testing.assert_allclose(measure(eye, eye[:, :3])["angles"], 0, atol=1e-6)
    line = -3 * jnp.ones((1, 1))
    assert measure(line, jnp.ones((1, 1)))["angles"].tolist() == [0]


def test_batches_broadcast_and_jit_vmap_agree(key):
    u = random_frames(key, 5, 12, 3)
    v = random_frames(jax.random.fold_in(key, 1), 1, 12, 4)[0]
    got = measure(u, v)["angles"]
    assert got.shape == (5, 3)
    np.testing.assert_allclose(got, subspaces.principal_angles(u, v), atol=1e-6)  # op by op
    mapped = jax.jit(jax.vmap(subspaces.principal_angles, (0, None)))(u, v)
    np.testing.assert_allclose(got, mapped, atol=1e-6)


def test_every_distance_takes_leading_axes(x64):
    """Axes of u, of v and of both, one absent column among the frames: as one pair at a time."""
    rng = np.random.default_rng(7)
    us, vs = rng.standard_normal((2, 1, 9, 3)), rng.standard_normal((4, 9, 2))
    got = measure(jnp.asarray(us), jnp.asarray(vs))
    assert got.pop("angles").shape == (2, 4, 2)
    for name, value in got.items():
        assert value.shape == (2, 4), name
    sines = np.stack([[[np.sin(scipy.linalg.subspace_angles(u[0], v)) for v in vs] for u in us]])[0]
    np.testing.assert_allclose(got["chordal"], np.linalg.norm(sines, axis=-1), atol=1e-7)
    np.testing.assert_allclose(got["affinity"], np.sqrt(np.mean(1 - sines**2, -1)), atol=1e-7)
    us[1, 0, :, 1] = 0
    present = us[0, 0], us[1, 0][:, [0, 2]]
    wanted = [[np.linalg.norm(projector(u) - projector(v)) for v in vs] for u in present]
    found = jax.jit(subspaces.projector_distance)(jnp.asarray(us), jnp.asarray(vs))
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_errors_name_the_function_that_was_called(unchecked):
    u, flat = jnp.eye(4)[:, :2], jnp.ones((4, 2))
    for fn in (
        subspaces.principal_angles,
        subspaces.projector_distance,
        subspaces.spectral_distance,
        subspaces.chordal_distance,
        subspaces.geodesic_distance,
        subspaces.affinity,
    ):
        with pytest.raises(ValueError, match=f"^{fn.__name__}: the columns of v are not linearly"):
            fn(u, flat)
        with pytest.raises(
            ValueError, match=f"^{fn.__name__}: wrong shape of u: .* a\\[:, None\\]"
        ):
            fn(u[:, 0], u)
    with pytest.raises(
        ValueError, match=r"^match_components: the columns of bases are not linearly"
    ):
        subspaces.match_components(u[None], flat[None])
    with pytest.raises(
        ValueError, match=r"^match_components: ambient dimensions differ: .* in bases"
    ):
        subspaces.match_components(u[None], u[None, :3])
    with pytest.raises(ValueError, match=r"^match_components: wrong shape of bases"):
        subspaces.match_components(u[None], u)


def test_dependent_columns_are_refused():
    u = jax.random.normal(jax.random.key(0), (8, 3))
    bad = jnp.stack([u[:, 0], u[:, 1], u[:, 0] - 2 * u[:, 1]], axis=1)
    with pytest.raises(ValueError, match="columns of v are not linearly independent"):
        subspaces.principal_angles(u, bad)
    with pytest.raises(ValueError, match="columns of u are not linearly independent"):
        subspaces.principal_angles(u.at[:, 1].set(0), u)
    with pytest.raises(ValueError, match="columns of u are not linearly independent"):
        subspaces.projector_distance(bad, u)
    with pytest.raises(ValueError, match="columns of u are not linearly independent"):
        subspaces.projector_distance(bad.at[:, 0].set(0).at[:, 2].set(2 * bad[:, 1]), u)
    with pytest.raises(ValueError, match="not linearly independent"):
        subspaces.affinity(u.at[2, 1].set(jnp.nan), u)
    # No raise inside jit, and no number either: a failed training must not look like a recovery.
    for frame in (bad, u.at[2, 1].set(jnp.nan), jnp.full_like(u, jnp.nan)):
        for name, value in measure(frame, u).items():
            assert np.isnan(value).all(), name
    pair = jnp.stack([u, u])
    found = jax.jit(subspaces.match_components)(pair, pair.at[1].set(jnp.nan))
    assert np.isnan(found.distance).any()


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="ambient dimensions differ"):
        subspaces.principal_angles(jnp.eye(4)[:, :2], jnp.eye(5)[:, :2])
    with pytest.raises(ValueError, match="wrong number of columns in u"):
        subspaces.principal_angles(jnp.ones((2, 3)), jnp.eye(2))


def test_gradients_are_finite_and_right(x64):
    u, v = (jnp.asarray(a) for a in frames_at(np.array([0.3, 0.9, 1.2]), 8))
    loss = jax.jit(lambda u: subspaces.geodesic_distance(u, v))
    direction = jnp.asarray(np.random.default_rng(0).standard_normal(u.shape))
    slope = jnp.vdot(jax.jit(jax.grad(loss))(u), direction)
    h = 1e-6
    finite = (loss(u + h * direction) - loss(u - h * direction)) / (2 * h)
    np.testing.assert_allclose(slope, finite, rtol=1e-6)
    for w in (u, frames_at(np.full(3, np.pi / 2), 8)[1] @ np.eye(3)):
        assert np.isfinite(jax.jit(jax.grad(lambda w: subspaces.projector_distance(w, u)))(w)).all()


def test_gradients_beside_absent_columns_and_equal_angles(x64):
    """An absent column has gradient 0 and leaves that of the others alone; second derivatives."""
    u, v = (jnp.asarray(a) for a in frames_at(np.array([0.4, 0.4, 1.1]), 8))
    squared = lambda u: subspaces.projector_distance(u, v) ** 2
    explicit = lambda u: jnp.sum((u @ jnp.linalg.solve(u.T @ u, u.T) - v @ v.T) ** 2)
    push = jnp.asarray(np.random.default_rng(1).standard_normal(u.shape))
    slopes = jax.jit(lambda f, u: jax.jvp(jax.grad(f), (u,), (push,)), static_argnums=0)
    for mine, wanted in zip(slopes(squared, u), slopes(explicit, u), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-10)
    padded = jnp.concatenate([u[:, :1], jnp.zeros((8, 1)), u[:, 1:]], axis=1)
    slope = jax.jit(jax.grad(squared))(padded)
    np.testing.assert_allclose(slope[:, [0, 2, 3]], slopes(explicit, u)[0], atol=1e-12)
    assert not slope[:, 1].any()


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 5), (5, 5), (9, 12)])
@pytest.mark.parametrize("ties", [False, True])
def test_assignment_is_optimal(rows, cols, ties):
    costs = np.random.default_rng(rows).standard_normal((60, rows, cols))
    costs = np.round(costs) if ties else costs
    got = np.asarray(jax.jit(jax.vmap(assign))(jnp.asarray(costs, jnp.float32)))
    for cost, choice in zip(costs, got, strict=True):
        assert len(set(choice.tolist())) == rows
        best = cost[scipy.optimize.linear_sum_assignment(cost)].sum()
        np.testing.assert_allclose(cost[np.arange(rows), choice].sum(), best, atol=1e-5)


def test_assignment_beats_greedy_and_survives_nan():
    cost = jnp.array([[-6.0, -5.0], [-5.0, -1.0]])
    assert jax.jit(assign)(cost).tolist() == [1, 0]
    cost = jnp.array([[jnp.nan, 1.0, 5.0], [jnp.inf, 0.0, 9.0]])
    assert jax.jit(assign)(cost).tolist() == [2, 1]
    assert sorted(jax.jit(assign)(jnp.full((3, 3), jnp.nan)).tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="more rows than columns"):
        assign(jnp.ones((3, 2)))


@pytest.mark.parametrize("num", [1, 9])
def test_matching_recovers_a_permutation(key, num):
    bases = random_frames(key, num, 30, 3)
    order = jax.random.permutation(jax.random.fold_in(key, 1), num)
    rotation = random_frames(jax.random.fold_in(key, 2), num, 3, 3)
    noise = 1e-3 * jax.random.normal(jax.random.fold_in(key, 3), bases.shape)
    learned = ((bases + noise) @ rotation)[order]
    found = match_components(bases, learned)
    assert found.perm.tolist() == np.argsort(np.asarray(order)).tolist()
    assert float(found.distance.max()) < 0.03
    np.testing.assert_allclose(
        found.distance, measure(bases, learned[found.perm])["projector"], atol=1e-5
    )


def test_matching_minimises_over_all_permutations(key):
    true = random_frames(key, 4, 10, 3)
    learned = random_frames(jax.random.fold_in(key, 1), 5, 10, 2)
    table = np.asarray(measure(true[:, None], learned[None])["projector"])
    best = min(sum(table[i, p[i]] for i in range(4)) for p in itertools.permutations(range(5), 4))
    perm, distance = match_components(true, learned)
    np.testing.assert_allclose(distance.sum(), best, rtol=1e-5)
    assert len(set(perm.tolist())) == 4
    with pytest.raises(ValueError, match="too few components"):
        subspaces.match_components(learned, true)
    several = jnp.stack([learned, learned[::-1]])[:, None]
    batched = jax.jit(subspaces.match_components)(true, several)
    assert batched.perm.shape == batched.distance.shape == (2, 1, 4)
    np.testing.assert_array_equal(batched.perm[:, 0], [perm, 4 - perm])
    np.testing.assert_allclose(batched.distance[:, 0], [distance, distance], rtol=1e-5)
    mapped = jax.jit(jax.vmap(subspaces.match_components, (None, 0)))(true, several[:, 0])
    np.testing.assert_array_equal(mapped.perm, batched.perm[:, 0])


def test_zero_columns_count_as_absent(x64):
    g = np.random.default_rng(3)
    u, v = g.standard_normal((12, 3)), g.standard_normal((12, 5))
    wanted = np.linalg.norm(projector(u) - projector(v[:, [0, 2, 4]]))
    gaps = v.copy()
    gaps[:, [1, 3]] = 0
    padded = np.concatenate([np.zeros((12, 2)), u], axis=1)
    for a, b in ((u, gaps), (gaps, u), (padded, gaps), (gaps, padded)):
        found = jax.jit(subspaces.projector_distance)(jnp.asarray(a), jnp.asarray(b))
        assert float(found) == pytest.approx(wanted, abs=1e-12)
    none = jnp.zeros((12, 2))
    assert float(subspaces.projector_distance(none, jnp.asarray(u))) == pytest.approx(3**0.5)
    assert float(subspaces.projector_distance(none, none)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("columns", [(2, 2), (3, 3), (2, 4), (4, 1)])
def test_spectral_distance_is_the_norm_of_the_difference(columns, x64):
    g = np.random.default_rng(5)
    u, v = (g.standard_normal((9, k)) for k in columns)
    wanted = np.linalg.norm(projector(u) - projector(v), 2)
    found = subspaces.spectral_distance(jnp.asarray(u), jnp.asarray(v))
    assert float(found) == pytest.approx(wanted, abs=1e-12)


def test_projector_distance_resolves_tiny_angles(x64):
    for angle in (1e-12, 1e-9, 1e-5, 1.0):
        u, v = (jnp.asarray(a) for a in frames_at(np.array([angle, 0.0]), 8))
        found = float(subspaces.projector_distance(u, v))
        assert found == pytest.approx(2**0.5 * np.sin(angle), rel=1e-6, abs=1e-15)


def projector(a):
    q = np.linalg.svd(a, full_matrices=False)[0]
    return q @ q.T
