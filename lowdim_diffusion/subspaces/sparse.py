r"""Subspace clustering by self-expression: each point written by the other points.

A point of a union of subspaces is a combination of other points of its own subspace, and a *sparse*
one uses only those. With unit rows ``x_i``, row i of the coefficient matrix C ``[N, N]`` has
``x_i ~ sum_j C_ij x_j`` and ``C_ii = 0``:

===========  ==================================================================================
``ssc_omp``  few nonzeros, chosen greedily (orthogonal matching pursuit)
``ensc``     ``min tau ||c||_1 + (1-tau)/2 ||c||^2 + gamma_i/2 ||x_i - sum_j c_j x_j||^2``
``tsc``      the nearest points by angle, weighted by it: nothing is solved
``lsr``      ``min lambda/2 ||c||^2 + 1/2 ||x_i - sum_j c_j x_j||^2``, dense, in closed form
===========  ==================================================================================

``|C| + |C|^T`` is then the weight of a graph, and spectral clustering cuts it into K parts::

    c = ssc_omp(x)
    labels = spectral_clustering(coefficient_affinity(c), 5, key=key)

which is what :func:`sparse_subspace_clustering` does. Subspaces pass through the origin: do not
centre the data, and give images as 0..255 or 0..1, not -1..1. Only directions matter; lengths are
divided out. These are baselines for unions of subspaces: they find groups, not bases, and unlike
K-subspaces they group orthogonal subspaces even from fewer points than dimensions.

The coefficients are pure JAX (not differentiable), ``[N, N]`` numbers and working memory for
``batch_size`` points at once. The eigenvectors cost N^3; k-means comes from scikit-learn.

References:
    Elhamifar & Vidal 2013, arXiv 1203.1005 (sparse subspace clustering);
    You, Robinson & Vidal 2016, arXiv 1507.01238 (by orthogonal matching pursuit);
    You, Li, Robinson & Vidal 2016, arXiv 1605.02633 (elastic net);
    Heckel & Boelcskei 2015, arXiv 1307.4891 (thresholding);
    Lu et al. 2012, arXiv 1404.6736 (least squares regression);
    Ng, Jordan & Weiss 2001 (the spectral clustering used here).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, check_range, fail, is_concrete
from lowdim_diffusion._types import Array, ArrayLike, Float, Int, PRNGKey, Scalar
from lowdim_diffusion.linalg import safe_sqrt
from lowdim_diffusion.sharding import vary_like

_HIGHEST = jax.lax.Precision.HIGHEST


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=_HIGHEST)


def _rounding(x: Array) -> float:
    """Inner products of unit vectors below this are taken for zero."""
    return 100 * float(jnp.finfo(x.dtype).eps)


def _unit_rows(where: str, x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] == 0:
        raise fail(where, "wrong shape of x", "(N, n) with N >= 2 points, n >= 1", x.shape)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if is_concrete(x) and not bool(jnp.all(jnp.isfinite(x))):
        raise fail(where, "x is not finite", "finite entries", "NaN or infinity")
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)  # two steps, so that no square over- or underflows
    norm = safe_sqrt(jnp.sum(x**2, axis=1, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1)


def _each_row(solve: Callable[[Array, Array], Any], x: Array, batch_size: int) -> Any:
    """``solve(x_i, i)`` for every row, ``batch_size`` at once, in batches of nearly equal size."""
    num_batches = -(-x.shape[0] // batch_size)
    rows = jnp.arange(x.shape[0])
    return jax.lax.map(lambda row: solve(*row), (x, rows), batch_size=-(-x.shape[0] // num_batches))


def ssc_omp(
    x: Float[Array, "num_samples n"],
    *,
    num_nonzero: int = 5,
    tol: Scalar = 1e-6,
    batch_size: int = 256,
) -> Float[Array, "num_samples num_samples"]:
    r"""Return sparse self-expressive coefficients by orthogonal matching pursuit.

    For each point: add the other point with the largest ``|<x_j, residual>|``, fit all chosen ones
    by least squares, repeat. Residuals are formed explicitly against an orthonormal basis of the
    chosen points, so float32 suffices even for near copies.

    Args:
        x: ``[N, n]``, one point per row, any lengths; a zero row gets a zero row of C.
        num_nonzero: most points used for one, <= N - 1; about the subspaces' dimension.
        tol: a point is done once its squared relative residual is at most this.
        batch_size: points at once; working memory is about ``batch_size (N + num_nonzero n)``.

    Returns:
        C ``[N, N]``, zero diagonal, at most ``num_nonzero`` entries per row, for unit rows.

    Raises:
        ValueError: if there are fewer than 2 points, ``num_nonzero >= N``, or (outside ``jit``)
            entries that are not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[2.0, 0, 0], [1, 0, 0], [0, 3, 4], [0, -3, -4]])
        >>> ssc_omp(x, num_nonzero=1).round(3).tolist()
        [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0], [0.0, 0.0, -1.0, 0.0]]

    References:
        You, Robinson & Vidal 2016, arXiv 1507.01238, algorithms 1 and 2.
    """
    where = "ssc_omp"
    check_int(where, "num_nonzero", num_nonzero)
    check_int(where, "batch_size", batch_size)
    check_range(where, "tol", tol, 0)
    x = _unit_rows(where, x)
    num_samples, dim = x.shape
    if num_nonzero >= num_samples:
        expected = f"at most the {num_samples - 1} other points"
        raise fail(where, "num_nonzero too large", expected, num_nonzero)

    def solve(y: Array, i: Array) -> Array:
        others = jnp.arange(num_samples) != i

        def pick(state: tuple[Array, Array], step: Array) -> Any:
            residual, frame = state
            coherence = jnp.where(others, jnp.abs(_matmul(x, residual)), 0)
            best = jnp.argmax(coherence)
            # Points chosen before are orthogonal to the residual up to rounding.
            useful = (jnp.sum(residual**2) > tol) & (coherence[best] > _rounding(x))
            new = jnp.where(useful, x[best], 0)
            inside = _matmul(frame, new)
            new = new - _matmul(inside, frame)
            again = _matmul(frame, new)  # a second pass, without which near copies lose the frame
            new = new - _matmul(again, frame)
            norm = safe_sqrt(jnp.sum(new**2))
            new = new / jnp.where(norm > 0, norm, 1)
            residual = residual - jnp.dot(new, residual, precision=_HIGHEST) * new
            state = residual, frame.at[step].set(new)
            return state, (best, (inside + again).at[step].set(jnp.where(norm > 0, norm, 1)))

        start = (y, jnp.zeros((num_nonzero, dim), x.dtype))
        (_, frame), (chosen, triangle) = jax.lax.scan(
            pick, vary_like(start, x), jnp.arange(num_nonzero)
        )
        # The chosen points are triangle @ frame: row t ends on the diagonal, 1 where none was.
        c = jax.scipy.linalg.solve_triangular(triangle, _matmul(frame, y), lower=True, trans=1)
        return jnp.zeros(num_samples, x.dtype).at[chosen].add(c)

    return _each_row(solve, x, batch_size)


class ElasticNetInfo(NamedTuple):
    """How the iteration of :func:`ensc` ended, for each point."""

    violation: Float[Array, " num_samples"]
    """Largest violation of the optimality conditions, over lambda; converged if <= tol."""
    num_iters: Int[Array, " num_samples"]
    """Linear systems solved."""


def ensc(
    x: Float[Array, "num_samples n"],
    *,
    tau: Scalar = 0.9,
    gamma: Scalar = 50.0,
    max_nonzero: int = 64,
    max_iters: int = 500,
    tol: Scalar = 1e-3,
    batch_size: int = 128,
    return_info: bool = False,
) -> Any:
    r"""Return self-expressive coefficients by the elastic net; with ``tau = 1``, the lasso of SSC.

    Row i of C minimises, with ``c_i = 0`` and unit rows,

    .. math:: \tau \|c\|_1 + \frac{1 - \tau}{2} \|c\|^2
        + \frac{\gamma_i}{2} \|x_i - \sum_j c_j x_j\|^2, \qquad
        \gamma_i = \gamma \, \frac{\tau}{\max_{j \ne i} |\langle x_i, x_j \rangle|} .

    ``gamma`` is relative: the fraction is the largest weight at which c is still zero. Divided by
    ``gamma_i`` this is the usual elastic net with penalty ``lambda_i = 1 / gamma_i``.

    Solved exactly on the active set, which starts empty, as Lawson and Hanson solve nonnegative
    least squares: the point that violates ``|<x_j, residual>| <= lambda tau`` most enters with its
    sign, the stationary point for these signs is one linear system, and a coefficient that would
    change its sign on the way there leaves.

    Args:
        x: ``[N, n]``, one point per row, any lengths. A row orthogonal to all others (up to
            rounding) gets a zero row of C, as does a zero row.
        tau: in (0, 1], the share of the l1 norm. Below 1, equal points share the weight.
        gamma: > 0; at most 1 gives zeros, 5 to 500 is usual, less for noisier data.
        max_nonzero: most points used for one. A row that reaches it stops there, optimal for those
            it has; time grows with the cube of it.
        max_iters: bound on linear systems per point; about 2 per nonzero are needed.
        tol: a point is done once no condition is violated by more than ``tol lambda``; in float32
            not much below ``1e-5 gamma``.
        batch_size: points at once; memory ``batch_size (N + max_nonzero (n + max_nonzero))``.
        return_info: also return :class:`ElasticNetInfo`, which says whether it converged.

    Returns:
        C ``[N, N]``, zero diagonal; with ``return_info`` ``(C, info)``.

    Raises:
        ValueError: if a setting is out of range, there are fewer than 2 points, or (outside
            ``jit``) entries are not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[2.0, 0, 0], [1, 0, 0], [0, 3, 4], [0, -3, -4]])
        >>> ensc(x, tau=1.0, gamma=10.0).round(3)[2].tolist()
        [0.0, 0.0, 0.0, -0.9...]

    References:
        You, Li, Robinson & Vidal 2016, arXiv 1605.02633, proposition 1 (the scale of gamma);
        Lawson & Hanson 1974, Solving least squares problems, chapter 23.
    """
    where = "ensc"
    check_range(where, "tau", tau, 0, 1, low_open=True, fix="for tau = 0 see lsr")
    check_range(where, "gamma", gamma, 0, low_open=True)
    check_range(where, "tol", tol, 0)
    for name, value in (
        ("max_nonzero", max_nonzero),
        ("max_iters", max_iters),
        ("batch_size", batch_size),
    ):
        check_int(where, name, value)
    x = _unit_rows(where, x)
    num_samples, dim = x.shape
    width = min(max_nonzero, num_samples - 1)
    # Keeps the systems solvable where tau = 1 and the active points are dependent.
    ridge = 4 * min(width, dim + 1) * float(jnp.finfo(x.dtype).eps)

    def solve(y: Array, i: Array) -> tuple[Array, Array, Array]:
        self_ = jnp.arange(num_samples) == i
        coherence = jnp.max(jnp.where(self_, 0, jnp.abs(_matmul(x, y))))
        alone = coherence <= _rounding(x)  # then the penalty keeps c at zero
        penalty = jnp.where(alone, 1 / tau, coherence / (tau * gamma))
        l1, l2 = tau * penalty, jnp.maximum((1 - tau) * penalty, ridge)

        def iterate(carry: Any) -> Any:
            (sign, c, atoms, index, gram, target), settled, _, num_iters, _ = carry
            # Optimal for the active set: look for a point to add.
            gradient = _matmul(x, y - _matmul(c, atoms))
            known = self_.at[index].max(sign != 0)
            excess = jnp.where(known, -jnp.inf, jnp.abs(gradient) - l1)
            best = jnp.argmax(excess).astype(jnp.int32)
            violation = jnp.maximum(excess[best], 0) / penalty
            slot = jnp.argmin(jnp.abs(sign))
            full = sign[slot] != 0
            done = settled & ((violation <= tol) | full)
            enters = settled & ~done
            put = lambda old, new: jnp.where(enters, old.at[slot].set(new), old)
            sign = put(sign, jnp.sign(gradient[best]))
            atoms, index = put(atoms, x[best]), put(index, best)
            products = _matmul(atoms, x[best])
            gram = jnp.where(enters, gram.at[slot].set(products).at[:, slot].set(products), gram)
            target = put(target, jnp.dot(x[best], y, precision=_HIGHEST))
            # Stationary point for these signs, and the way there.
            active = sign != 0
            system = jnp.where(active[:, None] & active[None, :], gram, 0)
            system = system + jnp.diag(jnp.where(active, l2, 1))
            factor = jax.scipy.linalg.cho_factor(system, lower=True)
            goal = jax.scipy.linalg.cho_solve(factor, jnp.where(active, target - l1 * sign, 0))
            crosses = active & ~(goal * sign > 0)
            way = jnp.where(crosses & (c != goal), c - goal, 1)
            part = jnp.where(crosses, c / way, jnp.inf)
            step = jnp.minimum(jnp.min(part), 1)
            leaves = crosses & (part <= step)
            c = jnp.where(active & ~leaves, c + step * (goal - c), 0)
            sign = jnp.where(leaves, 0, sign)
            state = (sign, c, atoms, index, gram, target)
            return state, ~jnp.any(crosses), done, num_iters + 1, violation

        zeros = jnp.zeros(width, x.dtype)
        state = (
            zeros,
            zeros,
            jnp.zeros((width, dim), x.dtype),
            jnp.zeros(width, jnp.int32),
            jnp.zeros((width, width), x.dtype),
            zeros,
        )
        start = (state, jnp.array(True), jnp.array(False), jnp.array(0), jnp.zeros((), x.dtype))
        running = lambda carry: ~carry[2] & (carry[3] < max_iters)
        (_, c, _, index, _, _), _, _, num_iters, violation = jax.lax.while_loop(
            running, iterate, vary_like(start, x)
        )
        return jnp.zeros(num_samples, x.dtype).at[index].add(c), violation, num_iters

    c, violation, num_iters = _each_row(solve, x, batch_size)
    return (c, ElasticNetInfo(violation, num_iters)) if return_info else c


def lsr(
    x: Float[Array, "num_samples n"], *, penalty: Scalar = 0.1
) -> Float[Array, "num_samples num_samples"]:
    r"""Return dense self-expressive coefficients by ridge regression on the other points.

    Row i of C minimises ``||x_i - sum_j c_j x_j||^2 + penalty ||c||^2`` with ``c_i = 0`` and unit
    rows, which for all rows together is

    .. math:: C_{ij} = - D_{ij} / D_{ii}, \quad i \ne j, \qquad D = (X X^T + \lambda I)^{-1}.

    Args:
        x: ``[N, n]``, one point per row, any lengths.
        penalty: lambda > 0. Results depend on it strongly.

    Raises:
        ValueError: if ``penalty`` is not positive, or x as in :func:`ssc_omp`.

    Examples:
        >>> import jax.numpy as jnp
        >>> c = lsr(jnp.array([[2.0, 0], [1, 0], [0, 3]]), penalty=0.25)
        >>> float(c[0, 1].round(3))
        0.80...

    References:
        Lu et al. 2012, arXiv 1404.6736, theorem 6.
    """
    where = "lsr"
    check_range(where, "penalty", penalty, 0, low_open=True)
    x = _unit_rows(where, x)
    eye = jnp.eye(x.shape[0], dtype=x.dtype)
    gram = _matmul(x, x.T)
    factor = jax.scipy.linalg.cho_factor(gram + penalty * eye, lower=True)
    inverse = jax.scipy.linalg.cho_solve(factor, eye)
    c = -inverse / jnp.diagonal(inverse)[:, None]
    # A row of nothing but rounding must not become weights when rows are scaled to unit length.
    related = jnp.max(jnp.abs(gram) * (1 - eye), axis=1, keepdims=True) > _rounding(x)
    return jnp.where((eye == 0) & related, c, 0)


def tsc(
    x: Float[Array, "num_samples n"], *, num_nearest: int = 3
) -> Float[Array, "num_samples num_samples"]:
    r"""Return the weights of thresholding-based subspace clustering.

    .. math:: C_{ij} = \exp(-2 \arccos |\langle x_i, x_j \rangle|)

    for the ``num_nearest`` other points with the largest ``|<x_i, x_j>|``, of unit rows, and 0 for
    the rest. Nothing is solved, so it is the cheapest of these baselines.

    Args:
        x: ``[N, n]``, one point per row, any lengths; a zero row gets a zero row of C.
        num_nearest: q, <= N - 1; about the number of points that surely share a subspace.

    Raises:
        ValueError: if ``num_nearest >= N``, or x as in :func:`ssc_omp`.

    Examples:
        >>> import jax.numpy as jnp
        >>> c = tsc(jnp.array([[2.0, 0, 0], [-1, 0, 0], [0, 3, 4]]), num_nearest=1)
        >>> c.round(3).tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]

    References:
        Heckel & Boelcskei 2015, arXiv 1307.4891, section II.
    """
    where = "tsc"
    check_int(where, "num_nearest", num_nearest)
    x = _unit_rows(where, x)
    num_samples = x.shape[0]
    if num_nearest >= num_samples:
        expected = f"at most the {num_samples - 1} other points"
        raise fail(where, "num_nearest too large", expected, num_nearest)
    coherence = jnp.minimum(jnp.abs(_matmul(x, x.T)), 1)
    coherence = jnp.where(jnp.eye(num_samples, dtype=bool), -1, coherence)
    nearest, columns = jax.lax.top_k(coherence, num_nearest)
    weights = jnp.where(nearest > _rounding(x), jnp.exp(-2 * jnp.arccos(nearest)), 0)
    rows = jnp.arange(num_samples)[:, None]
    return jnp.zeros_like(coherence).at[rows, columns].set(weights)


def coefficient_affinity(
    c: Float[Array, "num_samples num_samples"],
) -> Float[Array, "num_samples num_samples"]:
    """Return ``(|C| + |C|^T) / 2`` after scaling each row of C to unit length; zero rows stay.

    Examples:
        >>> import jax.numpy as jnp
        >>> coefficient_affinity(jnp.array([[0.0, -3.0], [0.0, 0.0]])).tolist()
        [[0.0, 0.5], [0.5, 0.0]]
    """
    if c.ndim != 2 or c.shape[0] != c.shape[1]:
        raise fail("coefficient_affinity", "wrong shape of c", "(N, N)", c.shape)
    norm = safe_sqrt(jnp.sum(c**2, axis=1, keepdims=True))
    weight = jnp.abs(c) / jnp.where(norm > 0, norm, 1)
    return (weight + weight.T) / 2


@partial(jax.jit, static_argnums=1)  # its callers cannot be compiled from outside
def _spectral_embedding(affinity: Array, num_clusters: int) -> Array:
    """Unit rows of the leading eigenvectors of ``D^{-1/2} A D^{-1/2}``."""
    affinity = affinity.astype(jnp.promote_types(affinity.dtype, jnp.float32))
    degree = jnp.sum(affinity, axis=1)
    connected = degree > 0
    scale = jnp.where(connected, 1 / jnp.sqrt(jnp.where(connected, degree, 1)), 0)
    # A point without edges is a component of its own, with eigenvalue 1 as every other component.
    normalized = scale[:, None] * affinity * scale[None, :] + jnp.diag(
        jnp.where(connected, 0, 1).astype(affinity.dtype)
    )
    vectors = jnp.linalg.eigh(normalized)[1][:, -num_clusters:]
    norm = safe_sqrt(jnp.sum(vectors**2, axis=1, keepdims=True))
    return vectors / jnp.where(norm > 0, norm, 1)


def spectral_clustering(
    affinity: ArrayLike, num_clusters: int, *, key: PRNGKey, num_restarts: int = 20
) -> Int[Array, " num_samples"]:
    """Return the parts into which the eigenvectors of the normalised Laplacian cut a graph.

    The rows of the ``num_clusters`` leading eigenvectors of ``D^{-1/2} A D^{-1/2}`` are scaled to
    unit length and grouped by k-means. A graph of exactly that many connected components (a point
    without edges is one) comes apart into them. Runs on concrete arrays only: k-means is
    scikit-learn's.

    Args:
        affinity: ``[N, N]``, symmetric, >= 0.
        num_clusters: K, 1 <= K <= N.
        key: draws the starting centres of k-means.
        num_restarts: starts of k-means, of which the best counts.

    Returns:
        ``[N]`` int32 in 0 .. K - 1.

    Raises:
        ValueError: if ``affinity`` is not a finite, symmetric, nonnegative matrix, or there are
            more clusters than points; or inside ``jit``.
        ModuleNotFoundError: without scikit-learn (the extra ``experiments``).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> graph = jnp.array([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
        >>> labels = spectral_clustering(graph, 2, key=jax.random.key(0))
        >>> bool(labels[0] == labels[1] != labels[2] == labels[3])
        True

    References:
        Ng, Jordan & Weiss 2001, On spectral clustering: analysis and an algorithm.
    """
    where = "spectral_clustering"
    check_int(where, "num_clusters", num_clusters)
    check_int(where, "num_restarts", num_restarts)
    if not (is_concrete(affinity) and is_concrete(key)):
        fix = "call it outside jit and vmap"
        raise fail(where, "needs values", "concrete arrays", "traced ones", fix)
    graph = np.asarray(affinity)
    if graph.ndim != 2 or graph.shape[0] != graph.shape[1] or graph.size == 0:
        raise fail(where, "wrong shape of affinity", "(N, N) with N >= 1", graph.shape)
    if num_clusters > len(graph):
        raise fail(
            where, "num_clusters too large", f"at most the {len(graph)} points", num_clusters
        )
    check_range(where, "affinity", graph, 0, math.inf, high_open=True)
    if not np.allclose(graph, graph.T, rtol=1e-3):
        fix = "see coefficient_affinity"
        raise fail(where, "wrong affinity", "a symmetric matrix", "an asymmetric one", fix)
    try:
        from sklearn.cluster import KMeans
    except ModuleNotFoundError as error:
        hint = 'pip install "lowdim-diffusion[experiments]"'
        raise ModuleNotFoundError(f"{where}: k-means needs scikit-learn; {hint}.") from error
    embedding = np.asarray(_spectral_embedding(jnp.asarray(graph), num_clusters))
    seed = int(jax.random.randint(key, (), 0, np.iinfo(np.int32).max))
    n_init: Any = num_restarts  # scikit-learn's own annotation names only the string
    means = KMeans(num_clusters, n_init=n_init, random_state=seed)
    return jnp.asarray(means.fit_predict(embedding), jnp.int32)


def sparse_subspace_clustering(
    x: Float[Array, "num_samples n"],
    num_components: int,
    *,
    key: PRNGKey,
    coefficients: Callable[[Array], Array] = ssc_omp,
    num_restarts: int = 20,
) -> Int[Array, " num_samples"]:
    """Return the subspace that each point belongs to, by self-expression and spectral clustering.

    Args:
        x: ``[N, n]``, one point per row, from subspaces through the origin: not centred.
        num_components: K, number of subspaces.
        key: for :func:`spectral_clustering`.
        coefficients: ``[N, n] -> [N, N]``: :func:`ssc_omp`, :func:`ensc`, :func:`tsc`, :func:`lsr`,
            or one of them with other settings, ``functools.partial(ensc, gamma=500.0)``. To see the
            coefficients, take the three steps of the module's docstring one by one.
        num_restarts: as in :func:`spectral_clustering`.

    Returns:
        ``[N]`` int32 in 0 .. K - 1, or -1 for zero rows, which lie in every subspace.

    Raises:
        ValueError: if there are fewer points than components, or as the parts do.
        ModuleNotFoundError: without scikit-learn (the extra ``experiments``).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> line, plane = jnp.eye(3)[:1], jnp.eye(3)[1:]
        >>> a, b = jnp.array([[1.0], [2], [-1]]), jnp.array([[1.0, 1], [1, 2], [2, -1], [-1, 1]])
        >>> x = jnp.concatenate([a @ line, b @ plane])
        >>> key = jax.random.key(0)
        >>> labels = sparse_subspace_clustering(x, 2, key=key)
        >>> bool(jnp.all(labels[:3] == labels[0]) & jnp.all(labels[3:] == 1 - labels[0]))
        True

    References:
        Elhamifar & Vidal 2013, arXiv 1203.1005, algorithm 1.
    """
    where = "sparse_subspace_clustering"
    check_int(where, "num_components", num_components)
    if not is_concrete(x):
        fix = "call it outside jit and vmap; the coefficients alone may be compiled"
        raise fail(where, "needs values", "concrete arrays", "traced ones", fix)
    unit = _unit_rows(where, x)
    kept = np.flatnonzero(np.any(np.asarray(unit) != 0, axis=1))
    if num_components > len(kept):
        expected = f"at most the {len(kept)} points that are not zero"
        raise fail(where, "num_components too large", expected, num_components)
    affinity = np.asarray(coefficient_affinity(coefficients(unit)))[np.ix_(kept, kept)]
    labels = np.full(len(unit), -1, np.int32)
    labels[kept] = spectral_clustering(affinity, num_components, key=key, num_restarts=num_restarts)
    return jnp.asarray(labels)
