"""Nearest neighbours in raw pixels: what people run, and the matrix product that all of it needs.

Random bytes of CIFAR's size, smoothed like images, uint8 for ours and float32 for the others, which
would copy. Every variant's neighbours are compared with a search in float64 when the case is made.
scikit-learn and faiss are left out where they are not installed (``pip install scikit-learn
faiss-cpu``).
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.harness import Case, Variant, jitted
from lowdim_diffusion import neighbors

SIZES = {
    "smoke": (20, 100, 48),
    "small": (200, 2000, 768),
    "medium": (2000, 10000, 3072),
    "large": (10000, 50000, 3072),
}
"""Queries, points, numbers per example."""
BARS = {1: 1 / 0.80, 50: 1 / 0.65}
"""Neighbours, and how much of the product's time they may take (at size large)."""
BLOCK = 1000  # queries at a time in the blocked variants


def _images(count: int, dim: int, seed: int) -> np.ndarray:
    """Bytes with the falling spectrum of images: low-rank Gaussians, clipped."""
    g = np.random.default_rng(seed)
    rank = min(dim, 64)
    frame = np.random.default_rng(0).standard_normal((rank, dim), np.float32)
    scales = 60 / np.sqrt(np.arange(1, rank + 1, dtype=np.float32))
    x = (g.standard_normal((count, rank), np.float32) * scales) @ frame
    return np.clip(x / np.sqrt(5) + 128, 0, 255).astype(np.uint8)


def _numpy(x: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """The script people write: blocked products, partition, sort; in single precision."""
    size, found = np.einsum("ij,ij->i", y, y), []
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK]
        squared = size - 2 * (block @ y.T)
        near = np.argpartition(squared, k - 1, axis=1)[:, :k]
        order = np.argsort(np.take_along_axis(squared, near, 1), axis=1)
        found.append(np.take_along_axis(near, order, 1))
    return np.concatenate(found)


def _variants(size: str, k: int) -> list[Variant]:
    num_queries, num, dim = SIZES[size]
    x, y = _images(num_queries, dim, 1), _images(num, dim, 2)
    few = np.linspace(0, num_queries - 1, 20).astype(int)
    exact = np.stack([np.sum((y - x[i].astype(np.int32)) ** 2, axis=1) for i in few])
    exact = np.argsort(exact, axis=1, kind="stable")[:, :k]
    xf, yf = x.astype(np.float32), y.astype(np.float32)

    def gemm(a: Any, b: Any) -> Any:
        block = min(BLOCK, num_queries)
        one = lambda i: jnp.max(jax.lax.dynamic_slice_in_dim(a, i, block) @ b.T)
        return jax.lax.map(one, jnp.arange(0, num_queries - block + 1, block))

    search = lambda x, y: neighbors.nearest(x, y, k)
    bars = {"matrix product alone": BARS[k], "numpy, blocked": 1.0, "faiss, flat": 0.7}
    bars = bars if size == "large" else {}
    ours = jitted("nearest", search, jnp.asarray(x), jnp.asarray(y), bars=bars)
    product = jitted("matrix product alone", gemm, jnp.asarray(xf), jnp.asarray(yf), ours=False)
    blocked = Variant("numpy, blocked", lambda: _numpy(xf, yf, k), ours=False)
    variants = [ours, product, blocked]
    wrong = np.mean(np.asarray(ours.call().index)[few] != exact)
    if wrong:
        raise RuntimeError(f"nearest: {wrong:.1%} of the neighbours are not those of whole numbers")
    if peers.present("sklearn"):
        from sklearn.neighbors import NearestNeighbors

        fitted = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(yf)
        call = lambda: fitted.kneighbors(xf)
        variants.append(Variant("scikit-learn, brute", call, ours=False))
    if peers.present("faiss"):
        import faiss  # pyright: ignore[reportMissingImports]

        faiss.omp_set_num_threads(os.cpu_count() or 1)
        index = faiss.IndexFlatL2(dim)
        index.add(yf)
        variants.append(Variant("faiss, flat", lambda: index.search(xf, k), ours=False))
    return variants


def _case(k: int) -> Case:
    build, libraries = lambda size: _variants(size, k), ("sklearn", "faiss")
    return Case(f"nearest-neighbours-{k}", "search", build, most_rounds=3, peers=libraries)


CASES = [_case(k) for k in BARS]
