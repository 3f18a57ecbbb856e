"""Guards: bad steps leave the state alone, are counted, and are explained; good ones as before."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowdim_diffusion import sharding, training
from lowdim_diffusion.training import checkpoint, ema, guards
from lowdim_diffusion.training.rundir import RunDirectory, read_metrics

OPTIMIZER, DECAY = optax.adam(1e-2), ema.classic(0.9)
DATA = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def loss_fn(params, batch, key):
    return jnp.mean((batch["x"] * params["w"][None] - 1) ** 2, axis=1) + 1


def examples(arrays, key, step, index):
    """In order: which batch an example is in is known."""
    row = (step * 8 + index) % arrays.shape[0]
    return {"x": arrays[row], "row": row, "index": index}


def first_state():
    return training.init_state({"w": jnp.ones(3)}, OPTIMIZER, ema=DECAY)


def make(loss=loss_fn, axis_name=None, **options):
    step = training.make_train_step(loss, OPTIMIZER, ema=DECAY, axis_name=axis_name)
    return guards.guarded(step, **options)


def run(path, data=DATA, num_steps=30, *, loss=loss_fn, devices=1, **options):
    with RunDirectory(path) as directory:
        return training.train(
            directory,
            first_state,
            training.make_train_step(loss, OPTIMIZER, ema=DECAY, axis_name=sharding.AXIS),
            examples,
            jnp.asarray(data),
            batch_size=8,
            num_steps=num_steps,
            key=jax.random.key(0),
            mesh=sharding.data_mesh(devices),
            checkpoint_every=10,
            **options,
        )


def by_hand(batches, skip=()):
    """The plain steps, without the batches of the steps to skip; Adam's own count is theirs."""
    step = jax.jit(training.make_train_step(loss_fn, OPTIMIZER, ema=DECAY))
    state = first_state()
    for i, batch in enumerate(batches):
        if i in skip:
            state = state._replace(step=state.step + 1)
        else:
            state, _ = step(state, batch, jax.random.key(0))
    return state


def test_good_steps_are_the_plain_ones_and_bad_ones_leave_no_trace():
    step = jax.jit(make(on_nonfinite="skip", max_skips=3))
    batches = [{"x": jnp.asarray(DATA[8 * i : 8 * i + 8])} for i in range(5)]
    bad = {"x": batches[2]["x"].at[3, 1].set(jnp.inf)}
    state, skipped = first_state(), []
    for batch in [*batches[:2], bad, *batches[3:]]:
        state, metrics = step(state, batch, jax.random.key(0))
        skipped.append(int(metrics["skipped"]))
        assert not metrics["stop"]
    assert skipped == [0, 0, 1, 1, 1]
    expected = by_hand(batches, skip={2})
    chex.assert_trees_all_close(state._replace(guard=()), expected._replace(guard=()), rtol=1e-6)
    assert (int(state.guard.seen), int(state.guard.streak)) == (4, 0)


def test_stops_after_so_many_in_a_row_and_one_more():
    step = jax.jit(make(on_nonfinite="skip", max_skips=3))
    good, bad = {"x": jnp.asarray(DATA[:8])}, {"x": jnp.full((8, 3), jnp.nan)}
    state, stops = first_state(), []
    for batch in [bad, bad, bad, good, bad, bad, bad, bad]:
        state, metrics = step(state, batch, jax.random.key(0))
        stops.append(bool(metrics["stop"]))
    assert stops == [False] * 7 + [True]
    assert int(state.guard.skipped) == 7 and int(state.step) == 8


def test_a_spike_is_measured_by_the_median_of_a_full_window():
    step = jax.jit(make(lambda p, b, k: b["x"] + 0 * p["w"][0], max_spike=3.0, on_nonfinite="skip"))
    losses = np.random.default_rng(1).uniform(1, 2, guards.WINDOW + 40).astype(np.float32)
    losses[5] = 100.0  # too early to be judged, and no obstacle to judging later
    losses[guards.WINDOW + 7] = 4.0  # 3 medians are about 4.5
    losses[guards.WINDOW + 20 : guards.WINDOW + 23] = 9.0
    state, skipped = first_state(), []
    for loss in losses:
        state, metrics = step(state, {"x": jnp.full(2, loss)}, jax.random.key(0))
        skipped.append(int(metrics["skipped"]))
    jumps = np.flatnonzero(np.diff(skipped)) + 1 - guards.WINDOW
    assert jumps.tolist() == [20, 21, 22]
    good = np.delete(losses, np.arange(20, 23) + guards.WINDOW)[-guards.WINDOW :]
    np.testing.assert_array_equal(np.sort(state.guard.losses), np.sort(good))


@pytest.mark.parametrize(
    "options", [{"on_nonfinite": "go"}, {"max_spike": 1.0}, {"max_skips": 0}], ids=str
)
def test_settings_are_checked(options, unchecked):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


def test_corrupt_examples_are_named_with_the_checkpoint_before(tmp_path):
    data = DATA.copy()
    data[[27, 29]] = np.nan
    words = r"step 4: loss nan, grad_norm nan; stopped\. the data hold infinity or NaN, in example "
    with pytest.raises(training.NonFiniteLossError, match=words + "27, 29; its batch are the"):
        run(tmp_path, data)
    found = json.loads((tmp_path / "bad_batch.json").read_text())
    assert found == {"step": 4, "first": "data", "rows": [*range(24, 32)], "bad_rows": [27, 29]}
    assert checkpoint.all_steps(tmp_path / "checkpoints") == []
    assert [row["loss"] is None for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("devices", [1, 4])
def test_skipping_continues_bit_for_bit_and_is_counted(tmp_path, devices):
    data = DATA.copy()
    data[27] = np.nan  # once in five steps
    options = {"on_nonfinite": "skip", "devices": devices}
    whole = run(tmp_path / "whole", data, **options)
    run(tmp_path / "cut", data, 10, **options)
    cut = run(tmp_path / "cut", data, **options)
    chex.assert_trees_all_equal(jax.device_get(whole.state), jax.device_get(cut.state))
    assert int(whole.state.guard.skipped) == 6
    rows = read_metrics(tmp_path / "cut" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [(i + 1) // 5 for i in range(1, 31)]
    batches = [{"x": jnp.asarray(data[(8 * i + np.arange(8)) % 40])} for i in range(30)]
    expected = by_hand(batches, skip=set(range(3, 30, 5)))
    chex.assert_trees_all_close(whole.state.params, expected.params, rtol=1e-5)


def test_what_was_not_finite_first_is_told():
    batch = {"x": jnp.asarray(DATA[:2]), "row": jnp.array([5, 3])}
    state, metrics = first_state(), {"loss": 1.0, "grad_norm": 1.0}
    worse = {"loss": np.inf, "grad_norm": np.nan}
    assert guards.diagnose(state, worse, batch).first == "loss"
    found = guards.diagnose(state, metrics | {"grad_norm": np.nan}, batch)
    assert found.first == "gradient" and found.rows == [5, 3] and "examples 5, 3" in found.text
    blown = state._replace(params={"w": jnp.array([1.0, jnp.inf, 1.0])})
    assert guards.diagnose(blown, worse, batch).first == "parameters"
    full = state._replace(guard=state.guard._replace(losses=jnp.full(guards.WINDOW, 0.25)))
    found = guards.diagnose(full, metrics, batch)
    assert found.first == "spike" and "4 times 0.25" in found.text


def test_a_spike_stops_training_with_its_own_error(tmp_path):
    data = np.tile(DATA, (20, 1))
    data[8 * 75 + 2] = 300.0
    with pytest.raises(training.LossSpikeError, match=r"step 76: loss .*times .* the median"):
        run(tmp_path, data, 100, max_spike=5.0)
    assert checkpoint.all_steps(tmp_path / "checkpoints") == [50, 60, 70]
    assert json.loads((tmp_path / "bad_batch.json").read_text())["first"] == "spike"
