"""Training a low-rank denoiser as a clustering method, beside those that the field uses.

Noise-free random unions of K subspaces with N_k = 2 d points each, (n, K, d) = (48, 2, 6),
(48, 3, 6) and (100, 5, 10); scikit-learn's digits; and, with ``--faces``, the first subjects of
Extended Yale B (faces under varying light lie near subspaces of about 9 dimensions). Every method
is told K and, where it needs it, d. Pictures are 0..255 with rows scaled to unit length, not
centred.

References:
    metrics and published accuracies: You, Robinson & Vidal 2016, arXiv 1507.01238; You et al. 2016,
    arXiv 1605.02633; Wang et al. 2024, arXiv 2409.02426 (training as subspace clustering).
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._tables import write_csv
from lowdim_diffusion import data, linalg, reporting, subspaces, training


class Problem(NamedTuple):
    """Points to cluster."""

    name: str
    x: jax.Array
    labels: np.ndarray
    num_components: int
    rank: int
    bases: jax.Array | None = None


class Preset(NamedTuple):
    """Sizes of the experiment."""

    num_seeds: int
    num_steps: int
    num_restarts: int
    subjects: tuple[int, ...]
    per_digit: int


PRESETS = {
    "smoke": Preset(1, 50, 2, (2,), 10),
    "cpu": Preset(3, 1000, 4, (2, 3, 5), 50),
    "paper": Preset(20, 4000, 30, (2, 3, 5, 10, 20, 38), 100),
}


# ---- data ---------------------------------------------------------------------------------------


def union(seed: int, dim: int, num_components: int, rank: int) -> Problem:
    """Points on random subspaces, 2 d on each, without noise."""
    frame_key, inner_key = jax.random.split(jax.random.key(seed))
    bases = linalg.random_frames(frame_key, num_components, dim, rank)
    inner = jax.random.normal(inner_key, (num_components, 2 * rank, rank))
    x = jnp.einsum("knd,kbd->kbn", bases, inner, precision="highest").reshape(-1, dim)
    labels = np.repeat(np.arange(num_components), 2 * rank)
    name = f"union n = {dim}, K = {num_components}, d = {rank}"
    return Problem(name, x, labels, num_components, rank, bases)


def pictures(name: str, images: np.ndarray, labels: np.ndarray, rank: int) -> Problem:
    """Unit rows, turned into as few coordinates as there are points (an isometry)."""
    x = images.reshape(len(images), -1).astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    if len(x) < x.shape[1]:
        u, s, _ = np.linalg.svd(x, full_matrices=False)
        x = u * s
    return Problem(name, jnp.asarray(x, jnp.float32), labels, len(np.unique(labels)), rank)


def problems(preset: Preset, faces: str | None, seed: int) -> list[Problem]:
    """Return everything to cluster."""
    sizes = ((48, 2, 6), (48, 3, 6), (100, 5, 10))
    found = [union(seed + s, *size) for size in sizes for s in range(preset.num_seeds)]
    digits = data.load("digits")
    assert digits.labels is not None
    rows = np.concatenate(
        [np.flatnonzero(digits.labels == k)[: preset.per_digit] for k in range(10)]
    )
    found.append(pictures("digits", digits.images[rows], digits.labels[rows], 6))
    if faces:
        yale = data.load(faces)
        if yale.labels is None:
            raise SystemExit(f"{faces}: faces need one folder per subject")
        for count in preset.subjects:
            rows = np.flatnonzero(yale.labels < count)
            name = f"faces, {count} subjects"
            found.append(pictures(name, yale.images[rows], yale.labels[rows], 9))
    return found


# ---- methods ------------------------------------------------------------------------------------

Method = Callable[[Any, Problem], tuple[Any, Any]]
"""``(key, problem) -> (labels, bases or None)``."""


def k_means(key: Any, p: Problem) -> Any:
    """Centres, not subspaces: what distances alone can do."""
    from sklearn.cluster import KMeans

    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    means = KMeans(p.num_components, n_init=20, random_state=seed)  # type: ignore[arg-type]
    return means.fit_predict(np.asarray(p.x)), None


@functools.partial(jax.jit, static_argnames=("num_components", "rank", "start", "count"))
def _k_subspaces(key: Any, x: Any, num_components: int, rank: int, start: Any, count: int) -> Any:
    found = subspaces.k_subspaces(key, x, num_components, rank, start=start, num_restarts=count)
    return found.labels, found.bases


@functools.partial(
    jax.jit, static_argnames=("num_components", "rank", "start", "count", "assignment", "steps")
)
def _denoiser(
    key: Any,
    x: Any,
    num_components: int,
    rank: int,
    start: Any,
    count: int,
    assignment: Any,
    steps: int,
) -> Any:
    x = x * jnp.sqrt(rank / jnp.mean(jnp.sum(x**2, axis=1)))  # unit variance on the subspaces
    found = training.fit_subspaces(
        key,
        x,
        num_components,
        rank,
        assignment=assignment,
        start=start,
        num_restarts=count,
        num_steps=steps,
    )
    return found.labels, found.bases


def methods(preset: Preset) -> dict[str, Method]:
    """Name to method."""

    def sparse(coefficients: Any) -> Method:
        return lambda key, p: (
            subspaces.sparse_subspace_clustering(
                p.x, p.num_components, key=key, coefficients=coefficients
            ),
            None,
        )

    def clustered(start: str, count: int) -> Method:
        return lambda key, p: _k_subspaces(key, p.x, p.num_components, p.rank, start, count)

    def learned(start: str, assignment: str) -> Method:
        return lambda key, p: _denoiser(
            key,
            p.x,
            p.num_components,
            p.rank,
            start,
            preset.num_restarts,
            assignment,
            preset.num_steps,
        )

    return {
        "k-means": k_means,
        "SSC-OMP": sparse(subspaces.ssc_omp),
        "EnSC": sparse(subspaces.ensc),
        "TSC": sparse(subspaces.tsc),
        "LSR": sparse(subspaces.lsr),
        "K-subspaces, 30 random starts": clustered("random", 30),
        "K-subspaces": clustered("mixed", 8),
        "denoiser, soft, random starts": learned("random", "soft"),
        "denoiser, soft": learned("mixed", "soft"),
        "denoiser, hard": learned("mixed", "hard"),
    }


# ---- the command --------------------------------------------------------------------------------


def run(preset: Preset, faces: str | None, seed: int) -> list[dict[str, Any]]:
    """Run every method on every problem; return tidy rows."""
    rows = []
    for p in problems(preset, faces, seed):
        for name, method in methods(preset).items():
            begin = time.monotonic()
            labels, bases = method(jax.random.key(seed), p)
            labels = np.asarray(labels)
            row: dict[str, Any] = {
                "data": p.name,
                "method": name,
                "accuracy": float(subspaces.clustering_accuracy(p.labels, labels)),
                "nmi": float(subspaces.normalized_mutual_info(p.labels, labels)),
                "ari": float(subspaces.adjusted_rand_index(p.labels, labels)),
                "error": None,
                "seconds": round(time.monotonic() - begin, 2),
            }
            if bases is not None and p.bases is not None:
                distance = subspaces.match_components(p.bases, bases).distance
                row["error"] = float(jnp.mean(distance) / np.sqrt(2 * p.rank))
            rows.append(row)
            error = "" if row["error"] is None else f"  error {row['error']:.3f}"
            said = f"{p.name:<28} {name:<32} {row['accuracy']:.3f}  {row['seconds']:6.1f} s{error}"
            print(said, flush=True)
    return rows


def mean_of(rows: list[dict[str, Any]], column: str) -> str:
    """Mean over the seeds, empty where nothing was measured."""
    values = [row[column] for row in rows if row[column] is not None]
    return f"{np.mean(values):.3f}" if values else ""


PAGE = """# Subspace clustering in numbers

Training a low-rank denoiser is subspace clustering, so here it stands beside the methods of that
field. Accuracy of every method, told K and d, as the mean over the random problems; in brackets the
error of the subspaces found (projector distance to the matched true one, over its largest value)
where the truth is known. Unions have 2 d points on each of K random subspaces and no noise; faces
are the first subjects of Extended Yale B.

This page is what the experiment wrote beside its table of all scores:

```sh
{command}
```

{table}
"""


def page(rows: list[dict[str, Any]], command: str) -> str:
    """Return the results as a page of the documentation: methods down, problems across."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    lines = [["method", *names], ["---"] + ["--:"] * len(names)]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [method]
        for name in names:
            mine = [row for row in rows if (row["data"], row["method"]) == (name, method)]
            error = mean_of(mine, "error")
            cells.append(mean_of(mine, "accuracy") + (f" ({error})" if error else ""))
        lines.append(cells)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return PAGE.format(command=command, table=table)


def main() -> int:
    """Write ``subspace_clustering.csv``, ``subspace_clustering.md`` and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.subspace_clustering")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--faces", help="Extended Yale B, a zip or folder with one folder each")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("results/subspace_clustering")
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = run(PRESETS[options.preset], options.faces, options.seed)
    write_csv(options.out / "subspace_clustering.csv", rows)
    faces = " --faces CroppedYale.zip" if options.faces else ""
    command = f"python -m experiments.subspace_clustering --preset {options.preset}{faces}"
    text = page(rows, command)
    (options.out / "subspace_clustering.md").write_text(text, encoding="utf-8")
    report = reporting.Report("Subspace clustering", f"preset {options.preset}")
    names = list(dict.fromkeys(row["method"] for row in rows))
    for name in dict.fromkeys(row["data"] for row in rows):
        report.section(name)
        here = [[row for row in rows if row["data"] == name and row["method"] == m] for m in names]
        columns = ("accuracy", "nmi", "ari", "error", "seconds")
        cells = [
            [m, *(mean_of(mine, c) for c in columns)] for m, mine in zip(names, here, strict=True)
        ]
        report.table(["method", *columns], cells)
    report.note(
        "Error: projector distance to the matched true subspace over its largest value. Seconds "
        "include compilation at the first problem of a size."
    )
    report.write(options.out / "report.html")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
