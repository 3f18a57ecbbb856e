"""Experiments run at their smallest preset and show what they should."""

import subprocess
import sys

import numpy as np
import pytest

from experiments import jacobian_rank


def test_exact_rank_runs_from_d_to_kd():
    """papers: .125 where the subspace is certain, .25 where it is not."""
    ratio = jacobian_rank.rank_ratios(16).mean(1)
    np.testing.assert_allclose(ratio[:4], 0.125, atol=1e-6)
    np.testing.assert_allclose(ratio[6:], 0.25, atol=1e-6)
    assert 0.125 <= ratio[4] < 0.17 and 0.15 < ratio[5] < 0.25


@pytest.mark.slow
def test_writes_its_results(tmp_path):
    command = [sys.executable, "-m", "experiments.jacobian_rank", "--preset", "smoke"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {
        "jacobian_rank.csv",
        "jacobian_rank.png",
        "report.html",
    }
