"""The compiled loop: stretches compose bit for bit, devices agree, a bad step ends it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowdim_diffusion import sharding, training
from lowdim_diffusion.training import compile_loop, ema

DATA = jnp.asarray(np.random.default_rng(0).normal(size=(100, 6)), jnp.float32)


def examples(arrays, key, step, index):
    keys = sharding.example_keys(jax.random.fold_in(key, step), index)
    rows = jax.vmap(lambda k: jax.random.randint(k, (), 0, arrays.shape[0]))(keys)
    return {"x": arrays[rows], "index": index}


def loss_fn(params, batch, key):
    keys = sharding.example_keys(key, batch["index"])
    noise = jax.vmap(lambda k: jax.random.normal(k, (6,)))(keys)
    return jnp.mean((jnp.tanh((batch["x"] + noise) @ params["w"]) - batch["x"]) ** 2, axis=1)


def make(num_devices=1, loss=loss_fn, **options):
    mesh = sharding.data_mesh(num_devices)
    optimizer = optax.adam(1e-2)
    decay = ema.classic(0.9)
    params = {"w": 0.1 * jnp.eye(6)}
    state = sharding.replicate(training.init_state(params, optimizer, ema=decay), mesh)
    step = training.make_train_step(loss, optimizer, ema=decay, axis_name=sharding.AXIS)
    arrays = sharding.replicate(DATA, mesh)
    key = sharding.replicate(jax.random.key(3), mesh)
    loop = compile_loop(step, examples, 16, mesh, state, arrays, **options)
    return (lambda state, num_steps: loop(state, arrays, key, num_steps)), state


def test_stretches_compose_bit_for_bit():
    loop, state = make()
    whole = loop(state, 12)
    state = make()[1]
    losses = []
    for count in (1, 4, 7):
        out = loop(state, count)
        state = out.state
        losses.append(out.metrics["loss"])
    chex.assert_trees_all_equal(jax.device_get(whole.state), jax.device_get(state))
    np.testing.assert_array_equal(whole.metrics["loss"], np.concatenate(losses))
    assert whole.num_steps == 12 and whole.ok


@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_devices_agree(num_devices):
    loop, state = make(1)
    one = loop(state, 10)
    loop, state = make(num_devices)
    many = loop(state, 10)
    chex.assert_trees_all_close(
        jax.device_get(one.state.params), jax.device_get(many.state.params), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(one.metrics["loss"], many.metrics["loss"], rtol=1e-5)


def test_a_split_state_moves_as_a_whole_one():
    """Adam, clipping and averages on 4 devices, with and without a copy of everything on each."""
    mesh = sharding.data_mesh(4)
    optimizer, decay = (
        optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
        ema.classic(0.9),
    )
    shape = {"in": (6, 256), "out": (256, 6), "bias": (6,)}
    keys = dict(zip(shape, jax.random.split(jax.random.key(0), 3), strict=True))
    params = {name: 0.1 * jax.random.normal(keys[name], shape[name]) for name in shape}

    def loss(params, batch, key):
        out = jnp.tanh(batch["x"] @ params["in"]) @ params["out"] + params["bias"][None]
        return jnp.mean((out - batch["x"]) ** 2, axis=1)

    step = training.make_train_step(
        loss, optimizer, ema=decay, axis_name=sharding.AXIS, accumulate=2
    )
    init = lambda: training.init_state(params, optimizer, ema=decay)
    split = sharding.fsdp(jax.eval_shape(init), mesh)
    found = []
    for places in (jax.tree.map(lambda _: sharding.replicated(mesh), split), split):
        placed = jax.tree.map(jax.device_put, init(), places)
        arrays, key = sharding.replicate((DATA, jax.random.key(3)), mesh)
        loop = compile_loop(step, examples, 16, mesh, placed, arrays)
        found.append(loop(placed, arrays, key, 5))
    moments = found[1].state.opt_state[1][0].mu
    assert moments["in"].addressable_shards[0].data.shape == (6, 64)
    assert found[1].state.ema[0]["out"].addressable_shards[0].data.shape == (64, 6)
    assert found[1].state.params["bias"].is_fully_replicated
    chex.assert_trees_all_close(*(jax.device_get(f.state) for f in found), rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(found[0].metrics, found[1].metrics, rtol=1e-5)


def test_equals_stepping_by_hand():
    loop, state = make()
    out = loop(state, 3)
    optimizer, decay = optax.adam(1e-2), ema.classic(0.9)
    step = training.make_train_step(loss_fn, optimizer, ema=decay)
    state = training.init_state({"w": 0.1 * jnp.eye(6)}, optimizer, ema=decay)
    data_key, loss_key = jax.random.split(jax.random.key(3))
    for i in range(3):
        batch = examples(DATA, data_key, i, jnp.arange(16))
        state, _ = step(state, batch, jax.random.fold_in(loss_key, i))
    chex.assert_trees_all_close(
        jax.device_get(out.state), jax.device_get(state), rtol=1e-5, atol=1e-7
    )


def test_ends_at_the_first_bad_step():
    def bad(params, batch, key):
        # A weight that the added term pushes up: past a threshold the loss is not a number.
        blown = jnp.where(params["w"][0, 0] > 0.14, jnp.nan, 0.0)
        return loss_fn(params, batch, key) - 0.5 * params["w"][0, 0] + blown

    loop, state = make(loss=bad)
    out = loop(state, 50)
    assert not out.ok
    assert 0 < out.num_steps < 50
    losses = out.metrics["loss"]
    assert np.all(np.isfinite(losses[:-1])) and not np.isfinite(losses[-1])


def test_longest_stretch():
    loop, state = make(max_steps=5)
    assert loop(state, 100).num_steps == 5


def test_batch_must_divide():
    with pytest.raises(ValueError, match="multiple of 3 devices, got batch size 16; try 18 or 15"):
        make(3)
