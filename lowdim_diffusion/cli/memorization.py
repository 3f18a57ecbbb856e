"""Which training examples a run holds, and whether its features tell copies from new samples."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion import data, denoisers, reporting, safety, schedules, subspaces
from lowdim_diffusion.cli import build
from lowdim_diffusion.cli.loading import LoadedRun

__all__ = ["Memorization", "arrays", "measure", "section", "summary"]

LEVELS = (0.03, 0.1, 0.3, 0.6, 1.2)
"""Noise levels at which features are taken, over the standard deviation of the data."""
_MOST_OF_ONE = 5
"""Copies of one image that are judged: a model may copy one far more often than the others."""
_MOST = 256
"""Copies, and new samples, that are judged."""
_FEW = 8
"""With fewer of either kind a detector is not judged."""
_BLOCK = 64


class Memorization(NamedTuple):
    """What was found."""

    found: safety.Extraction
    chance: float | None
    """Share of new examples that would look like copies by chance; None if it is not known."""
    detectors: dict[str, safety.Chosen]
    """Kind of score to the best of its kind; empty if there are too few copies or new samples."""
    judged: tuple[int, int]
    """Copies and new samples that detectors were chosen and judged on."""


def measure(
    loaded: LoadedRun, dataset: data.Dataset, samples: np.ndarray, labels: Any
) -> Memorization:
    """Return which training examples the samples reproduce, and detectors of that.

    Args:
        loaded: the run.
        dataset: what it was trained on.
        samples: ``[n, *data]``, drawn from it.
        labels: ``[n]`` their classes, or None.
    """
    train = dataset.floats()
    found = safety.extraction(samples, train)
    kept = np.unique(found.group)
    chance = None
    if len(kept) > 100:
        some = np.random.default_rng(0).permutation(kept)[:2000]
        chance = float(3.0 ** -jax.jit(subspaces.dimension.mle)(train[some]))
    copies = np.flatnonzero(found.is_copy)
    rank = {row: np.cumsum(found.index[copies] == row) for row in found.found}
    first = [i for at, i in enumerate(copies) if rank[found.index[i]][at] <= _MOST_OF_ONE]
    new = np.flatnonzero(found.ratio > 0.5)
    rows = [np.asarray(part, int)[:_MOST] for part in (first, new)]
    detectors = {}
    if loaded.model.net.taps and min(map(len, rows)) >= _FEW:
        both = np.concatenate(rows)
        scores = _scores(loaded, samples[both], None if labels is None else labels[both])
        is_copy = np.arange(len(both)) < len(rows[0])
        detectors = {kind: safety.choose_score(of, is_copy) for kind, of in scores.items()}
    return Memorization(found, chance, detectors, (len(rows[0]), len(rows[1])))


def _scores(loaded: LoadedRun, x: np.ndarray, labels: Any) -> dict[str, dict[str, np.ndarray]]:
    """Kind of score to name to one number per sample."""
    model, params = loaded.model, loaded.averaged
    data_std = model.config.loss.data_std or 0.5
    sigmas = data_std * np.array(LEVELS)

    @jax.jit
    def at(x: Any, cond: Any, t: Any) -> Any:
        def one(args: Any) -> Any:  # one example, so that blocks of any size are alike
            x, cond = jax.tree.map(lambda a: a[None], args)
            clean = model.schedule.alpha(t) * x
            found = denoisers.features(
                *(model.net, params, model.schedule, clean, t),
                taps=model.net.taps,
                data_std=data_std,
                cond=cond,
            )
            moved = build.denoiser(model, params, cond)(clean, t) - x
            spreads = {tap: safety.representation_spread(h)[0] for tap, h in found.items()}
            return spreads, -jnp.mean(moved**2)

        return jax.lax.map(one, (x, cond), batch_size=_BLOCK)

    cond = None if labels is None else jnp.asarray(labels, jnp.int32)
    scores: dict[str, dict[str, np.ndarray]] = {"spread of features": {}, "stillness": {}}
    for sigma, t in zip(sigmas, schedules.times_from_sigmas(model.schedule, sigmas), strict=True):
        spreads, still = jax.tree.map(np.asarray, at(jnp.asarray(x), cond, t.astype(x.dtype)))
        scores["spread of features"] |= {
            f"{tap}, σ {sigma:.2g}": values for tap, values in spreads.items()
        }
        scores["stillness"][f"σ {sigma:.2g}"] = still
    return scores


def arrays(measured: Memorization) -> dict[str, Any]:
    """Return the numbers for ``analysis.npz``."""
    found = measured.found
    return {
        "is_copy": found.is_copy,
        "copy_ratio": found.ratio,
        "copied_rows": found.found,
        "copied_counts": found.count,
        "copied_samples": found.closest,
        "duplicate_of": found.group,
        "extractable": np.array(found.extractable[:3]),
        "extractable_unseen": found.extractable.unseen,
        **{f"auroc: {kind}": best.auroc for kind, best in measured.detectors.items()},
    }


def summary(measured: Memorization) -> list[str]:
    """Return lines to print."""
    return [f"{name}: {value} ({note})" for name, (value, note) in _cards(measured).items()]


def _cards(measured: Memorization) -> dict[str, tuple[str, str]]:
    found = measured.found
    num, distinct = len(found.is_copy), found.num_distinct
    held = found.extractable
    cards = {
        "copies": (
            f"{found.is_copy.sum()} of {num}",
            "samples whose nearest training example is 3 times nearer than the next"
            + ("" if measured.chance is None else f"; by chance {num * measured.chance:.2g}"),
        ),
        "training examples found": (
            f"{len(found.found)} of {distinct}",
            f"{100 * len(found.found) / distinct:.3g} % of those that differ",
        ),
    }
    if len(found.found):
        cards["training examples held"] = (
            f"about {held.num_images:.0f}",
            f"95 % interval {held.low:.0f} to {held.high:.0f}; the next copy is of one not found "
            f"yet with probability {held.unseen:.2g}",
        )
    if distinct < len(found.group):
        _, counts = np.unique(found.group, return_counts=True)
        copied = np.isin(np.unique(found.group)[counts > 1], found.found).sum()
        cards["duplicated training examples"] = (
            str((counts > 1).sum()),
            f"occur up to {counts.max()} times; {copied} of them are among the copies",
        )
    judged = "chosen on half of {} copies and {} new samples, judged on the rest"
    for kind, best in measured.detectors.items():
        side = "high" if best.sign > 0 else "low"
        note = f"{best.name}, copies {side}; {judged.format(*measured.judged)}"
        cards[f"AUROC, {kind}"] = (f"{best.auroc:.3f}", note)
    return cards


def section(measured: Memorization, dataset: data.Dataset, samples: np.ndarray) -> Any:
    """Return the part of the report: numbers, copies beside their originals, a table."""
    found, shown = measured.found, 24
    rows = []
    for row, count, sample in zip(found.found, found.count, found.closest, strict=True):
        same = found.duplicates(row)[1:]
        names = ", ".join(map(str, same[:6])) + (f" and {len(same) - 6} more" * (len(same) > 6))
        rows.append([int(row), int(count), f"{found.ratio[sample]:.3f}", names])
    return reporting.Copies(
        _cards(measured),
        samples[found.closest[:shown]],
        dataset.floats(found.found[:shown]),
        [f"row {row}, {count} x" for row, count in zip(found.found, found.count, strict=True)][
            :shown
        ],
        rows[:20],
        len(rows),
    )
