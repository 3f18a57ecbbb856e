"""Which embedding tells copies of training images from new images of the same kind?

Every embedding gets the threshold that 1 % of held-out images pass (``calibrate_threshold``), and
is asked how many altered training images pass it: under noise, blur, another contrast, a shift, a
blend with another image. On the built-in digits and, with ``--data DIR``, on ``DIR/mnist``,
``DIR/fashion-mnist`` and ``DIR/cifar10`` where they are.

``image_embedding`` is the package's default: of those that are fitted to nothing it is ahead on
most sets, and by far on natural images.
"""

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._tables import write_csv
from lowdim_diffusion import data, generalization, reporting


class Preset(NamedTuple):
    """Sizes of the experiment."""

    num_train: int
    num_held_out: int
    num_copies: int


PRESETS = {
    "smoke": Preset(200, 200, 50),
    "cpu": Preset(3000, 1000, 300),
    "paper": Preset(50_000, 10_000, 1000),
}
RATE = 0.01
FOLDERS = {
    "MNIST": ("mnist", "MNIST"),
    "Fashion-MNIST": ("fashion-mnist", "fashion_mnist", "FashionMNIST"),
    "CIFAR-10": ("cifar10", "cifar-10", "cifar-10-batches-py"),
}


# ---- alterations --------------------------------------------------------------------------------


def _smooth(x: np.ndarray, width: float) -> np.ndarray:
    """Gaussian blur of ``[b, h, w, c]``, edges repeated; ``width`` in pixels."""
    reach = int(np.ceil(4 * width))
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * width**2))
    for axis in (1, 2):
        ends = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        padded = np.moveaxis(np.pad(x, ends, mode="edge"), axis, -1)
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), -1)
        x = np.moveaxis(windows @ (kernel / kernel.sum()), -1, axis)
    return x


def alterations(seed: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Return what may be done to a training image, pixels in [0, 1]."""
    rng = np.random.default_rng(seed)
    noise = lambda x, std: x + std * rng.standard_normal(x.shape)
    shift = lambda x: np.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0)), mode="edge")[:, :, :-1]
    return {
        "noise .03": lambda x: noise(x, 0.03),
        "noise .1": lambda x: noise(x, 0.1),
        "noise .2": lambda x: noise(x, 0.2),
        "blur .5 px": lambda x: _smooth(x, 0.5),
        "blur .7 px": lambda x: _smooth(x, 0.7),
        "blur 1 px": lambda x: _smooth(x, 1.0),
        "contrast .6": lambda x: 0.6 * x + 0.1,
        "gamma 1.8": lambda x: x**1.8,
        "blend 20 %": lambda x: 0.8 * x + 0.2 * x[rng.permutation(len(x))],
        "shift 1 px": shift,
        "all of it": lambda x: noise(_smooth(0.7 * shift(x) + 0.1, 0.5), 0.05),
    }


# ---- embeddings ---------------------------------------------------------------------------------


def _whitened(fit: np.ndarray) -> generalization.Embedding:
    """Pixels without their own mean, whitened by the covariance of ``fit`` plus its mean / 10."""
    flat = fit.reshape(len(fit), -1)
    flat = flat - flat.mean(1, keepdims=True)
    center = flat.mean(0)
    values, vectors = np.linalg.eigh(np.cov((flat - center).T))
    white = vectors / np.sqrt(np.maximum(values, 0) + 0.1 * values.mean())

    def embed(x: Any) -> Any:
        x = x.reshape(len(x), -1)
        return (x - x.mean(1, keepdims=True) - center[None]) @ white

    return embed


def _oriented(x: Any) -> Any:
    """Histograms of gradients: 8 directions, rectified, pooled over a pixel around."""
    x = x.mean(-1)
    dx, dy = jnp.gradient(x, axis=2), jnp.gradient(x, axis=1)
    angles = np.arange(8) * np.pi / 4
    e = jnp.stack([jnp.maximum(np.cos(a) * dx + np.sin(a) * dy, 0) for a in angles], -1)
    return _pooled(e)


def _random_filters(x: Any) -> Any:
    """Sixty-four random 3x3 filters of mean 0, rectified and pooled."""
    filters = np.random.default_rng(0).standard_normal((3, 3, x.shape[-1], 64))
    filters = jnp.asarray(filters - filters.mean((0, 1)), x.dtype)
    dims = jax.lax.conv_dimension_numbers(x.shape, filters.shape, ("NHWC", "HWIO", "NHWC"))
    e = jax.lax.conv_general_dilated(x, filters, (1, 1), "SAME", dimension_numbers=dims)
    return _pooled(jnp.maximum(e, 0))


def _pooled(e: Any) -> Any:
    """Mean over 3x3 around every second pixel."""
    sums = jax.lax.reduce_window(e, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    return sums / 9


def embeddings(fit: np.ndarray) -> dict[str, generalization.Embedding]:
    """Return what is compared; ``fit`` are images outside of the training set."""
    return {
        "pixels": generalization.pixel_embedding,
        "Laplacian of Gaussian": generalization.image_embedding,
        "whitened pixels, fitted": _whitened(fit),
        "oriented gradients": _oriented,
        "random filters": _random_filters,
    }


# ---- study --------------------------------------------------------------------------------------


def image_sets(
    root: pathlib.Path | None, preset: Preset
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return name to training and held-out images in [0, 1]: the digits, and what is found."""
    splits = {"digits": data.load("digits").split(min(preset.num_train, 1200))}
    for name, folders in FOLDERS.items() if root is not None else ():
        folder = next((root / f for f in folders if (root / f).exists()), None)
        if folder is None:
            continue
        if name == "CIFAR-10":  # an archive in a folder of several; its first images are training
            archives = sorted(folder.glob("*python*")) if folder.is_dir() else []
            dataset = data.load(archives[0] if archives else folder, split="train")
            total = dataset.num_examples
            cut = total - min(preset.num_held_out, total // 4)
            splits[name] = dataset.take(np.arange(cut)), dataset.take(np.arange(cut, total))
        else:
            splits[name] = data.load(folder, split="train"), data.load(folder, split="test")
    as_floats = lambda images: images.astype(np.float32) / images.max()
    return {
        name: (
            as_floats(train.images[: preset.num_train]),
            as_floats(held_out.images[: preset.num_held_out]),
        )
        for name, (train, held_out) in splits.items()
    }


def study(
    name: str, train: np.ndarray, held_out: np.ndarray, num_copies: int, seed: int
) -> list[dict[str, Any]]:
    """Return, for each embedding and alteration, the share of copies that pass the threshold."""
    copies = {how: alter(train[:num_copies]) for how, alter in alterations(seed).items()}
    together = np.concatenate(list(copies.values())).astype(np.float32)
    rows = []
    for label, embed in embeddings(held_out).items():
        train_e, held_out_e, copies_e = (jax.jit(embed)(x) for x in (train, held_out, together))
        plain = generalization.no_embedding
        threshold = generalization.calibrate_threshold(
            held_out_e, train_e, false_positive_rate=RATE, embed=plain
        )
        cosine = generalization.most_similar(copies_e, train_e, embed=plain).cosine
        found = np.asarray(cosine > threshold).reshape(len(copies), -1).mean(1)
        for how, share in zip(copies, found.tolist(), strict=True):
            row = {"data": name, "num_train": len(train), "num_held_out": len(held_out)}
            row |= {"embedding": label, "threshold": round(float(threshold), 4)}
            rows.append(row | {"copy": how, "found": round(share, 4)})
    return rows


def main() -> int:
    """Write ``copy_detection.csv`` and a report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.copy_detection")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--data", type=pathlib.Path, help="folder with mnist/, cifar10/, ...")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/copy_detection"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    preset, out = PRESETS[options.preset], options.out
    out.mkdir(parents=True, exist_ok=True)

    rows: list[dict[str, Any]] = []
    report = reporting.Report("Copy detection", f"share of copies found, {RATE:.0%} false alarms")
    for name, (train, held_out) in image_sets(options.data, preset).items():
        start = time.perf_counter()
        mine = study(name, train, held_out, preset.num_copies, options.seed)
        rows += mine
        hows = list(dict.fromkeys(row["copy"] for row in mine))
        table = []
        for label in dict.fromkeys(row["embedding"] for row in mine):
            chosen = [row for row in mine if row["embedding"] == label]
            shares = [row["found"] for row in chosen]
            cells = [f"{share:.2f}" for share in (*shares, float(np.mean(shares)))]
            table.append([label, f"{chosen[0]['threshold']:.3f}", *cells])
        title = f"{name}: {len(train)} training, {len(held_out)} held-out images"
        columns = ["embedding", "threshold", *hows, "mean"]
        report.section(title).table(columns, table)
        print(f"{title}, {time.perf_counter() - start:.0f} s", flush=True)
        for line in [columns, *table]:
            print(f"{line[0]:<24}", *(f"{cell:>11}" for cell in line[1:]))
    write_csv(out / "copy_detection.csv", rows)
    report.write(out / "report.html")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
