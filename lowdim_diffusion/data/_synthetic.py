"""Data that need no file: the embedded digits, and samples of a mixture of low-rank Gaussians."""

from importlib import resources

import jax
import numpy as np

from lowdim_diffusion._checks import check_int
from lowdim_diffusion.data._dataset import Dataset, from_arrays


def digits() -> Dataset:
    """Return the 1,797 handwritten digits of 8x8 pixels that scikit-learn distributes.

    Their 17 grey levels ``v`` in 0..16 are stretched to 0..255 as ``(255 v + 8) // 16``, that is
    ``255 v / 16`` rounded to the nearest.

    References:
        Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI, CC BY 4.0
        (``DIGITS_LICENSE.txt`` beside this file).
    """
    with resources.files("lowdim_diffusion.data").joinpath("digits.npz").open("rb") as file:
        with np.load(file) as table:
            levels, labels = table["images"], table["labels"]
    pictures = (levels.astype(np.uint16) * 255 + 8) // 16
    names = [str(digit) for digit in range(10)]
    return from_arrays(pictures, labels, name="digits", source="embedded digits", class_names=names)


def molrg(
    *,
    dim: int = 48,
    rank: int = 6,
    num_components: int = 2,
    num_samples: int = 1024,
    noise_std: float = 0.0,
    seed: int = 0,
    orthogonal: bool = True,
) -> Dataset:
    r"""Return samples of :math:`\tfrac1K \sum_k N(0, U_k U_k^T + \nu^2 I)`, random frames ``U_k``.

    Labels are the components; ``truth`` is the distribution itself (:class:`distributions.MoLRG`),
    so that learned and exact denoisers can be compared.

    Args:
        dim: ambient dimension n.
        rank: subspace dimension d.
        num_components: K.
        num_samples: N.
        noise_std: standard deviation nu of isotropic noise on the data, >= 0.
        seed: decides frames and samples.
        orthogonal: mutually orthogonal subspaces, which needs ``K d <= n``.

    Examples:
        >>> from lowdim_diffusion import data
        >>> made = data.molrg(dim=16, rank=2, num_samples=100)
        >>> made.images.shape, made.truth.bases.shape
        ((100, 16), (2, 16, 2))

    References:
        Wang et al. 2024, arXiv 2409.02426.
    """
    from lowdim_diffusion.distributions import MoLRG
    from lowdim_diffusion.linalg import random_frames

    check_int("molrg", "num_samples", num_samples)
    check_int("molrg", "seed", seed, 0)
    frame_key, sample_key = jax.random.split(jax.random.key(seed))
    bases = random_frames(frame_key, num_components, dim, rank, orthogonal=orthogonal)
    truth = MoLRG(bases, noise_std=noise_std)
    x, labels = truth.sample(sample_key, num_samples)
    names = [f"component {k}" for k in range(num_components)]
    return from_arrays(
        np.asarray(x), np.asarray(labels), name="molrg", class_names=names, truth=truth
    )
