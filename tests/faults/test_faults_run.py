"""Other machines, other options, other surroundings: equal numbers, or one clear line."""

import functools
import json
import os
import signal
import subprocess
import sys

import fault_processes as fp
import numpy as np
import pytest
import sabotage

from lowdim_diffusion.training import checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.fault("F01")
def test_two_runs_in_two_kinds_of_process_are_the_same(whole, tmp_path):
    fp.succeeds(fp.train(tmp_path / "run", start=fp.command))
    fp.same_run(tmp_path / "run", whole)


@pytest.mark.fault("F18")
def test_one_then_two_then_eight_devices_then_one(whole, tmp_path):
    run = tmp_path / "run"
    for steps, devices in ((5, 1), (10, 2), (15, 8), (20, 1)):
        done = fp.train(run, "--devices", str(devices), steps=steps, devices=devices)
        assert done.code == 0, done
        assert f"{devices} x cpu" in done.out
        assert ("device_count" in done.out) == (steps > 5)  # bits may differ: one line says so
    fp.close_run(run, whole)


@pytest.mark.fault("F34")
def test_a_busy_machine_computes_the_same(whole, half):
    burn = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(burn) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        fp.succeeds(fp.train(half))
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    fp.same_run(half, whole)


@pytest.mark.fault("F38")
def test_other_versions_continue_with_a_line_that_says_so(whole, half):
    versions = json.loads((half / "versions.json").read_text())
    versions |= {"jax": "0.9.0", "orbax-checkpoint": "0.12.1"}
    (half / "versions.json").write_text(json.dumps(versions))
    done = fp.train(half)
    fp.succeeds(done)
    (line,) = [line for line in done.out.splitlines() if "bits may differ" in line]
    assert "jax: 0.9.0 -> " in line and "orbax-checkpoint: 0.12.1 -> " in line
    fp.same_run(half, whole)


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        pytest.param(
            "--model.name mlp --model.width 8", "in the checkpoint", marks=pytest.mark.fault("F19")
        ),
        pytest.param("--optim.name sgd", "opt_state/", marks=pytest.mark.fault("F36")),
        pytest.param("--optim.lr 0.5", "optim.lr: 0.001 -> 0.5", marks=pytest.mark.fault("F36")),
        pytest.param("--seed 1", "seed: 0 -> 1", marks=pytest.mark.fault("F37")),
        pytest.param("--data.path molrg", "", marks=pytest.mark.fault("F37")),
    ],
)
def test_another_run_is_refused_and_nothing_touched(half, argv, words):
    before = fp.snapshot(half)
    done = fp.train(half, *argv.split())
    fp.fails_clearly(done, 2, words, "--out" if ":" in words else "output directory")
    assert "START" not in done.out
    assert fp.snapshot(half) == before


@pytest.mark.fault("F35")
def test_another_dtype_is_refused_not_cast(half):
    before = fp.snapshot(half)
    done = fp.train(half, sabotage=[sabotage.float64])
    fp.fails_clearly(done, 2, "is float32[", "and float64[")
    assert fp.snapshot(half) == before


def test_a_checkpoint_of_a_newer_version_is_refused(half):
    path = half / "checkpoints" / "15" / "meta" / "metadata"
    content = json.loads(path.read_text())["content"]
    content["format_version"] = checkpoint.FORMAT_VERSION + 1
    path.write_text(json.dumps(checkpoint._seal(content)))
    before = fp.snapshot(half)
    fp.fails_clearly(fp.train(half), 2, "step 15", "upgrade")
    assert fp.snapshot(half) == before


@pytest.mark.fault("F20")
def test_a_misspelt_option_in_a_new_interpreter(tmp_path):
    done = fp.command("train", "--model.chanels", "3", "--out", str(tmp_path / "run")).finish()
    fp.fails_clearly(done, 2, "did you mean --model.channels?")
    assert not (tmp_path / "run").exists()


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.fault("F22")
def test_a_learning_rate_that_blows_up_leaves_finite_checkpoints(tmp_path):
    argv = "--optim.name sgd --optim.lr 1e30 --optim.clip 0 --optim.warmup 0 --checkpoint.every 1"
    done = fp.train(tmp_path / "run", *argv.split(), steps=200)
    fp.fails_clearly(done, 4, "step ", "earning rate")
    for step in fp.steps_of(tmp_path / "run"):
        state = checkpoint.load(tmp_path / "run" / "checkpoints", step).state
        for leaf in checkpoint._leaves.flatten(state["params"]).values():
            assert np.isfinite(leaf).all()


@pytest.mark.fault("F22")
def test_a_batch_that_is_not_a_number_is_named_and_nothing_of_it_stays(whole, half):
    done = fp.train(half, sabotage=[functools.partial(sabotage.nan_batch, 17)])
    fp.fails_clearly(done, 4, "step 18: loss nan")
    assert fp.steps_of(half) == [5, 10, 15]
    fp.succeeds(fp.train(half))
    fp.same_run(half, whole)


# ---- surroundings -------------------------------------------------------------------------------


@pytest.mark.fault("F26")
@pytest.mark.parametrize("more", [{}, {"PYTHONIOENCODING": "ascii"}], ids=["C", "ascii"])
def test_odd_paths_a_plain_locale_no_home_no_terminal(whole, tmp_path, more):
    run = tmp_path / "Läufe σ mit Leerzeichen" / "größe=2"
    env = {k: v for k, v in fp.environment().items() if k not in ("HOME", "TERM", "LANG")}
    env |= {"LC_ALL": "C", **more}
    fp.succeeds(fp.train(run, start=functools.partial(fp.command, env=env, cwd=tmp_path)))
    fp.same_run(run, whole)


@pytest.mark.fault("F26")
def test_a_name_that_is_not_text_is_refused_at_once(tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b"/gr\xf6\xdfe")
    done = fp.command("train", "--out", name, env=fp.environment(PYTHONUTF8="1")).finish()
    fp.fails_clearly(done, 2, "is not text in this locale")
    assert os.listdir(tmp_path) == []


@pytest.mark.fault("F26")
@pytest.mark.fault("F27")
def test_without_any_standard_stream(whole, tmp_path):
    """As some schedulers start their jobs: descriptors 0, 1 and 2 are closed."""
    argv = ["-m", "lowdim_diffusion", "train", *fp.TINY, "--train.steps", "20"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, *argv, "--out", "run"],
        env=fp.environment(),
        cwd=tmp_path,
        timeout=fp.PATIENCE_S,
    )
    assert done.returncode == 0
    fp.same_run(tmp_path / "run", whole)


BENCHMARK = """
import os, signal, sys
import benchmarks.cases
from benchmarks import __main__, harness

def case(name, call):
    return harness.Case(name, "call", lambda size: [harness.Variant("one", call)], most_rounds=1)

die = lambda: os.kill(os.getpid(), signal.SIGKILL)
second = die if sys.argv.pop() == "die" else lambda: 2.0
calls = {"a": lambda: 1.0, "b": second, "c": lambda: 3.0}
benchmarks.cases.CASES = {name: case(name, call) for name, call in calls.items()}
sys.exit(__main__.main())
"""


@pytest.mark.fault("F43")
def test_a_killed_benchmark_keeps_the_cases_that_were_finished(tmp_path):
    def run(how):
        argv = ["--size", "smoke", "--out", str(tmp_path), "--resume", how]
        command = [sys.executable, "-c", BENCHMARK, *argv]
        return subprocess.run(command, env=fp.environment(), capture_output=True, text=True)

    assert run("die").returncode == -signal.SIGKILL
    file = tmp_path / "benchmarks.json"
    (first,) = json.loads(file.read_text())["results"]
    assert first["case"] == "a"
    again = run("live")
    assert again.returncode == 0 and "a: kept" in again.stdout, again
    results = json.loads(file.read_text())["results"]
    assert results[0] == first and [r["case"] for r in results] == ["a", "b", "c"]
    stored = json.loads(file.read_text())
    stored["environment"]["jax"] = "0.0"  # timings of another environment are not mixed in
    file.write_text(json.dumps(stored))
    assert "kept" not in run("live").stdout
