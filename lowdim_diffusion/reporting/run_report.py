"""The report of one run: what was trained, what came out, and how low-dimensional it is."""

import importlib.util
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowdim_diffusion.reporting import figures
from lowdim_diffusion.reporting.report import Report

__all__ = ["Copies", "Neighbors", "Spectra", "write_html"]


class Neighbors(NamedTuple):
    """Samples and the training examples nearest to them."""

    samples: Any
    """``[N, *data]``, pictures in [-1, 1] or uint8, or vectors."""
    nearest: Any
    """``[N, *data]``, the nearest training example of each."""
    distances: Any
    """``[N]``, Euclidean."""


class Copies(NamedTuple):
    """Training examples that a model reproduces."""

    summary: Mapping[str, Any]
    """Key figures, label to value or to ``(value, note)``."""
    samples: Any
    """``[M, *data]``, the best copies; may be empty."""
    originals: Any
    """``[M, *data]``, what they copy."""
    captions: Sequence[str]
    """``M`` short texts."""
    rows: Sequence[Sequence[Any]]
    """Row in the training set, how often it was copied, smallest distance ratio, duplicates."""
    total: int
    """How many there are; ``rows`` may show the first ones."""


class Spectra(NamedTuple):
    """Jacobian singular values against the noise level."""

    sigmas: Any
    """``[T]`` noise levels sigma / alpha."""
    values: Any
    """``[T, b, m]`` singular values, descending."""
    rank_ratio: Any = None
    """``[T, b]`` numerical rank over dimension."""
    exact_values: Any = None
    """``[T, b, m]`` of the exact denoiser of the data's distribution, where there is one."""
    exact_rank_ratio: Any = None
    """``[T, b]`` likewise."""
    cosine: Mapping[str, Any] | None = None
    """Length of a step to ``[T, b]``, how nearly linear the denoiser is along it (1 is linear)."""
    asymmetry: Any = None
    """``[T, b]``, ``||J - J^T|| / ||J + J^T||``."""


def write_html(
    path: str | os.PathLike[str],
    *,
    title: str,
    subtitle: str = "",
    summary: Mapping[str, Any] | None = None,
    neighbors: Neighbors | None = None,
    memorized: float | None = None,
    copies: Copies | None = None,
    loss: tuple[Any, Any] | None = None,
    loss_x_label: str = "training step",
    trajectory: tuple[Any, Any] | None = None,
    spectra: Spectra | None = None,
    angles: Mapping[str, Sequence[float]] | None = None,
    config: str = "",
    versions: Mapping[str, str] | None = None,
    next_commands: Iterable[tuple[str, str]] = (),
    notes: Iterable[str] = (),
) -> pathlib.Path:
    """Write a run's ``report.html`` and return its path; parts that are not given are left out.

    Without matplotlib the figures are replaced by one line that says how to get them.

    Args:
        path: where to write; replaced whole.
        title: heading, e.g. the run's name.
        subtitle: one line under it, e.g. data set and date.
        summary: key figures, label to value or to ``(value, note)``.
        neighbors: samples beside their nearest training examples.
        memorized: share of samples that copy one training example; see
            :func:`lowdim_diffusion.generalization.memorized_fraction`.
        copies: training examples that were found among the samples.
        loss: ``(steps [m], losses [m])``.
        loss_x_label: what the steps count.
        trajectory: ``(states [T, b, *data], sigmas [T])`` from noise to data.
        spectra: Jacobian singular values and ranks.
        angles: name of a pair of subspaces to its principal angles in radians, ascending.
        config: resolved configuration as TOML.
        versions: package to version.
        next_commands: ``(what it does, command)``.
        notes: sentences for the top, e.g. what this run did not measure.
    """
    report = Report(title, subtitle)
    plots = importlib.util.find_spec("matplotlib") is not None
    cards = dict(summary or {})
    if memorized is not None:
        cards["memorized samples"] = (f"{100 * memorized:.1f} %", "nearest < 1/3 of second nearest")
    notes = list(notes)
    if cards or notes or not plots:
        report.section("Summary")
    if cards:
        report.cards(cards)
    for note in notes:
        report.text(note)
    if not plots:
        report.note(
            "The figures are missing because matplotlib is not installed: "
            "pip install 'lowdim-diffusion[plots]', then write this report again."
        )
    if neighbors is not None:
        _neighbors(report, neighbors)
    if copies is not None:
        _copies(report, copies)
    if plots and (loss is not None or trajectory is not None):
        report.section("Training and sampling")
        if loss is not None:
            report.figure(
                figures.loss_curve(*loss, x_label=loss_x_label),
                "Denoising loss over training.",
                alt=f"Training loss, {_ends(loss[1])}",
            )
        if trajectory is not None:
            report.figure(
                figures.trajectory_strip(*trajectory),
                "From noise to data: each row is one sample on its way from pure noise (left) to "
                "data (right). σ is the noise level; noisy columns are scaled to fit.",
            )
    if spectra is not None:
        _spectra(report, spectra, plots)
    if angles:
        _angles(report, angles)
    commands = list(next_commands)
    if commands:
        report.section("What to try next").commands(commands)
    if config or versions:
        report.section("Configuration")
        if config:
            report.code(config, summary="Resolved configuration (TOML)")
        if versions:
            report.table(["package", "version"], versions.items())
    return report.write(path)


def _ends(values: Any) -> str:
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return f"from {values[0]:.3g} to {values[-1]:.3g}" if values.size else "no values"


def _neighbors(report: Report, neighbors: Neighbors) -> None:
    first, second = ("Above", "below") if np.ndim(neighbors.samples) == 2 else ("Left", "right")
    report.section(
        "Samples and their nearest training examples",
        f"{first}: drawn from the model; {second}: the closest training example, at Euclidean "
        "distance d. A model that memorizes shows equal pairs; one that generalizes shows "
        "relatives.",
    )
    distances = np.asarray(neighbors.distances, np.float64).reshape(-1)
    report.pairs(neighbors.samples, neighbors.nearest, [f"d = {d:.2f}" for d in distances])


def _copies(report: Report, copies: Copies) -> None:
    report.section(
        "Memorized training examples",
        "Training examples that samples reproduce. A copy is 3 times nearer to one example "
        "than to any other; equal training examples count as one.",
    )
    report.cards(copies.summary)
    if not copies.total:
        return
    first, second = ("Above", "below") if np.ndim(copies.samples) == 2 else ("Left", "right")
    report.text(f"{first}: the best copy of each; {second}: the training example.")
    report.pairs(copies.samples, copies.originals, copies.captions, right_name="training example")
    columns = ["row in the training set", "copies", "distance ratio", "duplicates in rows"]
    more = copies.total - len(copies.rows)
    report.table(columns, copies.rows, caption=f"{more} more are in analysis.npz." * (more > 0))


def _spectra(report: Report, spectra: Spectra, plots: bool) -> None:
    exact = spectra.exact_values is not None or spectra.exact_rank_ratio is not None
    report.section(
        "Low-dimensional structure of the denoiser",
        "The Jacobian of the denoiser shows in how many directions the denoised example can still "
        "move at a noise level. Few large singular values mean that the model has found a "
        "low-dimensional structure in the data."
        + (
            " Dashed: the exact denoiser of the distribution the data were drawn from."
            if exact
            else ""
        ),
    )
    if plots:
        report.figure(
            figures.singular_values(spectra.sigmas, spectra.values, exact=spectra.exact_values),
            "Singular values of the denoiser's Jacobian, one line per noise level.",
        )
        if spectra.rank_ratio is not None:
            report.figure(
                figures.rank_curve(
                    spectra.sigmas, spectra.rank_ratio, exact=spectra.exact_rank_ratio
                ),
                "Numerical rank (square root of the energy above 0.99) over the dimension of the "
                "data, against signal to noise. Shaded: 10th to 90th percentile of samples.",
            )
        if spectra.cosine:
            average = lambda a: np.asarray(a, np.float64).reshape(len(spectra.sigmas), -1).mean(1)
            report.figure(
                figures.curves(
                    {k: (spectra.sigmas, average(v)) for k, v in spectra.cosine.items()},
                    xlabel="noise level σ",
                    ylabel="cosine to the linear prediction",
                    xscale="log",
                ),
                "How nearly linear the denoiser is along random steps λ, for inputs of about unit "
                "variance: 1 where a step can be foretold by the Jacobian. Edits by its singular "
                "vectors belong where this is near 1 and the rank is low.",
            )
    _rank_table(report, spectra)


def _rank_table(report: Report, spectra: Spectra, max_rows: int = 8) -> None:
    sigmas, values = np.asarray(spectra.sigmas, float), np.asarray(spectra.values, float)
    values = values.mean(1) if values.ndim == 3 else values
    columns = ["σ", "largest singular value"]
    parts: list[np.ndarray] = [sigmas, values[:, 0]]
    for name, ratio in (
        ("rank / dimension", spectra.rank_ratio),
        ("exact rank / dimension", spectra.exact_rank_ratio),
        ("asymmetry", spectra.asymmetry),
    ):
        if ratio is not None and len(ratio) == len(sigmas):
            columns.append(name)
            parts.append(np.asarray(ratio, float).reshape(len(sigmas), -1).mean(1))
    rows = np.unique(np.linspace(0, len(sigmas) - 1, max_rows).round().astype(int))
    report.table(columns, [[float(f"{part[i]:.3g}") for part in parts] for i in rows])


def _angles(report: Report, angles: Mapping[str, Sequence[float]]) -> None:
    report.section(
        "Subspaces",
        "Principal angles between pairs of subspaces: 0° where they share a direction, 90° where "
        "they are orthogonal. Affinity is the root mean squared cosine.",
    )
    rows = []
    for name, radians in angles.items():
        t = np.asarray(radians, np.float64)
        degrees = np.rad2deg(t)
        affinity = math.sqrt(float(np.mean(np.cos(t) ** 2)))
        rows.append(
            [
                name,
                f"{degrees.min():.1f}°",
                f"{np.median(degrees):.1f}°",
                f"{degrees.max():.1f}°",
                round(affinity, 3),
            ]
        )
    columns = ["pair", "smallest", "median", "largest", "affinity"]
    report.table(columns, rows)
