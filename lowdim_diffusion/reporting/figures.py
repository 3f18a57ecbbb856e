"""Figures of a run: each function returns a matplotlib ``Figure`` and touches no global state.

They need the ``plots`` extra; matplotlib is imported at the first call. Sizes are chosen for a
column of about 12 cm, legible on a phone and in a paper. ``fig.savefig("x.pdf")`` as usual.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from lowdim_diffusion._checks import fail
from lowdim_diffusion.reporting.images import as_pictures

__all__ = [
    "curve_panels",
    "curves",
    "edit_grid",
    "loss_curve",
    "loss_curves",
    "label_maps",
    "nearest_pairs",
    "rank_curve",
    "singular_values",
    "success_maps",
    "trajectory_strip",
]

Figure: TypeAlias = Any
"""``matplotlib.figure.Figure``; not imported here."""

INK = "#1f2328"
LINE = "#d0d7de"
_BLUE, _ORANGE, _VIOLET = "#2f7fc1", "#d9722e", "#8a63b8"
_PALETTE = [_BLUE, _ORANGE, _VIOLET, "#3a8f5c", "#b5495b", "#6b7785", "#a07f1f"]

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
}


@contextlib.contextmanager
def _canvas(width: float, height: float) -> Iterator[Figure]:
    """Give a new figure under the house's style, without pyplot."""
    try:
        import matplotlib
        from matplotlib.figure import Figure as MatplotlibFigure
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed: pip install 'lowdim-diffusion[plots]'"
        ) from error
    with matplotlib.rc_context(_STYLE):
        yield MatplotlibFigure(figsize=(width, height), layout="constrained")


def _colors(sigmas: np.ndarray) -> tuple[Any, Any]:
    """Map of noise level to colour, blue (clean) to orange (noise), visible on white and black."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    ramp = LinearSegmentedColormap.from_list("noise", [_BLUE, _VIOLET, _ORANGE])
    low, high = float(sigmas.min()), float(sigmas.max())
    scale = ScalarMappable(LogNorm(low, high if high > low else low * 1.01), ramp)
    return ramp, scale


def _levels(where: str, sigmas: Any, count: int) -> np.ndarray:
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.shape != (count,):
        raise fail(where, "wrong shape of sigmas", f"({count},), one per noise level", sigmas.shape)
    return sigmas


def _spread(count: int, most: int) -> np.ndarray:
    """At most ``most`` of ``count`` indices, evenly spread, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


def loss_curve(
    steps: Any, losses: Any, *, x_label: str = "training step", window: int | None = None
) -> Figure:
    """Return the training loss, raw and smoothed; the loss axis is log if it spans a decade.

    Args:
        steps: ``[m]``, training step or images seen.
        losses: ``[m]``; values that are not finite are left out.
        x_label: what ``steps`` counts.
        window: width of the running mean in entries; None for a 40th of the curve.
    """
    steps, losses = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if steps.shape != losses.shape or steps.ndim != 1:
        raise fail("loss_curve", "one loss per step", f"shape {steps.shape}", losses.shape)
    kept = np.isfinite(losses)
    steps, losses = steps[kept], losses[kept]
    with _canvas(4.6, 2.9) as fig:
        axes = fig.subplots()
        if losses.size:
            half_window = (losses.size // 40 if window is None else window) // 2
            smooth = _running_mean(losses, half_window)
            thin = slice(None, None, max(1, losses.size // 1500))
            marker = "o" if losses.size == 1 else None
            faint = {"alpha": 0.35, "linewidth": 0.7} if half_window else {}
            axes.plot(steps[thin], losses[thin], marker=marker, color=_BLUE, label="each", **faint)
            if half_window:
                axes.plot(steps, smooth, color=_BLUE, label=f"mean of {2 * half_window + 1}")
                axes.legend()
            if losses.min() > 0 and losses.max() / losses.min() > 10:
                axes.set_yscale("log")
            if steps.max() >= 10_000:
                axes.xaxis.set_major_formatter(_thousands)
        axes.set(xlabel=x_label, ylabel="training loss")
    return fig


def loss_curves(lines: Mapping[str, Any], *, x_label: str = "training step") -> Figure:
    """Return training losses of several runs over each other: raw faint, smoothed on top, log axis.

    Args:
        lines: label to ``(steps [m], losses [m])``; values that are not finite, and not positive
            on the log axis, are left out. The axis is linear if no loss is positive.
        x_label: what the steps count.
    """
    with _canvas(7.2, 4.2) as fig:
        axes = fig.subplots()
        styles = itertools.cycle(itertools.product(("-", "--", ":"), _PALETTE))
        lows, highs = [], []
        for (label, (steps, losses)), (dash, color) in zip(lines.items(), styles, strict=False):
            steps, losses = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
            if steps.shape != losses.shape or steps.ndim != 1:
                got = f"{losses.shape} of {label}"
                raise fail("loss_curves", "one loss per step", f"shape {steps.shape}", got)
            kept = np.isfinite(losses) & (losses > 0)
            steps, losses = steps[kept], losses[kept]
            smooth = _running_mean(losses, losses.size // 80)
            thin = slice(None, None, max(1, losses.size // 1500))
            if losses.size > 40:
                axes.plot(steps[thin], losses[thin], color=color, alpha=0.18, linewidth=0.6)
            marker = "o" if losses.size == 1 else None
            axes.plot(steps, smooth, dash, color=color, marker=marker, label=label)
            if losses.size:
                lows.append(np.percentile(losses, 0.5))
                highs.append(smooth.max())
        if lows:
            axes.set(yscale="log", ylim=(0.9 * min(lows), 1.15 * max(highs)))
            _label_few_decades(axes.yaxis, "log")
        axes.set(xlabel=x_label, ylabel="training loss")
        if axes.get_xlim()[1] >= 10_000:
            axes.xaxis.set_major_formatter(_thousands)
        if len(lines) > 6:
            fig.set_figheight(4.2 + 0.2 * math.ceil(len(lines) / 2))
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        elif lines:
            axes.legend()
    return fig


def _running_mean(values: np.ndarray, half_window: int) -> np.ndarray:
    """Mean over a window around each value, narrower at the steep start, one-sided at the end."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(values.size)
    before = np.minimum(i, half_window)
    after = np.minimum(before, values.size - 1 - i)
    return (sums[i + after + 1] - sums[i - before]) / (before + after + 1)


def _thousands(value: float, _: Any = None) -> str:
    for scale, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"


def singular_values(
    sigmas: Any, values: Any, *, exact: Any = None, max_lines: int = 7, floor: float = 1e-4
) -> Figure:
    """Return the Jacobian's singular values against their index, one line per noise level.

    Args:
        sigmas: ``[T]`` noise levels sigma / alpha, > 0 (others are left out).
        values: ``[T, m]`` or ``[T, b, m]`` singular values, descending; averaged over b.
        exact: the same for the exact denoiser, drawn dashed.
        max_lines: noise levels shown, spread evenly.
        floor: smallest share of the largest value shown.
    """
    values = _averaged("singular_values", values)
    sigmas = _levels("singular_values", sigmas, len(values))
    shown = np.flatnonzero((sigmas > 0) & np.isfinite(values).all(1) & (values.max(1) > 0))
    shown = shown[_spread(shown.size, max_lines)]
    with _canvas(4.6, 3.2) as fig:
        axes = fig.subplots()
        index = np.arange(1, values.shape[1] + 1)
        if shown.size:
            ramp, scale = _colors(sigmas[shown])
            marker = "o" if index.size < 100 else None
            for i in shown:
                color = ramp(scale.norm(sigmas[i]))
                axes.plot(index, values[i], color=color, marker=marker, markersize=2.2)
            if exact is not None:
                exact = _averaged("singular_values", exact)
                for i in shown:
                    axes.plot(index[: exact.shape[1]], exact[i], "--", color=INK, linewidth=0.8)
                axes.plot([], [], color=_VIOLET, label="model")
                axes.plot([], [], "--", color=INK, linewidth=0.8, label="exact")
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
            bar = fig.colorbar(scale, ax=axes, pad=0.02, aspect=30)
            bar.set_label("noise level σ (data units)")
            bar.outline.set_visible(False)
            top = values[shown].max()
            axes.set(xscale="log", yscale="log", ylim=(top * floor, top * 2))
        axes.set(xlabel="index i", ylabel="singular value $s_i$ of the Jacobian")
    return fig


def _averaged(where: str, values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim not in (2, 3):
        raise fail(where, "shape of the singular values", "[T, m] or [T, b, m]", values.shape)
    return values.mean(1) if values.ndim == 3 else values


def rank_curve(
    sigmas: Any,
    ratio: Any,
    *,
    exact: Any = None,
    exact_sigmas: Any = None,
    label: str = "model",
    exact_label: str = "exact posterior mean",
) -> Figure:
    """Return numerical rank over dimension against 1/sigma; log rank axis if it spans a decade.

    Args:
        sigmas: ``[T]`` noise levels sigma / alpha, > 0 (others are left out).
        ratio: ``[T]`` or ``[T, b]`` rank / n in [0, 1]; over b the mean is drawn, and the range
            from the 10th to the 90th percentile shaded.
        exact: reference curve of the same kind, drawn dashed.
        exact_sigmas: its noise levels; None for the same ones.
        label: what ``ratio`` belongs to.
        exact_label: what ``exact`` belongs to.
    """
    ratio = np.asarray(ratio, np.float64)
    ratio = ratio[:, None] if ratio.ndim == 1 else ratio
    sigmas = _levels("rank_curve", sigmas, len(ratio))
    with _canvas(4.6, 3.0) as fig:
        axes = fig.subplots()
        positive = sigmas > 0
        snr, ratio = 1 / sigmas[positive], ratio[positive]
        axes.plot(snr, ratio.mean(1), "o-", color=_BLUE, markersize=3, label=label)
        if ratio.shape[1] > 1:
            low, high = np.percentile(ratio, [10, 90], axis=1)
            axes.fill_between(snr, low, high, color=_BLUE, alpha=0.18, linewidth=0)
        if exact is not None:
            exact = np.asarray(exact, np.float64)
            exact = exact.mean(1) if exact.ndim == 2 else exact
            at = sigmas if exact_sigmas is None else exact_sigmas
            at = _levels("rank_curve", at, len(exact))
            axes.plot(
                1 / at[at > 0], exact[at > 0], "--", color=_ORANGE, linewidth=1.4, label=exact_label
            )
        shown = ratio.mean(1)
        axes.set(xscale="log", xlabel="1/σ (signal to noise)", ylabel="numerical rank / dimension")
        if shown.size and shown.min() > 0 and shown.max() / shown.min() > 10:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, None)
        axes.legend()
    return fig


def _show(axes: Any, picture: np.ndarray) -> None:
    picture = picture.repeat(max(1, 8 // len(picture)), axis=0) if len(picture) == 1 else picture
    gray = picture[..., 0] if picture.shape[-1] == 1 else picture
    axes.imshow(gray, cmap="gray", vmin=0, vmax=255, interpolation="none", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def nearest_pairs(samples: Any, nearest: Any, distances: Any, *, columns: int = 6) -> Figure:
    """Return samples above their nearest training examples, with the distance under each pair.

    Args:
        samples: ``[N, ...]`` as :func:`lowdim_diffusion.reporting.images.as_pictures` takes them.
        nearest: ``[N, ...]``, the training example nearest to each.
        distances: ``[N]``.
        columns: pairs per row.
    """
    above, below = as_pictures(samples), as_pictures(nearest)
    distances = np.asarray(distances, np.float64).reshape(-1)
    if not len(above) == len(below) == len(distances):
        got = f"{len(above)}, {len(below)} and {len(distances)}"
        raise fail(
            "nearest_pairs", "one neighbour and one distance per sample", "equal numbers", got
        )
    columns = min(columns, len(above))
    rows = math.ceil(len(above) / columns)
    with _canvas(4.6, rows * (2 * 4.4 / columns + 0.3)) as fig:
        grid = fig.subplots(2 * rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for i, distance in enumerate(distances):
            row, column = divmod(i, columns)
            for axes, picture in (
                (grid[2 * row, column], above[i]),
                (grid[2 * row + 1, column], below[i]),
            ):
                axes.set_axis_on()
                _show(axes, picture)
            grid[2 * row + 1, column].set_xlabel(f"{distance:.2f}", fontsize=9, labelpad=2)
            if column == 0:
                grid[2 * row, 0].set_ylabel("sample", fontsize=9)
                grid[2 * row + 1, 0].set_ylabel("nearest", fontsize=9)
    return fig


def trajectory_strip(states: Any, sigmas: Any, *, rows: int = 3, columns: int = 7) -> Figure:
    """Return the way from noise to data: one row per example, one column per noise level.

    Args:
        states: ``[T, b, *data]``, pictures or vectors along the trajectory: x_t, or the denoised
            x0_hat. Columns of larger spread than the last are scaled down to it.
        sigmas: ``[T]`` noise levels, in the order of ``states``; they label the columns.
        rows: examples shown.
        columns: noise levels shown, spread evenly, first and last included.
    """
    states = np.asarray(states, np.float64)
    sigmas = _levels("trajectory_strip", sigmas, len(states))
    chosen = _spread(len(states), columns)
    rows = min(rows, states.shape[1])
    if states.ndim == 3:
        states = states / max(np.abs(states[-1]).max(), 1e-12)
    spread = max(states[-1].std(), 1e-12)
    fitted = [states[t, :rows] / max(1.0, states[t].std() / spread) for t in chosen]
    with _canvas(4.6, 4.6 * rows / len(chosen) + 0.3) as fig:
        grid = fig.subplots(rows, len(chosen), squeeze=False)
        for j, t in enumerate(chosen):
            column = fitted[j][:, None, :, None] if fitted[j].ndim == 2 else fitted[j]
            pictures = as_pictures(column)
            for i in range(rows):
                _show(grid[i, j], pictures[i])
            prefix = "σ = " if j == 0 else ""
            grid[0, j].set_title(f"{prefix}{sigmas[t]:.2g}", fontsize=9)
    return fig


def _data_units(x: Any) -> np.ndarray:
    """Pictures as float64 in the units of the data, in which 8 bits span [-1, 1]."""
    x = np.asarray(x)
    return x / 127.5 - 1 if x.dtype == np.uint8 else x.astype(np.float64)


def _signed_change(change: np.ndarray) -> np.ndarray:
    """``[..., h, w]``: of each pixel's channels, the one that changed most, with its sign."""
    largest = np.argmax(np.abs(change), axis=-1)[..., None]
    return np.take_along_axis(change, largest, axis=-1)[..., 0]


def _edges(inside: np.ndarray) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Straight pieces ``((x0, y0), (x1, y1))`` of a region's edge, along the sides of its pixels.

    Pixel ``[i, j]`` covers ``j <= x <= j + 1`` and ``i <= y <= i + 1``.
    """

    def pieces(inside: np.ndarray) -> Iterator[tuple[int, int, int]]:
        changes = np.diff(np.pad(inside.astype(np.int8), ((1, 1), (0, 0))), axis=0) != 0
        for y, row in enumerate(changes):
            ends = np.flatnonzero(np.diff(np.pad(row.astype(np.int8), 1)))
            for start, stop in ends.reshape(-1, 2).tolist():
                yield y, start, stop

    across = [((start, y), (stop, y)) for y, start, stop in pieces(inside)]
    return across + [((x, start), (x, stop)) for x, start, stop in pieces(inside.T)]


def edit_grid(
    originals: Any,
    edits: Any,
    strengths: Any,
    *,
    row_labels: Iterable[str],
    mask: Any = None,
    difference: bool = True,
) -> Figure:
    """Return edits in a grid: a row per direction, a column per strength, negative to positive.

    The first column is the picture before the edit, the last one the signed change at the strongest
    edit, all rows on one scale; of three channels the one that changed most is shown.

    Args:
        originals: ``[R, h, w, c]`` or ``[R, h, w]``, one per row, or a single ``[h, w, c]`` or
            ``[h, w]`` for all; values as :func:`lowdim_diffusion.reporting.as_pictures` takes them.
        edits: ``[R, S, h, w, c]`` or ``[R, S, h, w]``.
        strengths: ``[S]``, in any order.
        row_labels: R names, e.g. of directions.
        mask: the edits' region ``[h, w]`` or ``[h, w, 1 or c]``, outlined before and in the change.
        difference: whether to draw the last column.
    """
    where = "edit_grid"
    originals, edits, labels = np.asarray(originals), np.asarray(edits), list(row_labels)
    if edits.ndim not in (4, 5) or 0 in edits.shape:
        raise fail(where, "shape of edits", "[R, S, h, w, c] or [R, S, h, w]", edits.shape)
    data_shape, rows = edits.shape[2:], len(edits)
    if originals.shape not in (data_shape, (rows, *data_shape)):
        raise fail(where, "shape of originals", f"{(rows, *data_shape)}", originals.shape)
    if len(labels) != rows:
        raise fail(where, "number of row labels", rows, len(labels))
    strengths = np.asarray(strengths, np.float64)
    if strengths.shape != edits.shape[1:2]:
        raise fail(where, "number of strengths", f"({edits.shape[1]},)", strengths.shape)
    order = np.argsort(strengths)
    strengths = strengths[order]
    size = (*data_shape, 1)[:3]
    before = np.broadcast_to(_data_units(originals), (rows, *data_shape)).reshape(rows, *size)
    after = _data_units(edits)[:, order].reshape(rows, len(order), *size)
    edges = []
    if mask is not None:
        inside = np.asarray(mask)
        if inside.shape not in (size[:2], size, (*size[:2], 1)):
            raise fail(where, "wrong shape of the mask", f"{size[:2]}", inside.shape)
        edges = _edges((inside if inside.ndim == 2 else inside.any(-1)) != 0)
    strongest = int(np.flatnonzero(np.abs(strengths) == np.abs(strengths).max())[-1])
    changes = _signed_change(after[:, strongest] - before)
    columns = 1 + len(order) + difference
    side = 0.72
    height = rows * (side * size[0] / size[1] + 0.06) + 0.5
    with _canvas(side * columns + 1.1 + 0.7 * difference, height) as fig:
        grid = fig.subplots(rows, columns, squeeze=False)
        shown = None
        top = np.max(np.abs(changes), initial=0, where=np.isfinite(changes)) or 1.0
        for i in range(rows):
            pictures = as_pictures(np.concatenate([before[i : i + 1], after[i]]))
            for axes, picture in zip(grid[i], pictures, strict=False):
                _show(axes, picture)
            grid[i, 0].set_ylabel(labels[i], fontsize=9, rotation=0, ha="right", va="center")
            if difference:
                _show(grid[i, -1], pictures[0])
                grid[i, -1].images[0].remove()
                shown = grid[i, -1].imshow(
                    changes[i], cmap=_diverging(), vmin=-top, vmax=top, interpolation="none"
                )
            for axes in (grid[i, 0], grid[i, -1])[: 1 + difference]:
                _outline(axes, edges)
            for axes in grid[i]:
                axes.set_aspect("equal")
        grid[0, 0].set_title("before", fontsize=9)
        for j, strength in enumerate(strengths):
            prefix = "λ = " if j == 0 else ""
            grid[0, 1 + j].set_title(prefix + _signed(strength), fontsize=9)
        if shown is not None:
            grid[0, -1].set_title(f"Δ at {_signed(strengths[strongest])}", fontsize=9)
            bar = fig.colorbar(shown, ax=list(grid[:, -1]), aspect=12 * rows, pad=0.08)
            bar.set_label("after − before", fontsize=9)
            bar.ax.tick_params(labelsize=8)
            bar.outline.set_visible(False)
    return fig


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def _diverging() -> Any:
    """Blue for less, orange for more, nearly white for none."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("change", ["#15599b", "#f3f4f6", "#c24e08"])


def _outline(axes: Any, edges: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    """Draw a region's edge over a picture: bright on dark, visible on any gray."""
    from matplotlib.collections import LineCollection

    if edges:
        lines = np.asarray(edges, np.float64) - 0.5
        for color, width in (("black", 1.4), ("#ffd43b", 0.7)):
            axes.add_collection(LineCollection(list(lines), colors=color, linewidths=width))


def success_maps(
    panels: Mapping[str, Any], x: Any, y: Any, *, xlabel: str, ylabel: str, line: Any = None
) -> Figure:
    """Return maps of success rates over the same two axes, side by side, white 0 to blue 1.

    Args:
        panels: title to ``[len(y), len(x)]`` rates in [0, 1]; NaN is left blank.
        x: values along the horizontal axis.
        y: values along the vertical one.
        xlabel: name of the horizontal axis.
        ylabel: name of the vertical one.
        line: ``[len(y)]`` values of x where theory puts the boundary; drawn as a staircase on the
            near side of the first value that should succeed.
    """
    x, y = np.asarray(x), np.asarray(y)
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    with _canvas(0.9 + 2.75 * columns, 2.3 * rows + 0.5) as fig:
        grid = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        image = None
        for (title, rates), axes in zip(panels.items(), grid.flat, strict=False):
            rates = np.asarray(rates, np.float64)
            if rates.shape != (len(y), len(x)):
                raise fail("success_maps", f"shape of {title!r}", (len(y), len(x)), rates.shape)
            image = axes.imshow(rates, origin="lower", cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axes.grid(False)
            axes.set_title(title, fontsize="medium" if len(title) < 27 else "small")
            axes.set_xticks(_spread(len(x), 8), x[_spread(len(x), 8)])
            axes.set_yticks(_spread(len(y), 8), y[_spread(len(y), 8)])
            if line is not None:
                at = np.searchsorted(x, np.asarray(line)) - 0.5
                edges = np.repeat(np.arange(len(y) + 1) - 0.5, 2)[1:-1]
                axes.plot(np.repeat(at, 2), edges, color=_ORANGE, linewidth=1.6)
        for axes in grid[-1]:
            axes.set_xlabel(xlabel)
        for axes in grid[:, 0]:
            axes.set_ylabel(ylabel)
        if image is not None:
            fig.colorbar(image, ax=list(grid.flat), label="success rate", shrink=0.85)
    return fig


def label_maps(
    panels: Mapping[str, Any],
    *,
    span: tuple[float, float] = (0.0, 1.0),
    corners: Iterable[tuple[float, float]] = ((0, 0), (1, 0), (0, 1)),
) -> Figure:
    """Return maps of whole numbers, side by side, one colour per number.

    For the noise plane (:func:`lowdim_diffusion.generalization.noise_plane_labels`): models that
    agree show the same map.

    Args:
        panels: title to ``[num, num]`` labels ``[i, j]`` at ``(a_i, b_j)``; a across, b up.
        span: first and last value of both a and b.
        corners: ``(a, b)`` of the anchors, marked and numbered from 1.
    """
    with _canvas(0.4 + 2.4 * max(len(panels), 1), 2.9) as fig:
        from matplotlib.colors import to_rgb

        colors = np.array([to_rgb(color) for color in _PALETTE])
        row = fig.subplots(1, max(len(panels), 1), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (title, labels) in zip(row, panels.items(), strict=False):
            labels = np.asarray(labels)
            if labels.ndim != 2 or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
                raise fail(
                    "label_maps", f"labels of {title!r}", "[num, num] integers >= 0", labels.shape
                )
            edge = (span[1] - span[0]) / (2 * max(len(labels) - 1, 1))
            extent = (span[0] - edge, span[1] + edge) * 2
            picture = colors[labels.T % len(colors)] * 0.55 + 0.45
            axes.imshow(picture, origin="lower", extent=extent, interpolation="nearest")
            axes.grid(False)
            axes.set_title(title, fontsize="medium" if len(title) < 24 else "small")
            axes.set_xlabel("a")
            for number, (a, b) in enumerate(corners):
                axes.plot(a, b, "o", color=colors[number % len(colors)], markeredgecolor=INK)
                axes.annotate(f"{number + 1}", (a, b), (4, 4), textcoords="offset points")
        row[0].set_ylabel("b")
    return fig


def curves(
    lines: Mapping[str, Any],
    *,
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "linear",
    dashed: Mapping[str, Any] | None = None,
    level: float | None = None,
) -> Figure:
    """Return named curves in one pair of axes.

    Args:
        lines: label to ``(x, y)`` or ``(x, y, spread)``; the band ``y -/+ spread`` is shaded.
        xlabel: name of the horizontal axis.
        ylabel: name of the vertical one.
        xscale: ``"linear"`` or ``"log"``.
        yscale: likewise.
        dashed: curves to compare with, ``(x, y)``, in the colours of the lines of the same order.
        level: height of a thin horizontal line.
    """
    with _canvas(5.2, 3.3) as fig:
        axes = fig.subplots()
        _draw_curves(axes, lines, dashed or {}, level, xscale, yscale)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if len(lines) + len(dashed or {}) > 4:  # no corner is free
            fig.set_figheight(4.2)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
        else:
            axes.legend()
    return fig


def curve_panels(
    panels: Mapping[str, Mapping[str, Any]],
    *,
    xlabel: str,
    ylabels: Sequence[str],
    xscale: str = "linear",
    yscale: str = "linear",
    levels: Sequence[float | None] | None = None,
) -> Figure:
    """Return named curves in several pairs of axes side by side, each with a legend below.

    Args:
        panels: title to lines, these as for :func:`curves`.
        xlabel: name of the horizontal axes.
        ylabels: name of each vertical one.
        xscale: ``"linear"`` or ``"log"``.
        yscale: likewise.
        levels: heights of thin horizontal lines, one per panel or None.

    Raises:
        ValueError: if there are not as many names and heights as panels.
    """
    count = len(panels)
    levels = [None] * count if levels is None else levels
    if not count or len(ylabels) != count or len(levels) != count:
        got = f"{len(ylabels)} ylabels and {len(levels)} levels"
        raise fail("curve_panels", f"{count} panels", "one ylabel and level each", got)
    with _canvas(3.6 * count, 4.4) as fig:
        row = fig.subplots(1, count, squeeze=False)[0]
        for axes, title, ylabel, level in zip(row, panels, ylabels, levels, strict=True):
            _draw_curves(axes, panels[title], {}, level, xscale, yscale)
            axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return fig


def _draw_curves(
    axes: Any,
    lines: Mapping[str, Any],
    dashed: Mapping[str, Any],
    level: float | None,
    xscale: str,
    yscale: str,
) -> None:
    for color, (label, (x, y, *spread)) in zip(
        itertools.cycle(_PALETTE), lines.items(), strict=False
    ):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        axes.plot(x, y, "o-", color=color, markersize=3, label=label)
        if spread:
            axes.fill_between(x, y - spread[0], y + spread[0], color=color, alpha=0.15, lw=0)
    for color, (label, (x, y)) in zip(itertools.cycle(_PALETTE), dashed.items(), strict=False):
        axes.plot(x, y, "--", color=color, linewidth=1.2, label=label)
    if level is not None:
        axes.axhline(level, color=LINE, linewidth=1)
    axes.set(xscale=xscale, yscale=yscale)
    _label_few_decades(axes.xaxis, xscale)
    _label_few_decades(axes.yaxis, yscale)


def _label_few_decades(axis: Any, scale: str) -> None:
    """Label 1, 2 and 5 of each decade of a log axis, if there are few."""
    low, high = axis.get_view_interval()
    if scale == "log" and high < 300 * low:
        from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
