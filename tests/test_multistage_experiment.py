"""The experiment on a decoder per interval of noise levels."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import multistage


def test_stages_of_a_batch():
    assert multistage.stage_sizes((0.25, 0.75), 128) == (32, 64, 32)
    assert multistage.stage_sizes((0.001, 0.999), 8) == (1, 6, 1)
    assert multistage.stage_sizes((0.98, 0.99), 8) == (6, 1, 1)


def test_cost_until_a_loss_is_reached():
    flops = np.array([1.0, 2.0, 3.0])
    falling = np.array([4.0, 2.0, 1.0])
    assert multistage.cost_until(falling, flops, 3.0) == 1.5
    assert multistage.cost_until(falling, flops, 1.0) == 3.0
    assert multistage.cost_until(falling, flops, 5.0) == 1.0  # before the first look
    assert multistage.cost_until(falling, flops, 0.5) == float("inf")


def test_contenders_cost_the_same():
    preset = multistage.PRESETS["smoke"]
    nets = multistage.contenders(preset, (8, 8, 1), (12, 44, 8))
    costs = {name: multistage.flops_per_call(net, 64) for name, net in nets.items()}
    assert costs["separate"] == costs["unified"]
    assert 0.95 < costs["multi-decoder"] / costs["unified"] <= 1
    widths = nets["multi-decoder"].config["decoder_widths"]
    assert widths[0] > widths[1] > widths[2]
    shapes = jax.eval_shape(nets["separate"].init, jax.random.key(0))
    assert len(shapes) == 3


@pytest.mark.slow
def test_multistage_writes_its_results(tmp_path):
    command = [sys.executable, "-m", "experiments.multistage", "--preset", "smoke"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "digits.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 and "remaining" in rows[0]
    assert len((tmp_path / "digits_curves.csv").read_text().splitlines()) == 1 + 3 * 2 * 3
    made = {"report.html", *(f"digits_{name}.png" for name in ("intervals", "loss", "stages"))}
    assert made <= {path.name for path in tmp_path.iterdir()}
