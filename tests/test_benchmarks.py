"""Every benchmark case runs at its smallest size; the harness's arithmetic is checked by hand."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import compare, harness, peers, report, roof
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
    lengths = [2, 9, 4, 10]  # of each call but the two first ones, which are made once
    clock = iter([0, 1, 1, 2, *(now for t in lengths for now in (0, 0, t, t))])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    variants = [harness.Variant("a", lambda: None, 1), harness.Variant("b", lambda: None, 3)]
    case = harness.Case("c", "step", lambda size: variants)
    first, second = harness.run(case, "smoke", repeats=2)["rows"]
    assert first["ratio"] == 1 and first["median_ms"] == 3000
    assert (second["ratio_min"], second["ratio_max"]) == (pytest.approx(5 / 6), 1.5)
    # A call of two milliseconds is made three times, and the shortest counts.
    clock = iter([0, *[0, 2e-3, 2e-3], *[2e-3, 3e-3, 3e-3], *[3e-3, 6e-3, 6e-3]])
    assert harness._timed(lambda: None) == pytest.approx(1e-3)
    monkeypatch.undo()
    own = [harness.Variant("a", lambda: 0.5, 1), harness.Variant("b", lambda: 2.0, 2)]
    case = harness.Case("c", "step", lambda size: own, most_rounds=1)
    assert [row["ratio"] for row in harness.run(case, "smoke")["rows"]] == [1, 2]
    harness.write(tmp_path / "deep" / "b.json", [{"case": "c"}])
    stored = json.loads((tmp_path / "deep" / "b.json").read_text())
    assert stored["environment"]["jax"] and stored["results"] == [{"case": "c"}]


def result(case, rows, size="small"):
    keys = ("ours", "times_ms")
    return {
        "case": case,
        "size": size,
        "rows": [{"variant": name, **dict(zip(keys, row, strict=True))} for name, row in rows],
    }


def run_of(*results, gemm=1e9):
    environment = {"device_kind": "cpu"}
    return {"environment": environment, "roof": {"gemm_flops": gemm}, "results": list(results)}


def test_changes_are_those_of_the_ratio_to_the_yardsticks(tmp_path, capsys):
    """A machine of half the speed changes nothing; a variant that takes twice as long does."""
    times = [10.0, 11.0, 12.0]
    twice = [2 * t for t in times]
    same = result("a", [("peer", (False, twice)), ("fast", (True, twice))])
    slower = result("b", [("peer", (False, twice)), ("slow", (True, [4 * t for t in times]))])
    alone = result("c", [("alone", (True, twice))])
    before = [
        result("a", [("peer", (False, times)), ("fast", (True, times))]),
        result("b", [("peer", (False, times)), ("slow", (True, times))]),
        result("c", [("alone", (True, times)), ("gone", (True, times))]),
    ]
    old, new = run_of(*before), run_of(same, slower, alone, gemm=0.5e9)
    found = {c.variant: c for c in compare.changes(old, new)}
    assert sorted(found) == ["alone", "fast", "slow"]
    assert [found[n].ratio for n in ("alone", "fast", "slow")] == pytest.approx([1, 1, 2])
    assert [n for n, c in found.items() if c.is_slower(0.1)] == ["slow"]
    assert (found["alone"].low, found["alone"].high) == pytest.approx((10 / 12, 1.2))

    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for file, run in zip(files, (old, new), strict=True):
        file.write_text(json.dumps(run))
    arguments = [str(f) for f in files]
    assert compare.main([*arguments, "--figure", str(tmp_path / "f.png")]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert (tmp_path / "f.png").stat().st_size > 5000
    assert compare.main([arguments[0], arguments[0]]) == 0
    files[1].write_text("{}")
    assert compare.main(arguments) == 2
    assert "not a benchmarks.json" in capsys.readouterr().err


def test_a_missing_peer_is_named_with_what_installs_it(monkeypatch):
    absent = lambda name: None if name in ("torch", "faiss") else object()
    monkeypatch.setattr(peers.importlib.util, "find_spec", absent)
    assert peers.missing(("torch", "sklearn", "faiss")) == {
        "torch": peers.INSTALL["torch"],
        "faiss": "pip install faiss-cpu",
    }
    assert peers.present("sklearn", "scipy") and not peers.present("sklearn", "torch")
    for case in CASES.values():
        assert set(case.peers) <= set(peers.INSTALL)


def test_page_is_made_of_the_files(tmp_path):
    work = lambda x: x @ x
    build = lambda size: [
        harness.jitted("theirs", work, jnp.ones((64, 64)), ours=False),
        harness.jitted("mine", work, jnp.ones((64, 64)), bars={"theirs": 1e9, "absent": 1.0}),
    ]
    found = harness.run(harness.Case("c", "call", build), "small", 2, roof.Roof(1e15, 1e9))
    mine = found["rows"][1]
    assert mine["flops_per_s"] == pytest.approx(2 * 64**3 / (mine["min_ms"] / 1e3))
    assert mine["share_of_gemm"] == pytest.approx(mine["flops_per_s"] / 1e15)
    assert mine["peak_bytes"] >= 2 * 64 * 64 * 4
    assert [bar["against"] for bar in mine["bars"]] == ["theirs"] and mine["bars"][0]["met"]
    assert found["missing"] == {} and "left out" not in harness.table(found)
    lacking = found | {"missing": {"torch": "pip install torch"}}
    assert "left out, torch is not installed: pip install torch" in harness.table(lacking)
    harness.write(tmp_path / "r.json", [found], roof.Roof(1e15, 1e9))
    assert report.main([str(tmp_path / "r.json"), "--out", str(tmp_path / "p.md")]) == 0
    page = (tmp_path / "p.md").read_text()
    assert "| **mine** |" in page and "| theirs |" in page and "at most 1e+09: met" in page
    assert "python -m benchmarks --size small --only c" in page
