"""Figures show the numbers they were given, on the axes a reader expects."""

import sys

import numpy as np
import pytest

from lowdim_diffusion.reporting import as_pictures, figures

SIGMAS = np.geomspace(0.01, 80, 9)


def lines(fig):
    return {line.get_label(): line.get_xydata() for line in fig.axes[0].lines}


def test_loss_curve_smooths_and_goes_to_log():
    rng = np.random.default_rng(0)
    steps = np.arange(800) * 25
    losses = 3 * np.exp(-steps / 4000) + 0.05 + 0.01 * rng.random(800)
    losses[7] = np.nan
    fig = figures.loss_curve(steps, losses, window=20)
    drawn = lines(fig)
    np.testing.assert_allclose(drawn["each"], np.stack([steps, losses], 1)[np.arange(800) != 7])
    smooth = drawn["mean of 21"]
    kept = np.delete(losses, 7)
    np.testing.assert_allclose(smooth[400, 1], kept[390:411].mean())
    np.testing.assert_allclose(smooth[[0, 2, -1], 1], [kept[0], kept[:5].mean(), kept[-11:].mean()])
    axes = fig.axes[0]
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "training step"
    assert figures.loss_curve(steps, 1 + 0.1 * losses / 3).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("losses", [[], [0.5], [np.nan, np.nan], [-1.0, 2.0]])
def test_loss_curve_of_hardly_anything(losses, tmp_path):
    figures.loss_curve(np.arange(len(losses)), losses).savefig(tmp_path / "a.png")


def test_singular_values_show_each_level():
    values = np.arange(12, 0, -1)[None] / SIGMAS[:, None]
    fig = figures.singular_values(SIGMAS, values, max_lines=3)
    axes = fig.axes[0]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    np.testing.assert_allclose([line.get_ydata() for line in axes.lines], values[[0, 4, 8]])
    assert "σ" in fig.axes[1].get_ylabel()
    batch = np.stack([0.5 * values, 1.5 * values], 1)
    fig = figures.singular_values(SIGMAS, batch, exact=values, max_lines=2)
    np.testing.assert_allclose(fig.axes[0].lines[0].get_ydata(), values[0])
    assert sum(line.get_linestyle() == "--" for line in fig.axes[0].lines) == 3  # two and a legend


def test_singular_values_of_hardly_anything(tmp_path):
    for sigmas, values in (([0.0], [[1.0]]), ([1.0], [[0.0, 0.0]]), ([1.0], [[2.0]])):
        figures.singular_values(sigmas, values).savefig(tmp_path / "a.png")


def test_rank_curve_is_drawn_against_inverse_noise():
    ratio = np.linspace(0.9, 0.25, 9)
    exact = np.full(3, 0.125)
    fig = figures.rank_curve(
        np.append(SIGMAS, 0.0), np.append(ratio, 1.0), exact=exact, exact_sigmas=[0.1, 1.0, 10.0]
    )
    drawn = lines(fig)
    np.testing.assert_allclose(drawn["model"], np.stack([1 / SIGMAS, ratio], 1))
    np.testing.assert_allclose(drawn["exact posterior mean"][:, 0], [10, 1, 0.1])
    assert fig.axes[0].get_xscale() == "log" and fig.axes[0].get_yscale() == "linear"
    assert "1/σ" in fig.axes[0].get_xlabel()
    many = np.stack([ratio / 50 ** np.linspace(0, 1, 9)] * 4, 1)
    fig = figures.rank_curve(SIGMAS, many)
    assert fig.axes[0].get_yscale() == "log" and len(fig.axes[0].collections) == 1


def test_pictures_in_figures():
    x = np.random.default_rng(0).integers(0, 255, (7, 8, 8, 3), dtype=np.uint8)
    fig = figures.nearest_pairs(x, x[::-1], np.arange(7), columns=4)
    shown = [axes for axes in fig.axes if axes.images]
    assert len(shown) == 14
    np.testing.assert_array_equal(shown[0].images[0].get_array(), x[0])
    captions = [axes.get_xlabel() for axes in shown if axes.get_xlabel()]
    assert captions == [f"{i:.2f}" for i in range(7)]
    states = (
        np.random.default_rng(0).standard_normal((9, 5, 8, 8, 1))
        * SIGMAS[::-1, None, None, None, None]
    )
    fig = figures.trajectory_strip(states, SIGMAS[::-1], rows=2, columns=4)
    assert len(fig.axes) == 8 and fig.axes[0].get_title() == "σ = 80"
    figures.trajectory_strip(np.ones((3, 1, 48)), SIGMAS[:3])


def test_edit_grid_shows_strengths_in_order_and_one_scale_of_change():
    rng = np.random.default_rng(0)
    before = rng.uniform(-0.5, 0.5, (3, 6, 8, 3))
    edits = before[:, None] + 0.2 * rng.normal(size=(3, 4, 6, 8, 3))
    strengths = [1.0, -2.0, 0.0, 0.5]
    mask = np.zeros((6, 8), bool)
    mask[1:3, 2:5] = True
    fig = figures.edit_grid(before, edits, strengths, row_labels=["a", "b", "c"], mask=mask)
    grid = np.array([axes for axes in fig.axes if axes.images][:18]).reshape(3, 6)
    titles = [axes.get_title() for axes in grid[0]]
    assert titles == ["before", "λ = −2", "0", "+0.5", "+1", "Δ at −2"]
    assert [row[0].get_ylabel() for row in grid] == ["a", "b", "c"]
    for i, row in enumerate(grid):
        np.testing.assert_array_equal(row[0].images[0].get_array(), as_pictures(before)[i])
        for axes, k in zip(row[1:5], (1, 2, 3, 0), strict=True):
            np.testing.assert_array_equal(axes.images[0].get_array(), as_pictures(edits[:, k])[i])
        (drawn,) = row[5].images
        change = edits[i, 1] - before[i]
        for y, x in np.ndindex(6, 8):
            most = change[y, x][np.argmax(np.abs(change[y, x]))]
            assert drawn.get_array()[y, x] == pytest.approx(most)
        assert [bool(axes.collections) for axes in row] == [True] + 4 * [False] + [True]
    limits = {tuple(row[5].images[0].get_clim()) for row in grid}
    top = max(np.abs(row[5].images[0].get_array()).max() for row in grid)
    assert limits == {(-top, top)}
    assert fig.axes[-1].get_ylabel() == "after − before"
    ends = np.concatenate([s for s in grid[0, 0].collections[0].get_segments()])
    assert {tuple(p) for p in ends} == {(1.5, 0.5), (4.5, 0.5), (1.5, 2.5), (4.5, 2.5)}


def test_edit_grid_takes_bytes_grays_and_a_single_picture(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 5), dtype=np.uint8)
    edits = np.stack([[x, 255 - x]] * 2)
    fig = figures.edit_grid(x, edits, [0, 3], row_labels=["a", "b"])
    change = fig.axes[3].images[0].get_array()
    np.testing.assert_allclose(change, (255 - 2 * x.astype(float)) / 127.5, atol=1e-12)
    fig.savefig(tmp_path / "a.png")
    x, edits = x[..., None], edits[..., None]
    fig = figures.edit_grid(x, edits, [0, 3], row_labels="ab", difference=False)
    assert len(fig.axes) == 6
    still = figures.edit_grid(x, x[None, None], [0], row_labels=["none"])
    still.savefig(tmp_path / "a.png")
    broken = np.where(np.eye(5)[..., None], np.nan, x / 255)
    figures.edit_grid(x, broken[None, None], [1], row_labels=[""]).savefig(tmp_path / "a.png")


def test_edit_grid_refuses_what_does_not_fit():
    edits = np.zeros((2, 3, 4, 5, 1))
    draw = lambda **change: figures.edit_grid(
        **({"originals": np.zeros((2, 4, 5, 1)), "edits": edits, "strengths": [0, 1, 2],
            "row_labels": ["a", "b"]} | change)
    )  # fmt: skip
    for change, message in (
        ({"originals": np.zeros((3, 4, 5, 1))}, "shape of originals"),
        ({"edits": np.zeros((2, 3))}, "shape of edits"),
        ({"strengths": [0, 1]}, "number of strengths"),
        ({"row_labels": ["a"]}, "number of row labels"),
        ({"mask": np.ones((5, 4))}, "wrong shape of the mask"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(**change)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="wrong shape of sigmas"):
        figures.rank_curve(SIGMAS[:3], np.ones(4))
    with pytest.raises(ValueError, match="one loss per step"):
        figures.loss_curve(np.arange(3), np.ones(4))
    with pytest.raises(ValueError, match="one neighbour and one distance per sample"):
        figures.nearest_pairs(np.ones((2, 4, 4)), np.ones((3, 4, 4)), np.ones(2))
    with pytest.raises(ValueError, match="shape of the singular values"):
        figures.singular_values(SIGMAS, np.ones(9))


def test_no_global_state_and_a_clear_error_without_matplotlib(monkeypatch):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.rank_curve(SIGMAS, np.ones(9))
    assert dict(matplotlib.rcParams) == before
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'lowdim-diffusion\[plots\]'"):
        figures.rank_curve(SIGMAS, np.ones(9))


def test_label_maps_put_a_across_and_b_up(tmp_path):
    labels = np.zeros((5, 5), int)
    labels[4, 0], labels[0, 4] = 1, 2  # a = 1 is right, b = 1 is up
    fig = figures.label_maps({"one": labels, "other": labels.T}, span=(0.0, 2.0), corners=[(0, 0)])
    image = fig.axes[0].images[0]
    drawn = np.asarray(image.get_array())
    assert image.origin == "lower" and image.get_extent() == [-0.25, 2.25, -0.25, 2.25]
    same = lambda i, j: (drawn == drawn[i, j]).all(-1)
    assert same(0, 0).sum() == 23 and same(0, 4).sum() == 1 == same(4, 0).sum()
    other = np.asarray(fig.axes[1].images[0].get_array())
    np.testing.assert_array_equal(other, drawn.transpose(1, 0, 2))
    np.testing.assert_array_equal(drawn[0, 4] > drawn[0, 0], [True, False, False])  # orange
    fig.savefig(tmp_path / "maps.png")
    with pytest.raises(ValueError, match="integers >= 0"):
        figures.label_maps({"one": labels - 1})


def test_panels_share_axes_names_and_label_few_decades():
    lines = {"a": ([5, 10, 100], [0.5, 0.2, 0.01]), "b": ([5, 10, 100], [0.9, 0.4, 0.03])}
    fig = figures.curve_panels(
        {"one": lines, "two": {"c": ([5, 50], [1.0, 0.1])}},
        xlabel="NFE",
        ylabels=["error", "law"],
        xscale="log",
        yscale="log",
        levels=[None, 0.05],
    )
    fig.canvas.draw()
    one, two = fig.axes
    assert (one.get_title(), two.get_title()) == ("one", "two")
    assert [t.get_text() for t in one.get_legend().get_texts()] == ["a", "b"]
    shown = [t.get_text() for t in one.get_xticklabels()]
    assert {"5", "10", "20", "50", "100"} <= set(shown)
    assert len(two.lines) == 2 and two.lines[1].get_ydata()[0] == 0.05
    with pytest.raises(ValueError, match=r"curve_panels: 1 panels: .* got 2 ylabels and 1 levels"):
        figures.curve_panels({"one": lines}, xlabel="x", ylabels=["y", "z"])


def test_loss_curves_lie_over_each_other(tmp_path):
    steps = np.arange(1, 401)
    losses = {"a": 2 / steps, "b": np.where(steps % 100, 3.0, np.nan), "one": [0.5], "none": []}
    count = lambda values: np.arange(1, len(values) + 1)
    fig = figures.loss_curves({k: (count(v), v) for k, v in losses.items()})
    axes = fig.axes[0]
    assert axes.get_yscale() == "log"
    drawn = lines(fig)
    assert set(losses) <= set(drawn) and len(drawn["b"]) == 396 and len(axes.lines) == 6
    np.testing.assert_allclose(drawn["a"][[0, -1], 1], [2.0, np.mean(2 / steps[-6:])])
    fig.savefig(tmp_path / "a.png")
    many = figures.loss_curves({f"run {i}": (steps, 1 / steps) for i in range(9)})
    styles = {(line.get_color(), line.get_linestyle()) for line in many.axes[0].lines[1::2]}
    assert len(styles) == 9
    with pytest.raises(ValueError, match="one loss per step"):
        figures.loss_curves({"a": ([1, 2], [1])})
    figures.loss_curves({"negative": ([1, 2], [-1, -2])}).savefig(tmp_path / "b.png")
