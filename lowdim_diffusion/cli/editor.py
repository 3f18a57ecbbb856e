"""Edits of a run's images, measured beside random directions, and their report."""

import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion import editing, reporting, schedules, solvers
from lowdim_diffusion.cli import build
from lowdim_diffusion.cli.errors import CommandError
from lowdim_diffusion.cli.loading import LoadedRun

__all__ = ["Edited", "edit", "report", "summary"]


class Edited(NamedTuple):
    """What was done; arrays are numpy's."""

    originals: np.ndarray
    """``[b, *data]``."""
    mask: np.ndarray
    """``[*data]``."""
    sigma: float
    """Noise level ``sigma / alpha`` of the edit."""
    strengths: np.ndarray
    """``[S]``, 0 in the middle if S is odd."""
    reconstruction: np.ndarray
    """``[b, *data]``, the round trip without an edit."""
    images: np.ndarray
    """``[b, D, S, *data]``; the last of the D directions is random, for comparison."""
    directions: editing.Directions
    """``[b, D, ...]``."""
    inside: np.ndarray
    """``[b, D, S]`` rms change inside the mask against the round trip."""
    outside: np.ndarray
    """``[b, D, S]`` outside."""


class Summary(NamedTuple):
    """Averages over images, directions and the two longest steps; rms per value."""

    round_trip: float
    inside: float
    outside: float
    random_inside: float
    random_outside: float


def edit(
    loaded: LoadedRun,
    x: np.ndarray,
    mask: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    averaged: bool = True,
    sigma: float | None = None,
    num_directions: int = 4,
    null_rank: int = 5,
    strength: float = 0.2,
    num_strengths: int = 9,
    num_steps: int = 20,
    seed: int = 0,
) -> Edited:
    """Return edits of ``x`` along its own directions and along a random one.

    Args:
        loaded: the run.
        x: ``[b, *data]`` images.
        mask: ``[*data]``, the region.
        labels: ``[b]`` for a run trained with labels.
        averaged: use the moving average of the parameters.
        sigma: noise level of the edit; None for 1.5 standard deviations of the data, and 3 for a
            pretrained network, whose images are larger.
        num_directions: per image.
        null_rank: see :func:`lowdim_diffusion.editing.find_directions`.
        strength: longest step, see :func:`lowdim_diffusion.editing.edit`.
        num_strengths: steps from -strength to strength.
        num_steps: of the sampler, each way.
        seed: of the search and of the random directions.
    """
    model = loaded.model
    schedule = model.schedule
    params = loaded.averaged if averaged else loaded.params
    if sigma is None:
        sigma = 3.0 if loaded.pretrained else 1.5 * (model.config.loss.data_std or 1.0)
    low, high = (
        float(schedules.noise_levels(schedule, t)) for t in (schedule.t_min, schedule.t_max)
    )
    if not low < sigma < high:
        raise CommandError(
            f"--sigma {sigma:g}: the schedule's noise levels go from {low:.3g} to {high:.3g}"
        )
    last = min(max(low, 0.01), sigma / 2)
    levels = schedules.karras_grid(num_steps, last, sigma)
    ts = np.asarray(schedules.times_from_sigmas(schedule, levels))
    strengths = np.linspace(-strength, strength, num_strengths)
    strengths[np.abs(strengths) < 1e-12] = 0
    cond = None if labels is None else jnp.asarray(labels, jnp.int32)

    @jax.jit
    def run(params: Any, x: Any) -> editing.Edits:
        return editing.loco(
            jax.random.key(seed),
            build.denoiser(model, params, cond),
            schedule,
            ts,
            x,
            mask,
            strengths,
            solver=solvers.heun(),
            rank=num_directions,
            null_rank=null_rank,
            num_random=1,
        )

    found = jax.tree.map(np.asarray, run(params, jnp.asarray(x)))
    if not np.all(np.isfinite(found.images)):
        raise CommandError("the edited images hold NaN or infinity; lower --strength")
    images = np.moveaxis(found.images, 2, 0)
    inside, outside = _changes(found.reconstruction, images, mask)
    return Edited(
        np.asarray(x),
        np.asarray(mask),
        float(sigma),
        strengths,
        found.reconstruction,
        images,
        found.directions,
        inside,
        outside,
    )


def _changes(before: np.ndarray, after: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
    """Root mean square change per value ``[b, D, S]`` inside and outside."""
    one = lambda a: editing.inside_outside_change(before, a, mask)
    flat = after.reshape(after.shape[0], -1, *before.shape[1:])
    found = [one(flat[:, i]) for i in range(flat.shape[1])]
    shape = after.shape[:3]
    return (
        np.stack([np.asarray(c.inside) for c in found], 1).reshape(shape),
        np.stack([np.asarray(c.outside) for c in found], 1).reshape(shape),
    )


def summary(found: Edited) -> Summary:
    """Return the averages that tell at once whether the edits are local."""
    ends = lambda a: float(a[..., [0, -1]].mean())
    own, random = slice(None, -1), slice(-1, None)
    trip = editing.round_trip_error(found.originals, found.reconstruction)
    return Summary(
        float(np.mean(trip.rmse)),
        ends(found.inside[:, own]),
        ends(found.outside[:, own]),
        ends(found.inside[:, random]),
        ends(found.outside[:, random]),
    )


def report(out: pathlib.Path, found: Edited, *, names: Sequence[str], command: str = "") -> Any:
    """Write ``report.html``, the page ``edits.html`` and a picture per image; return their paths.

    Args:
        out: directory, which exists.
        found: the edits.
        names: of the images.
        command: what was run, shown in the report.
    """
    plots = importlib.util.find_spec("matplotlib") is not None
    count = found.images.shape[1] - 1
    rows = [f"direction {i + 1}" for i in range(count)] + ["random"]
    change, most = summary(found), float(found.strengths[-1])
    page = reporting.write_edit_page(
        out / "edits.html",
        originals=found.originals,
        edits=found.images,
        strengths=found.strengths,
        labels=names,
        directions=rows,
        mask=found.mask,
        title="Edits",
        subtitle=f"noise level {found.sigma:.3g}",
    )
    written = [page]
    text = reporting.Report("Edits", f"{len(names)} images, noise level {found.sigma:.3g}")
    text.section(
        "Summary",
        "Root mean square change per value (images span [-1, 1]) against the round trip without an "
        f"edit, over the two longest steps, ±{most:g}.",
    ).cards(
        {
            "inside the region": change.inside,
            "outside": change.outside,
            "random direction, inside": change.random_inside,
            "random direction, outside": change.random_outside,
            "round trip without an edit": change.round_trip,
        }
    )
    text.section(
        "Edited images",
        "One row per direction, ordered by their effect on the region before the projection, and "
        "last a random direction of the same length. 0 is the round trip without an edit. "
        "Strengths are in units of √n √(α² + σ²).",
    )
    if not plots:
        text.note("For the pictures: pip install 'lowdim-diffusion[plots]', then edit again.")
    for i, name in enumerate(names):
        if plots:
            figure = reporting.figures.edit_grid(
                found.originals[i],
                found.images[i],
                found.strengths,
                row_labels=rows,
                mask=found.mask,
            )
            path = out / f"edit_{i}.png"
            figure.savefig(path, dpi=150)
            written.append(path)
            text.figure(figure, f"{name}; the region is outlined.", wide=True)
        numbers = zip(
            rows,
            *(
                np.asarray(a)[i].tolist()
                for a in (
                    found.directions.inside,
                    found.directions.outside,
                    found.directions.raw_inside,
                    found.directions.raw_outside,
                    found.directions.kept,
                    found.inside[..., -1],
                    found.outside[..., -1],
                )
            ),
            strict=True,
        )
        text.table(
            [
                "direction",
                "‖J_in v‖",
                "‖J_out v‖",
                "before projection, in",
                "out",
                "length kept",
                f"change inside at {most:g}",
                "outside",
            ],
            [[row[0], *(float(f"{v:.3g}") for v in row[1:])] for row in numbers],
        )
    text.section("How").text(
        "Images are carried up to the noise level by the sampler's ODE, moved along a right "
        "singular vector of the denoiser's Jacobian restricted to the region, from which the "
        "leading directions of the rest are projected away, and sampled again (LOCO, Chen et al. "
        "2024, arXiv 2409.02374)."
    )
    if command:
        text.commands([("The same again", command)])
    return [*written, text.write(out / "report.html")]
