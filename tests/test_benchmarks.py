"""Every benchmark case runs at its smallest size; the harness's arithmetic is checked by hand."""

import json

import pytest

from benchmarks import harness
from benchmarks.cases import CASES


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_case_runs(name):
    result = harness.run(CASES[name], "smoke", repeats=1)
    assert len(result["rows"]) >= 2
    assert all(row["median_ms"] > 0 for row in result["rows"])
    assert result["rows"][0]["ratio"] == 1
    assert name in harness.table(result)


def test_ratios_are_per_unit_and_pairwise(monkeypatch, tmp_path):
    lengths = iter([1, 1, *[2, 9], *[4, 10]])  # of each call
    clock = (now for length in lengths for now in (0, 0, length))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    variants = [harness.Variant("a", lambda: None, 1), harness.Variant("b", lambda: None, 3)]
    case = harness.Case("c", "step", lambda size: variants)
    first, second = harness.run(case, "smoke", repeats=2)["rows"]
    assert first["ratio"] == 1 and first["median_ms"] == 3000
    assert (second["ratio_min"], second["ratio_max"]) == (pytest.approx(5 / 6), 1.5)
    # A call of two milliseconds is made three times, and the shortest counts.
    clock = (now for now in (0, *[0, 2e-3], *[2e-3, 3e-3], *[3e-3, 6e-3]))
    assert harness._timed(lambda: None) == pytest.approx(1e-3)
    monkeypatch.undo()
    own = [harness.Variant("a", lambda: 0.5, 1), harness.Variant("b", lambda: 2.0, 2)]
    case = harness.Case("c", "step", lambda size: own, most_rounds=1)
    assert [row["ratio"] for row in harness.run(case, "smoke")["rows"]] == [1, 2]
    harness.write(tmp_path / "deep" / "b.json", [{"case": "c"}])
    stored = json.loads((tmp_path / "deep" / "b.json").read_text())
    assert stored["environment"]["jax"] and stored["results"] == [{"case": "c"}]
