"""The plane of three noises and its map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import generalization
from lowdim_diffusion.distributions import Empirical


def test_plane_holds_its_noises_and_follows_the_formula():
    e1, e2, e3 = np.random.default_rng(0).standard_normal((3, 4, 4, 1)).astype(np.float32)
    plane = jax.jit(lambda *e: generalization.noise_plane(*e, 5))(e1, e2, e3)
    assert plane.shape == (5, 5, 4, 4, 1)
    for corner, e in (((0, 0), e1), ((4, 0), e2), ((0, 4), e3)):
        np.testing.assert_allclose(plane[corner], e, atol=1e-6)
    np.testing.assert_allclose(plane[2, 1], 0.5 * (e2 - e1) + 0.25 * (e3 - e1) + e1, atol=1e-6)
    wide = generalization.noise_plane(e1, e2, e3, 3, span=(-1.0, 1.0))
    np.testing.assert_allclose(wide[1, 1], e1, atol=1e-6)
    np.testing.assert_allclose(wide[0, 2], e3 - e2 + e1, atol=1e-5)


def test_map_of_the_optimal_denoiser_shows_its_cells():
    """At a middling noise level three far points split the plane of noises by distance."""
    data = 10 * np.eye(3, 5, dtype=np.float32)
    plane = np.asarray(generalization.noise_plane(*data, 11, span=(-0.5, 1.5)))

    @jax.jit
    def labels_of(plane):
        denoise = lambda x: Empirical(data).posterior_mean(x, 1.0, 1.0)
        images = denoise(plane.reshape(-1, 5)).reshape(plane.shape)
        return generalization.noise_plane_labels(images, denoise(data), embed=lambda x: x)

    squared = ((plane[:, :, None] - data[None, None]) ** 2).sum(-1)
    ordered = np.sort(squared, -1)
    clear = ordered[..., 1] - ordered[..., 0] > 20  # elsewhere two points share the mean
    nearest = np.argmin(squared, -1)[clear]
    assert clear.mean() > 0.7 and set(nearest) == {0, 1, 2}
    np.testing.assert_array_equal(np.asarray(labels_of(plane))[clear], nearest)


def test_unfit_noises_are_refused(unchecked):
    g, e = generalization, jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"wrong shape of eps3: expected \(2, 3\), got \(3,\)"):
        g.noise_plane(e, e, e[0])
    with pytest.raises(ValueError, match="num too small"):
        g.noise_plane(e, e, e, 1)
    with pytest.raises(ValueError, match="span"):
        g.noise_plane(e, e, e, span=(1, 1))
    with pytest.raises(ValueError, match="shape of images"):
        g.noise_plane_labels(jnp.ones((4, 4, 2)), e)
    with pytest.raises(ValueError, match="images not finite"):
        g.noise_plane_labels(jnp.full((2, 2, 3), jnp.nan), e)
