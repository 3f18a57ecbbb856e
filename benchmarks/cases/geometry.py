"""Angles between subspaces and intrinsic dimension, beside the libraries people use for them."""

import jax
import numpy as np

from benchmarks import peers
from benchmarks.harness import Case, Variant, jitted
from benchmarks.peers.unets import check_close
from lowdim_diffusion import linalg, subspaces

PAIRS = {"smoke": 4, "small": 64, "medium": 256, "large": 1024}
POINTS = {"smoke": 200, "small": 2000, "medium": 2000, "large": 10_000}
DIM, RANK = 192, 10


def _angles(size: str) -> list[Variant]:
    pairs = PAIRS[size]
    frames = linalg.random_frames(jax.random.key(0), 2 * pairs, DIM, RANK)
    u, v = frames[:pairs], frames[pairs:]
    bars = {"scipy, one by one": 0.09}
    ours = jitted("principal_angles", subspaces.principal_angles, u, v, units=pairs, bars=bars)
    if not peers.present("scipy"):
        return [ours]
    from scipy.linalg import subspace_angles

    given = list(zip(np.asarray(u), np.asarray(v), strict=True))
    theirs = lambda: np.stack([subspace_angles(a, b)[::-1] for a, b in given])
    check_close("scipy's angles", theirs(), ours.call(), 1e-3)
    return [ours, Variant("scipy, one by one", theirs, pairs, ours=False)]


def _dimension(size: str) -> list[Variant]:
    """Points on a 6-dimensional subspace, a little curved."""
    key, lift_key = jax.random.split(jax.random.key(0))
    inner = jax.random.normal(key, (POINTS[size], 6))
    x = jax.numpy.sin(inner @ jax.random.normal(lift_key, (6, 24)) / 6)
    ours = {
        "mle": lambda x: subspaces.dimension.mle(x, k=20),
        "two_nn": subspaces.dimension.two_nn,
    }
    bars = {"mle": 0.6, "two_nn": 0.8}
    made = [
        jitted(name, fn, x, bars={f"scikit-dimension, {name}": bars[name]})
        for name, fn in ours.items()
    ]
    if not peers.present("skdim"):
        return made
    import skdim  # pyright: ignore[reportMissingImports]

    points = np.asarray(x, np.float64)
    mle = lambda: skdim.id.MLE().fit(points, n_neighbors=20, comb="mle").dimension_
    two_nn = lambda: skdim.id.TwoNN().fit(points).dimension_
    for variant, theirs in zip(made, (mle, two_nn), strict=True):
        check_close(f"scikit-dimension's {variant.name}", theirs(), variant.call(), 1e-3)
    calls = {"mle": mle, "two_nn": two_nn}
    return made + [Variant(f"scikit-dimension, {n}", c, ours=False) for n, c in calls.items()]


CASES = [
    Case("principal-angles", "pair", _angles, peers=("scipy",)),
    Case("intrinsic-dimension", "set of points", _dimension, peers=("skdim",)),
]
