"""The trainer resumes bit for bit, stops politely, refuses another run, keeps no bad state."""

import functools
import gzip
import json
import signal
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowdim_diffusion import sharding, training
from lowdim_diffusion.training import checkpoint, ema, trainer
from lowdim_diffusion.training.rundir import RunDirectory, read_metrics

DATA = jnp.asarray(np.random.default_rng(0).normal(size=(100, 6)), jnp.float32)
OPTIMIZER = optax.adam(1e-2)
DECAY = ema.classic(0.9)


def examples(arrays, key, step, index):
    keys = sharding.example_keys(jax.random.fold_in(key, step), index)
    rows = jax.vmap(lambda k: jax.random.randint(k, (), 0, arrays.shape[0]))(keys)
    return {"x": arrays[rows], "index": index}


def loss_fn(params, batch, key):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) - batch["x"]) ** 2, axis=1)


class Recorder:
    """A monitor that remembers, and can act at a step."""

    def __init__(self, at=None, action=None):
        self.at, self.action, self.notes, self.reports = at, action, [], []

    def start(self, step, num_steps):
        self.notes.append(f"START {step}")

    def update(self, report):
        self.reports.append(report)
        if self.at is not None and report.step >= self.at:
            self.action()

    def note(self, text):
        self.notes.append(text)

    def close(self):
        self.notes.append("closed")


def run(path, num_steps=30, *, loss=loss_fn, devices=1, width=6, optimizer=OPTIMIZER, **options):
    init = lambda: training.init_state({"w": 0.1 * jnp.eye(6, width)}, optimizer, ema=DECAY)
    step = training.make_train_step(loss, optimizer, ema=DECAY, axis_name=sharding.AXIS)
    options = {"checkpoint_every": 10, "fixed": {"seed": 0}, **options}
    with RunDirectory(path) as directory:
        return training.train(
            directory,
            init,
            step,
            examples,
            DATA,
            batch_size=16,
            num_steps=num_steps,
            key=jax.random.key(0),
            mesh=sharding.data_mesh(devices),
            config_text="seed = 0\n",
            **options,
        )


def test_leaves_everything_behind(tmp_path):
    out = run(tmp_path / "a")
    assert out.status == "done" and int(out.state.step) == 30
    rows = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[4]["images"] == 5 * 16
    assert {"loss", "grad_norm"} <= set(rows[0])
    assert checkpoint.all_steps(tmp_path / "a" / "checkpoints") == [10, 20, 30]
    assert (tmp_path / "a" / "config.toml").read_text() == "seed = 0\n"
    assert json.loads((tmp_path / "a" / "versions.json").read_text())["jax"] == jax.__version__


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_continues_bit_for_bit(tmp_path, stop_signal):
    whole = run(tmp_path / "whole")
    recorder = Recorder(at=13, action=lambda: signal.raise_signal(stop_signal))
    first = run(tmp_path / "cut", monitor=recorder)
    assert first.status == "stopped" and 13 <= int(first.state.step) < 30
    assert any(stop_signal.name in note for note in recorder.notes) and "closed" in recorder.notes
    again = run(tmp_path / "cut")
    assert again.first_step == int(first.state.step)
    chex.assert_trees_all_equal(jax.device_get(whole.state), jax.device_get(again.state))
    a, b = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert a == b


def test_damaged_newest_checkpoint_costs_only_its_steps(tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", 20)
    newest = tmp_path / "cut" / "checkpoints" / "20"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.warns(UserWarning, match="20"):
        again = run(tmp_path / "cut")
    assert again.first_step == 10
    chex.assert_trees_all_equal(jax.device_get(whole.state), jax.device_get(again.state))
    assert [r["step"] for r in read_metrics(tmp_path / "cut" / "metrics.jsonl")] == list(
        range(1, 31)
    )


def test_finished_run_is_left_alone(tmp_path):
    run(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != ".lock"}
    assert run(tmp_path).status == "already done"
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != ".lock"}
    files = lambda times: {p: t for p, t in times.items() if p.is_file()}
    assert files(before) == files(after)


def test_trains_on_when_asked_for_more(tmp_path):
    whole = run(tmp_path / "whole", 40)
    run(tmp_path / "more", 30)
    more = run(tmp_path / "more", 40)
    chex.assert_trees_all_equal(jax.device_get(whole.state), jax.device_get(more.state))


@pytest.mark.parametrize("devices", [2, 8])
def test_continues_on_another_number_of_devices(tmp_path, devices):
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", 10)
    more = run(tmp_path / "cut", devices=devices)
    chex.assert_trees_all_close(
        jax.device_get(whole.state.params), jax.device_get(more.state.params), rtol=1e-5, atol=1e-6
    )


def test_a_split_state_starts_as_a_whole_one():
    """Weights that it starts from are given, not written into the program."""
    weights = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
    start = functools.partial(training.init_state, optimizer=OPTIMIZER, ema=DECAY)
    init = functools.partial(start, weights)
    places = sharding.fsdp(jax.eval_shape(init), sharding.data_mesh(8))
    state = trainer._split_start(init, places)
    assert state.opt_state[0].mu["w"].addressable_shards[0].data.shape == (8, 32)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(init()))


def test_other_architecture_is_refused(tmp_path):
    run(tmp_path, 10)
    with pytest.raises(
        checkpoint.IncompatibleStateError,
        match=r"/w is float32\[6,6\] in the checkpoint and float32\[6,5\]",
    ):
        run(tmp_path, width=5)
    assert checkpoint.all_steps(tmp_path / "checkpoints") == [10]


def test_other_optimizer_is_refused(tmp_path):
    run(tmp_path, 10)
    with pytest.raises(checkpoint.IncompatibleStateError):
        run(tmp_path, optimizer=optax.sgd(0.1))


def test_other_seed_is_refused(tmp_path):
    run(tmp_path, 10)
    with pytest.raises(checkpoint.IncompatibleStateError, match=r"seed: 0 -> 1"):
        run(tmp_path, fixed={"seed": 1})


def test_bad_loss_stops_and_keeps_what_was_good(tmp_path):
    blow_up = lambda params, batch, key: (
        loss_fn(params, batch, key)
        - params["w"][0, 0]
        + jnp.where(params["w"][0, 0] > 0.27, jnp.nan, 0)
    )
    with pytest.raises(training.NonFiniteLossError, match=r"step \d+: loss nan"):
        run(tmp_path, 100, loss=blow_up)
    steps = checkpoint.all_steps(tmp_path / "checkpoints")
    assert steps == [10]
    stored = checkpoint.load(tmp_path / "checkpoints")
    assert np.all(np.isfinite(stored.state["params"]["w"]))


def test_infinite_parameters_are_never_saved(tmp_path):
    """The loss is finite at the step whose update overflows, and that step is due to be saved."""
    overflow = optax.sgd(1e38)
    with pytest.raises(FloatingPointError):
        run(
            tmp_path,
            1,
            optimizer=overflow,
            loss=lambda p, b, k: 1e3 * jnp.sum(p["w"]) + 0 * b["x"][:, 0],
        )
    assert checkpoint.all_steps(tmp_path / "checkpoints") == []


def test_samples_on_schedule_and_sinks(tmp_path):
    sampled, rows = [], []
    run(
        tmp_path,
        12,
        sample_every=5,
        sample_fn=lambda s, state: sampled.append(s),
        sinks=[types.SimpleNamespace(write=rows.append, close=lambda: rows.append({"step": None}))],
    )
    assert sampled == [5, 10]
    stats = read_metrics(tmp_path / "stats.jsonl")
    assert [r["step"] for r in rows] == [*range(1, 13), 12, None]  # one row of speed, then closed
    assert rows[12]["speed/images_per_s"] == stats[0]["images_per_s"] > 0
    # Forward and backward pass of [16, 6] x [6, 6], without the derivative in x.
    assert stats[0]["flops_per_s"] * stats[0]["step_time_s"] == pytest.approx(2 * 2 * 16 * 6 * 6)


@pytest.mark.slow
def test_profile_of_a_few_warm_steps_changes_nothing(tmp_path):
    whole = run(tmp_path / "whole")
    recorder = Recorder()
    out = run(tmp_path / "seen", profile=True, monitor=recorder)
    chex.assert_trees_all_equal(jax.device_get(whole.state), jax.device_get(out.state))
    assert sum("profile of 5 steps" in note for note in recorder.notes) == 1
    (trace,) = (tmp_path / "seen" / "profile").rglob("perfetto_trace.json.gz")
    assert b"traceEvents" in gzip.decompress(trace.read_bytes())
    assert list(trace.parent.glob("*.xplane.pb"))


def test_monitor_is_told(tmp_path):
    recorder = Recorder()
    run(tmp_path, 12, monitor=recorder)
    assert recorder.notes[0] == "START 0" and recorder.notes[-1] == "closed"
    last = recorder.reports[-1]
    assert last.step == last.num_steps == 12 and last.images_per_s > 0 and last.eta_s == 0


def test_console_monitor_writes_plain_lines_to_a_file(tmp_path):
    with open(tmp_path / "log", "w") as stream:
        monitor = training.ConsoleMonitor(stream, interval_s=0.0)
        run(tmp_path / "run", 3, monitor=monitor)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0].startswith("START at step 0 of 3")
    assert lines[-1].startswith("step 3/3  loss ") and "images/s" in lines[-1]
    assert "\x1b" not in "".join(lines)
