"""The watermark experiment runs at its smallest preset and shows what it should."""

import csv
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_watermark_writes_its_results(tmp_path):
    command = [sys.executable, "-m", "experiments.watermark", "--preset", "smoke"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {"mixture", "attacks", "settings"}
    assert {p.name for p in tmp_path.iterdir()} == {
        *("digits", "report.html", "mixture.png", "images.png", "last_sigma.png"),
        *(f"{name}.csv" for name in names),
    }
    tables = {}
    for name in names:
        with open(tmp_path / f"{name}.csv", newline="") as file:
            tables[name] = list(csv.DictReader(file))
    rate = {
        (row["floor"], row["last_sigma"]): float(row["tpr_noise_0.1"]) for row in tables["mixture"]
    }
    # The floor carries the mark, or the noise that may stay in the image; else it is lost.
    assert rate["0.3", "0.01"] > 0.9 and rate["0.0", "0.1"] > 0.6 > 0.2 > rate["0.0", "0.01"]
    assert all(float(row["auroc_cosine"]) > 0.95 for row in tables["attacks"][:2])
    assert len(tables["attacks"]) == 13 and len(tables["settings"]) == 2
