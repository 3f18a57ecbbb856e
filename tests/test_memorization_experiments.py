"""The experiments on memorization: copies at small N, new and shared images at large N."""

import subprocess
import sys

import numpy as np
import pytest

from experiments import _generators as generators
from experiments import disjoint_halves, memorization_generalization
from lowdim_diffusion import generalization


@pytest.fixture(scope="module")
def digits():
    return generators.load("digits", None, 1200, 500)


def test_examples_are_split_once(digits):
    pool = np.concatenate([digits.x, digits.held_out]).reshape(1700, -1)
    assert digits.x.shape == (1200, 8, 8, 1) and digits.held_out.shape == (500, 8, 8, 1)
    assert len(np.unique(pool, axis=0)) > 1690  # no image on both sides
    fewer = generators.load("digits", None, 10, 500)
    np.testing.assert_array_equal(fewer.x, digits.x[:10])
    with pytest.raises(SystemExit, match="1797 examples, 1797 are held out"):
        generators.load("digits", None, 10, 1797)


@pytest.mark.slow
def test_optimal_and_gaussian_samples_share_their_noise(digits):
    """The optimal denoiser copies; of one example it can only give that one, as can a Gaussian."""
    recipe = generators.MLP._replace(num_samples=12)
    copies = generators.optimal(digits.x[:20], recipe)
    assert float(generalization.memorized_fraction(copies, digits.x[:20])) == 1.0
    one = digits.x[:1]
    for made in (generators.optimal(one, recipe), generators.gaussian(one, recipe)):
        np.testing.assert_allclose(made, np.repeat(one, 12, 0), atol=2e-3)


def test_transition_is_found_between_two_counts():
    rows = [
        {"width": 8, "steps": 10, "N": n, "gl": gl} for n, gl in ((4, 0.0), (16, 0.25), (64, 0.75))
    ]
    assert memorization_generalization.transition(rows) == [
        ["width 8, 10 steps", "32", "0.00", "0.75"]
    ]


@pytest.mark.slow
def test_models_pass_from_copying_to_agreeing(digits, tmp_path):
    """Check 8: GL up in N, later for the wider network; RP to the optimal denoiser down to 0."""
    preset = memorization_generalization.PRESETS["cpu"]._replace(
        recipe=generators.MLP._replace(num_samples=100, lengths=(2500,)),
        counts=(16, 1024),
        widths=(128, 256),
    )
    results = memorization_generalization.train(digits, preset, tmp_path, 0, None)
    rows, threshold = memorization_generalization.score(results, preset)
    assert 0.9 < threshold < 1
    narrow, wide = ([r for r in rows if r["width"] == width] for width in preset.widths)
    assert wide[0]["gl"] < 0.4 and wide[1]["gl"] > 0.9
    assert narrow[0]["gl"] > wide[0]["gl"] + 0.1
    assert wide[0]["rp_optimal"] > 0.4 and wide[1]["rp_optimal"] < 0.1
    assert wide[0]["memorized"] > 0.5 and wide[1]["memorized"] < 0.02
    assert all(r["gl_optimal"] == 0 for r in rows)
    assert wide[1]["rp_seeds"] > 0.3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "table", "pictures"),
    [
        ("memorization_generalization", "memorization", 3 + 4),
        ("disjoint_halves", "disjoint_halves", 2 + 3),
    ],
)
def test_writes_its_results(name, table, pictures, tmp_path):
    command = [sys.executable, "-m", f"experiments.{name}", "--preset", "smoke"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {f"{table}.csv", "report.html", "chunks"} <= {p.name for p in tmp_path.iterdir()}
    assert len((tmp_path / f"{table}.csv").read_text().splitlines()) >= 5
    assert len(list(tmp_path.glob("*.png"))) >= pictures - 1


def test_images_beyond_the_width_are_predicted_clean():
    small = generators.adapted(generators.MLP, 128, (8, 8, 1))
    large = generators.adapted(generators.MLP, 128, (16, 16, 1))
    assert small.parametrization == "edm" and large.parametrization == "x0"
    assert small.lengths == (1500, 6000) and large.lengths == (750, 3000)
    assert generators.adapted(generators.UNET, 64, (32, 32, 3)) == generators.UNET


@pytest.mark.parametrize("module", [memorization_generalization, disjoint_halves])
def test_paper_presets_can_be_built(module):
    preset = module.PRESETS["paper"]
    width = preset.widths[1] if hasattr(preset, "widths") else preset.width
    net = generators.network(preset.recipe, width, (32, 32, 3))
    assert 55e6 < net.num_params < 65e6  # EDM's DDPM++ of base width 128 has 55.7 million


@pytest.mark.slow
def test_model_collapse_writes_its_results(tmp_path):
    command = [sys.executable, "-m", "experiments.model_collapse", "--preset", "smoke"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "violations of the bound: 0" in done.stdout
    for name, rows in {"linear": 2 * 5, "gaussian": 6 * 5, "curation": 7 * 11}.items():
        assert len((tmp_path / f"{name}.csv").read_text().splitlines()) == 1 + rows
    assert (tmp_path / "report.html").exists() and (tmp_path / "gaussian_trace.png").exists()
