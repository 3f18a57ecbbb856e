"""Sweeps: equal to loops, compiled once, bounded by the chunk, resumable."""

import functools
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import sharding, training
from lowdim_diffusion.training import progress
from lowdim_diffusion.training.progress import CountBar

GRID = {"a": [1, 2, 3], "b": [0.5, 1.5], "seed": range(4)}


def noisy(point):
    key = jax.random.key(point["seed"])
    return {
        "value": point["a"] * point["b"] + jax.random.normal(key),
        "vector": jnp.arange(3) * point["a"],
    }


def expected():
    out = np.zeros((3, 2, 4))
    for i, a in enumerate(GRID["a"]):
        for j, b in enumerate(GRID["b"]):
            for s in GRID["seed"]:
                out[i, j, s] = a * b + float(jax.random.normal(jax.random.key(s)))
    return out


@pytest.mark.parametrize("chunk, batch_size", [(1, 1), (5, 2), (24, 24), (1000, 7)])
def test_equals_a_loop(chunk, batch_size):
    found = training.sweep(noisy, GRID, chunk=chunk, batch_size=batch_size)
    np.testing.assert_allclose(found.values["value"], expected(), rtol=1e-6)
    assert found.values["vector"].shape == (3, 2, 4, 3)
    assert found.values["vector"].dtype == np.int32
    assert found.values["vector"][2, 1, 3].tolist() == [0, 3, 6]


def test_devices_change_nothing():
    one = training.sweep(noisy, GRID, chunk=10).values
    many = training.sweep(noisy, GRID, chunk=10, mesh=sharding.data_mesh(8)).values
    for name in one:
        np.testing.assert_array_equal(one[name], many[name])


def test_table_is_tidy():
    columns = training.table(training.sweep(noisy, GRID))
    assert list(columns) == ["a", "b", "seed", "value"]
    assert columns["a"].tolist() == [1] * 8 + [2] * 8 + [3] * 8
    assert columns["seed"].tolist() == [0, 1, 2, 3] * 6
    np.testing.assert_allclose(columns["value"], expected().reshape(-1), rtol=1e-6)
    assert list(training.table(training.sweep(lambda p: p["x"], {"x": [1.0]}))) == ["x", "value"]


def test_traced_once_whatever_the_grid():
    traces = []

    def fn(point):
        traces.append(1)
        return point["a"]

    training.sweep(fn, {"a": range(100)}, chunk=7)
    assert len(traces) == 1


def test_resumes_without_computing_again(tmp_path):
    ran = []

    def fn(point):
        jax.debug.callback(lambda a: ran.append(int(a)), point["a"])
        return 2 * point["a"]

    run = lambda: training.sweep(fn, {"a": range(10)}, chunk=4, batch_size=1, path=tmp_path / "s")
    first = run().values
    assert sorted(set(ran)) == list(range(10))
    ran.clear()
    np.testing.assert_array_equal(run().values, first)
    assert not ran
    (tmp_path / "s" / "chunk-00000004.npz").write_bytes(b"half a file")
    np.testing.assert_array_equal(run().values, first)
    assert sorted(set(ran)) == [4, 5, 6, 7]


def test_another_sweep_is_refused(tmp_path):
    data = np.arange(3.0)
    run = lambda fn, grid=range(4), **more: training.sweep(fn, {"a": grid}, path=tmp_path, **more)
    run(lambda p: p["a"] + data[1])
    run(lambda q: q["a"] + data[1])  # the same computation under another name
    with pytest.raises(ValueError, match=r"another sweep \(program differ"):
        run(lambda p: p["a"] + 2 * data[1])
    with pytest.raises(ValueError, match=r"another sweep \(grid"):
        run(lambda p: p["a"] + data[1], range(1, 5))
    with pytest.raises(ValueError, match="choose another path, or delete it"):
        run(lambda p: p["a"] + data[1], chunk=3)


def test_data_inside_the_function_count(tmp_path):
    def fn(data):
        return lambda p: jnp.sum(data) * p["a"]

    data = jax.random.normal(jax.random.key(0), (200, 200))
    training.sweep(fn(data), {"a": [1, 2]}, path=tmp_path)
    with pytest.raises(ValueError, match=r"another sweep \(program"):
        training.sweep(fn(data + 1), {"a": [1, 2]}, path=tmp_path)


def test_continues_on_another_number_of_devices(tmp_path):
    """The chunk is the caller's, whatever the devices pad it to."""
    run = lambda mesh: training.sweep(noisy, GRID, chunk=10, mesh=mesh, path=tmp_path).values
    first = run(sharding.data_mesh(8))
    (tmp_path / "chunk-00000010.npz").unlink()
    for mesh in (None, sharding.data_mesh(4)):
        again = run(mesh)
        for name in first:
            np.testing.assert_array_equal(first[name], again[name])
        (tmp_path / "chunk-00000020.npz").unlink()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "bool", "int8"])
def test_every_kind_of_number_is_kept(dtype, tmp_path):
    fn = lambda p: jnp.asarray([p["a"], 1], dtype)
    run = lambda: training.sweep(fn, {"a": [0.5, 1.25, 3.0]}, chunk=2, path=tmp_path).values
    first = run()
    kept = {file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = run()
    assert first.dtype == again.dtype == dtype
    np.testing.assert_array_equal(first, again)
    assert {file.stat().st_mtime_ns for file in tmp_path.iterdir()} == kept  # none computed again


SLOW = """
import os, sys, time
import jax
from lowdim_diffusion import training

def wait(a):
    time.sleep(0.2)
    print("at", int(a), flush=True)

def fn(point):
    jax.debug.callback(wait, point["a"])
    return point["a"] ** 2

found = training.sweep(fn, {"a": range(12)}, chunk=3, batch_size=1, path=sys.argv[1])
print("sum", int(found.values.sum()))
"""


@pytest.mark.slow
@pytest.mark.fault("F43")
@pytest.mark.parametrize(
    "how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_interruption_loses_at_most_one_chunk(tmp_path, how):
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(tmp_path / "s")]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("at 7"):
            process.send_signal(how)
            break
    process.wait(30)
    kept = {p.name for p in (tmp_path / "s").glob("chunk-*.npz")}
    assert {"chunk-00000000.npz", "chunk-00000003.npz"} <= kept
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert f"sum {sum(a * a for a in range(12))}" in again.stdout
    done = {int(line.split()[1]) for line in again.stdout.splitlines() if line.startswith("at")}
    assert done <= set(range(6, 12))


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    """What the device is given at a time, and what its program needs, do not grow with the grid."""
    seen, needs = [], []
    plain = jax.lax.map

    def spy(fn, xs, *, batch_size):
        run = functools.partial(plain, fn, batch_size=batch_size)
        seen.append((jax.tree.leaves(xs)[0].shape[0], batch_size))
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), xs)
        stats = jax.jit(run).lower(shapes).compile().memory_analysis()
        needs.append(stats.temp_size_in_bytes + stats.argument_size_in_bytes)
        return run(xs)

    def fn(point):
        return jnp.sum(jnp.sort(jnp.sin(point["a"] + jnp.arange(2.0**14))))  # 64 kB of temporaries

    monkeypatch.setattr(jax.lax, "map", spy)
    for count in (32, 64):
        points = {"a": np.arange(count, dtype=np.float32)}
        found = training.sweep(fn, points, chunk=8, batch_size=4)
        assert found.values.shape == (count,)
    assert seen == [(8, 4), (8, 4)]
    assert needs[0] == needs[1] < 16 * 4 * 2**16


def test_order_of_the_axes_belongs_to_the_sweep(tmp_path):
    fn = lambda p: 100 * p["a"] + p["b"]
    first = training.sweep(fn, {"a": [1, 2], "b": [10, 20, 30]}, path=tmp_path)
    assert first.values.tolist() == [[110, 120, 130], [210, 220, 230]]
    with pytest.raises(ValueError, match=r"another sweep \(grid differ\)"):
        training.sweep(fn, {"b": [10, 20, 30], "a": [1, 2]}, path=tmp_path)


def test_a_key_inside_the_function(tmp_path):
    def fn(seed):
        key = jax.random.key(seed)
        return lambda p: jax.random.normal(jax.random.fold_in(key, p["s"]))

    found = training.sweep(fn(0), {"s": [0, 1]}, path=tmp_path)
    again = training.sweep(fn(0), {"s": [0, 1]}, path=tmp_path)
    np.testing.assert_array_equal(found.values, again.values)
    with pytest.raises(ValueError, match=r"another sweep \(program"):
        training.sweep(fn(1), {"s": [0, 1]}, path=tmp_path)


def test_errors(unchecked):
    with pytest.raises(ValueError, match="empty grid"):
        training.sweep(lambda p: p["a"], {"a": []})
    with pytest.raises(ValueError, match="empty grid"):
        training.sweep(lambda p: 1, {})
    with pytest.raises(ValueError, match="bad axis: expected a sequence of numbers, got a = 3"):
        training.sweep(lambda p: p["a"], {"a": 3})
    with pytest.raises(ValueError, match="bad axis"):
        training.sweep(lambda p: p["a"], {"a": ["x"]})
    with pytest.raises(ValueError, match="axis 'seed' out of range: expected values that int32"):
        training.sweep(lambda p: p["seed"], {"seed": [2**32, 5]})
    with pytest.raises(ValueError, match="axis 'a' out of range"):
        training.sweep(lambda p: p["a"], {"a": [1e300]})
    with pytest.raises(
        ValueError, match="result of fn: expected arrays of numbers, got random keys"
    ):
        training.sweep(lambda p: jax.random.key(p["a"]), {"a": [1]})
    with pytest.raises(ValueError, match="results named like an axis: expected other names, got a"):
        training.table(training.sweep(lambda p: {"a": p["a"]}, {"a": [1]}))


def test_count_bar_says_how_far_it_is(tmp_path, monkeypatch):
    path = tmp_path / "log"
    with open(path, "w") as out, CountBar("trainings", 10, out, interval_s=0.0) as bar:
        bar.update(5)
        bar.update(10)
    first, last = path.read_text().splitlines()
    assert first.startswith("trainings 5/10  ") and first.endswith(" left")
    assert last.startswith("trainings 10/10  in ")
    ticks = iter([0.0, 60.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))
    with open(path, "w") as out, CountBar("trainings", 10, out, done=6, interval_s=0.0) as bar:
        bar.update(7)  # one of the four that were missing took a minute
    assert path.read_text() == "trainings 7/10  3:00 left\n"
    monkeypatch.undo()
    with open(path, "w") as out, CountBar(None, 10, out) as bar:
        bar.update(10)
    assert path.read_text() == ""
