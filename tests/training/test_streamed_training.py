"""Training on data that are read as they are drawn: the same run, bit for bit, or a clean stop."""

import json
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowdim_diffusion import data, sharding, training
from lowdim_diffusion.data import _stream
from lowdim_diffusion.training import checkpoint
from lowdim_diffusion.training.rundir import RunDirectory, read_metrics

X = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
OPTIMIZER = optax.adam(1e-2)


class Source:
    """Rows of which some cannot be read, for now."""

    def __init__(self, bad=()):
        self.bad = set(bad)

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError(f"row-{i}.png is damaged")
        return {"x": X[i]}


def loss_fn(params, batch, key):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) - batch["x"]) ** 2, axis=1)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(_stream, "CHUNK_EXAMPLES", 16 * 7)  # seven steps, and two at the end of 30


def run(path, drawn, num_steps=30, *, devices=1, **options):
    init = lambda: training.init_state({"w": 0.1 * jnp.eye(6)}, OPTIMIZER)
    step = training.make_train_step(loss_fn, OPTIMIZER, axis_name=sharding.AXIS)
    arrays = drawn if isinstance(drawn, data.Stream) else drawn.arrays
    with RunDirectory(path) as directory:
        return training.train(
            directory,
            init,
            step,
            drawn.examples,
            arrays,
            batch_size=16,
            num_steps=num_steps,
            key=jax.random.key(0),
            mesh=sharding.data_mesh(devices),
            **{"checkpoint_every": 10, "fixed": {"seed": 0}, **options},
        )


def streamed(bad=(), **options):
    return data.stream(data.from_source(Source(bad)), 16, **options)


def resident():
    return data.batches(data.from_arrays(X), 16)


class At:
    """A monitor that acts at a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def start(self, step, num_steps):
        pass

    def update(self, report):
        if report.step >= self.step:
            self.action()

    def note(self, text):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("devices", [1, 4])
def test_the_run_is_that_of_data_on_the_device(tmp_path, devices):
    whole = run(tmp_path / "whole", resident(), devices=devices)
    split = {"split_state": True} if devices == 4 else {}
    out = run(tmp_path / "stream", streamed(), devices=devices, **split)
    chex.assert_trees_all_equal(jax.device_get(whole.state), jax.device_get(out.state))
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "stream")]
    assert rows[0] == rows[1] and len(rows[0]) == 30


def test_stops_and_continues_in_mid_epoch_either_way(tmp_path):
    whole = run(tmp_path / "whole", resident())
    stop = At(12, lambda: signal.raise_signal(signal.SIGTERM))
    cut = run(tmp_path / "cut", streamed(), monitor=stop)
    assert cut.status == "stopped" and 12 <= int(cut.state.step) < 30
    run(tmp_path / "cut", resident(), 25)
    again = run(tmp_path / "cut", streamed())
    assert again.first_step == 25
    chex.assert_trees_all_equal(jax.device_get(whole.state), jax.device_get(again.state))


@pytest.mark.slow
def test_a_bad_example_stops_it_after_saving_and_loses_nothing(tmp_path):
    whole = run(tmp_path / "whole", resident())
    rows = [resident().batch(data_key(), step)["row"].tolist() for step in range(12, 18)]
    bad = next(row for row in rows[2] if row not in rows[0] + rows[1])
    run(tmp_path / "cut", streamed(), 12)
    with pytest.raises(data.DataError, match=f"example {bad} .*row-{bad}.png is damaged"):
        run(tmp_path / "cut", streamed([bad]))
    assert checkpoint.all_steps(tmp_path / "cut" / "checkpoints") == [10, 12, 14]
    with pytest.raises(data.DataError, match=f"example {bad} "):
        run(tmp_path / "cut", streamed([bad]))
    again = run(tmp_path / "cut", streamed())
    assert again.first_step == 14
    chex.assert_trees_all_equal(jax.device_get(whole.state), jax.device_get(again.state))


def data_key():
    return jax.random.split(jax.random.key(0))[0]


def test_skipping_is_the_same_when_continued_and_is_counted(tmp_path):
    bad = [3, 4, 49]
    with pytest.warns(UserWarning, match="left out: .*row-49.png"):
        whole = run(tmp_path / "whole", streamed(bad, on_error="skip"))
    with pytest.warns(UserWarning, match="left out"):
        run(tmp_path / "cut", streamed(bad, on_error="skip"), 12)
        again = run(tmp_path / "cut", streamed(bad, on_error="skip"))
    chex.assert_trees_all_equal(jax.device_get(whole.state), jax.device_get(again.state))
    stats = (tmp_path / "whole" / "stats.jsonl").read_text().splitlines()
    assert json.loads(stats[-1])["unreadable"] == 3
    with pytest.raises(data.DataError, match=r"3 examples cannot be read.*at most 2"):
        with pytest.warns(UserWarning, match="left out"):
            run(tmp_path / "few", streamed(bad, on_error="skip", max_unreadable=2))


def test_examples_of_other_data_are_refused(tmp_path):
    before = {"data_examples": data.fingerprint(data.from_arrays(X))}
    run(tmp_path, resident(), 10, fixed={"data_sha256": "abc", **before})
    run(tmp_path, streamed(), 12, fixed=before)
    unreadable = data.fingerprint(data.from_source(Source([5, 6])))
    assert len(unreadable) == 48
    run(tmp_path, streamed(), 14, fixed={"data_examples": unreadable})
    other = {"data_examples": data.fingerprint(data.from_arrays(X + 1))}
    with pytest.raises(checkpoint.IncompatibleStateError, match=r"differs in data_examples.0: \w+"):
        run(tmp_path, streamed(), fixed=other)


def test_a_bad_batch_of_a_stream_is_named(tmp_path):
    class Infinite(Source):
        def __getitem__(self, i):
            return {"x": X[i]}

    source = data.from_source(Infinite())
    drawn = data.stream(source, 16)
    train_on = lambda params, batch, key: (
        loss_fn(params, batch, key) / jnp.where(jnp.any(batch["row"] == 7), 0.0, 1.0)
    )
    init = lambda: training.init_state({"w": 0.1 * jnp.eye(6)}, OPTIMIZER)
    step = training.make_train_step(train_on, OPTIMIZER, axis_name=sharding.AXIS)
    with RunDirectory(tmp_path) as directory, pytest.raises(training.NonFiniteLossError):
        training.train(
            directory,
            init,
            step,
            drawn.examples,
            drawn,
            batch_size=16,
            num_steps=30,
            key=jax.random.key(0),
            mesh=sharding.data_mesh(4),
        )
    assert 7 in json.loads((tmp_path / "bad_batch.json").read_text())["rows"]
