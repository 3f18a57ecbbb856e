"""Edits of a run's images, measured beside random directions, and their report."""

import importlib.util
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion import editing, reporting, schedules, solvers, subspaces
from lowdim_diffusion.cli import build
from lowdim_diffusion.cli.errors import CommandError
from lowdim_diffusion.cli.loading import LoadedRun

__all__ = ["TOLERANCE", "Edited", "edit", "report", "summary", "unconverged"]

TOLERANCE = 1e-3
"""Sine within which a search for directions is to settle."""


class Edited(NamedTuple):
    """What was done to b images, in D rows; arrays are numpy's."""

    originals: np.ndarray
    """``[b, *data]``."""
    mask: np.ndarray
    """``[*data]``."""
    sigma: float
    """Noise level ``sigma / alpha`` of the edit."""
    strengths: np.ndarray
    """``[S]``, 0 in the middle if S is odd."""
    rows: tuple[str, ...]
    """Names of the D directions: those found, further ones, and last a random one to compare."""
    num_own: int
    """How many of the images have directions of their own; the others have the first one's."""
    reconstruction: np.ndarray
    """``[b, *data]``, the round trip without an edit."""
    images: np.ndarray
    """``[b, D, S, *data]``."""
    directions: editing.Directions
    """``[b, D, ...]``."""
    inside: np.ndarray
    """``[b, D, S]`` rms change inside the mask against the round trip."""
    outside: np.ndarray
    """``[b, D, S]`` outside."""
    compile_s: float
    learn_s: float
    """Seconds to carry an image up and find its directions."""
    edit_s: float
    """Seconds per edited picture."""


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
    num_own: int | None = None,
    compose: Sequence[int] = (),
    toward: np.ndarray | None = None,
    averaged: bool = True,
    sigma: float | None = None,
    num_directions: int = 4,
    null_rank: int = 5,
    max_iters: int = 100,
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
        num_own: images with directions of their own; the rest are edited along those of the first.
            None is all.
        compose: numbers of directions, from 1, to add up into one more; minus turns one around.
        toward: ``[*data]``, another image: one more direction, the one that changes the region
            towards it fastest.
        averaged: use the moving average of the parameters.
        sigma: noise level of the edit; None for 1.5 standard deviations of the data, and 3 for a
            pretrained network, whose images are larger.
        num_directions: per image.
        null_rank: see :func:`lowdim_diffusion.editing.find_directions`.
        max_iters: bound of the search, see :func:`lowdim_diffusion.subspaces.jacobian_svd`.
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
    for number in compose:
        if not 1 <= abs(number) <= num_directions:
            raise CommandError(
                f"--compose: expected numbers of directions, 1 to {num_directions}, got {number}"
            )
    times = _times(schedule, sigma, num_steps)
    strengths = np.linspace(-strength, strength, num_strengths)
    strengths[np.abs(strengths) < 1e-12] = 0
    cond = None if labels is None else jnp.asarray(labels, jnp.int32)
    count = len(x) if num_own is None else num_own
    own = lambda a: jax.tree.map(lambda a: a[:count], a)
    others = lambda a: jax.tree.map(lambda a: a[count:], a)
    solver = solvers.heun()

    def travel(params: Any, cond: Any, x: Any, coefficients: Any) -> Any:
        """Run the sampler's ODE, up or down: one program for both."""
        denoise_fn = build.denoiser(model, params, cond)
        step = lambda state, c: (solver.step(denoise_fn, state, c, None).state, None)
        return jax.lax.scan(step, solver.init(x), coefficients)[0].x

    def frozen(params: Any, cond: Any) -> Any:
        denoise_fn = build.denoiser(model, params, cond)
        return lambda x: denoise_fn(x, jnp.asarray(times[0], jnp.float32))

    def search(params: Any, cond: Any, x: Any, x_t: Any) -> editing.Directions:
        key, fn = jax.random.key(seed), frozen(params, cond)
        limits: Any = {"null_rank": null_rank, "max_iters": max_iters, "tol": TOLERANCE}
        parts = [editing.find_directions(key, fn, x_t, mask, num_directions, **limits)]
        if compose:
            each = [np.sign(i) * parts[0].v[:, abs(i) - 1] for i in compose]
            total = jnp.sum(jnp.stack(each), axis=0)
            parts.append(editing.given_directions(fn, x_t, mask, total[:, None]))
        if toward is not None:
            way = toward[None] - x
            score = lambda image: jnp.sum(image * way, axis=(1, 2, 3))
            parts.append(editing.supervised_direction(key, fn, x_t, score, mask, **limits))
        parts.append(editing.random_directions(jax.random.fold_in(key, 1), fn, x_t, mask, 1))
        joined = {
            name: jnp.concatenate([getattr(p, name) for p in parts], axis=1)
            for name in editing.Directions._fields[:-1]
        }
        change = jnp.max(jnp.stack([p.change for p in parts]), axis=0)
        return editing.Directions(**joined, change=change)

    def measure(params: Any, cond: Any, x_t: Any, v: Any) -> editing.Directions:
        return editing.given_directions(frozen(params, cond), x_t, mask, v)

    down, up = (
        jax.tree.map(
            lambda a: np.asarray(a, np.float32), solvers.plan(solver, schedule, ts).coefficients
        )
        for ts in (times, times[::-1])
    )
    find, find_s = _compiled(search, params, own(cond), own(x), own(x))
    move, move_s = _compiled(travel, params, cond, x, up)
    begin = time.perf_counter()
    x_t = move(params, cond, x, up)
    found = jax.block_until_ready(find(params, own(cond), own(x), own(x_t)))
    learn_s = (time.perf_counter() - begin) / len(x)
    if count < len(x):
        moved = jax.jit(measure)(params, others(cond), others(x_t), found.v[0])
        found = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), found, moved)
    unit = float(subspaces.step_length(schedule, times[0], x.shape[1:]))
    begin = time.perf_counter()
    sample = lambda shift: np.asarray(move(params, cond, x_t + shift, down))
    before = sample(0)
    rows = found.v.shape[1]
    after = [
        [before if s == 0 else sample(unit * s * found.v[:, d]) for s in strengths]
        for d in range(rows)
    ]
    edits = 1 + rows * np.count_nonzero(strengths)
    edit_s = (time.perf_counter() - begin) / (edits * len(x))
    images = np.moveaxis(np.asarray(after), 2, 0)
    if not np.all(np.isfinite(images)):
        raise CommandError("the edited images hold NaN or infinity; lower --strength")
    inside, outside = _changes(before, images, mask)
    return Edited(
        originals=np.asarray(x),
        mask=np.asarray(mask),
        sigma=float(sigma),
        strengths=strengths,
        rows=_row_names(num_directions, compose, toward is not None),
        num_own=count,
        reconstruction=before,
        images=images,
        directions=jax.tree.map(np.asarray, found),
        inside=inside,
        outside=outside,
        compile_s=find_s + move_s,
        learn_s=learn_s,
        edit_s=edit_s,
    )


def _times(schedule: Any, sigma: float, num_steps: int) -> np.ndarray:
    """Times from the edit's noise level down to one that is not seen; the same for both ways."""
    low, high = (
        float(schedules.noise_levels(schedule, t)) for t in (schedule.t_min, schedule.t_max)
    )
    if not low < sigma < high:
        raise CommandError(
            f"--sigma {sigma:g}: the schedule's noise levels go from {low:.3g} to {high:.3g}"
        )
    last = min(max(low, 0.01), sigma / 2)
    levels = schedules.karras_grid(num_steps + 1, last, sigma)[:-1]
    return np.asarray(schedules.times_from_sigmas(schedule, levels))


def _compiled(fn: Any, *args: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    return jax.jit(fn).lower(*args).compile(), time.perf_counter() - begin


def _row_names(num_directions: int, compose: Sequence[int], toward: bool) -> tuple[str, ...]:
    names = [f"direction {i + 1}" for i in range(num_directions)]
    if compose:
        signed = [f"{'−' if i < 0 else '+'} {abs(i)}" for i in compose]
        names.append(" ".join(signed).removeprefix("+ "))
    return (*names, *(["towards"] * toward), "random")


def _changes(before: np.ndarray, after: np.ndarray, mask: np.ndarray) -> tuple[Any, ...]:
    """Root mean square change per value ``[b, D, S]`` inside and outside."""
    one = lambda a: editing.inside_outside_change(before, a, mask)
    flat = after.reshape(after.shape[0], -1, *before.shape[1:])
    change = jax.vmap(one, in_axes=1, out_axes=1)(flat)
    shape = after.shape[:3]
    return tuple(np.asarray(side).reshape(shape) for side in change)


def summary(found: Edited, images: slice = slice(None)) -> Summary:
    """Return the averages that tell at once whether the edits of some images are local."""
    ends = lambda a: float(a[images][..., [0, -1]].mean())
    own, random = slice(None, -1), slice(-1, None)
    trip = editing.round_trip_error(found.originals[images], found.reconstruction[images])
    return Summary(
        float(np.mean(trip.rmse)),
        ends(found.inside[:, own]),
        ends(found.outside[:, own]),
        ends(found.inside[:, random]),
        ends(found.outside[:, random]),
    )


def unconverged(found: Edited) -> list[int]:
    """Return which images' directions the search had not settled on when it stopped."""
    return np.flatnonzero(~(found.directions.change <= TOLERANCE)).tolist()


def report(out: pathlib.Path, found: Edited, *, names: Sequence[str], command: str = "") -> Any:
    """Write ``report.html``, the page ``edits.html`` and a picture per image; return their paths.

    Pictures of an earlier, larger edit in the same directory are removed.

    Args:
        out: directory, which exists.
        found: the edits.
        names: of the images.
        command: what was run, shown in the report.
    """
    plots = importlib.util.find_spec("matplotlib") is not None
    change, most = summary(found, slice(found.num_own)), float(found.strengths[-1])
    page = reporting.write_edit_page(
        out / "edits.html",
        originals=found.originals,
        edits=found.images,
        strengths=found.strengths,
        labels=names,
        directions=found.rows,
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
    ).table(
        ["images needed", "seconds to learn", "seconds per picture", "seconds to compile"],
        [[1, *(float(f"{s:.3g}") for s in (found.learn_s, found.edit_s, found.compile_s))]],
    )
    if unconverged(found):
        which = ", ".join(names[i] for i in unconverged(found))
        text.note(
            f"The search for directions had not converged for {which}: they still turned by up to "
            f"{found.directions.change.max():.2g} in an iteration. Raise --max-iters."
        )
    text.section(
        "Edited images",
        "One row per direction, ordered by their effect on the region before the projection, and "
        "last a random direction of the same length. 0 is the round trip without an edit. "
        "Strengths are in units of √n √(α² + σ²).",
    )
    if not plots:
        text.note("For the pictures: pip install 'lowdim-diffusion[plots]', then edit again.")
    for path in out.iterdir():
        if re.fullmatch(r"edit_\d+\.png", path.name) and path.is_file():
            path.unlink()
    for i, name in enumerate(names):
        if plots:
            figure = reporting.figures.edit_grid(
                found.originals[i],
                found.images[i],
                found.strengths,
                row_labels=found.rows,
                mask=found.mask,
            )
            path = out / f"edit_{i}.png"
            figure.savefig(path, dpi=150)
            written.append(path)
            text.figure(figure, f"{name}; the region is outlined.", wide=True)
        numbers = zip(
            found.rows,
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
