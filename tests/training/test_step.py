"""The training step: one formula, three ways to map it over devices, averages, accumulation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lowdim_diffusion import sharding, training
from lowdim_diffusion.training import ema, optimizers

NUM_FEATURES = 6


def loss_fn(params, batch, key):
    """Random per example, so that it shows whether keys depend on the batch split."""
    keys = sharding.example_keys(key, batch["index"])
    noise = jax.vmap(lambda k: jax.random.normal(k, (NUM_FEATURES,)))(keys)
    out = jnp.tanh((batch["x"] + noise) @ params["a"]) @ params["b"]
    losses = jnp.mean((out - batch["x"]) ** 2, axis=1)
    return losses, {"size": jnp.abs(out).mean(axis=1)}


def make_params():
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.normal(size=(NUM_FEATURES, 8)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(8, NUM_FEATURES)), jnp.float32),
    }


def make_batch(size=16):
    x = np.random.default_rng(1).normal(size=(size, NUM_FEATURES))
    return {"x": jnp.asarray(x, jnp.float32)}


OPTIMIZER = optax.adam(1e-2)


def reference(key):
    """One step written out: plain gradient of the mean, one Adam update."""
    params, batch = make_params(), {**make_batch(), "index": jnp.arange(16)}
    mean = lambda p: jnp.mean(loss_fn(p, batch, key)[0])
    loss, grads = jax.value_and_grad(mean)(params)
    updates, _ = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
    return loss, optax.apply_updates(params, updates)


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
@pytest.mark.parametrize("how", ["shard_map", "shard_map-unchecked", "pmap", "jit"])
def test_same_numbers_however_it_is_mapped(key, num_devices, how):
    loss, expected = reference(key)
    mesh = sharding.data_mesh(num_devices)
    axis = None if how == "jit" else sharding.AXIS
    step = training.make_train_step(loss_fn, OPTIMIZER, axis_name=axis)
    state = training.init_state(make_params(), OPTIMIZER)
    match how:
        case "jit":
            out = jax.jit(step)(
                sharding.replicate(state, mesh), sharding.shard_batch(make_batch(), mesh), key
            )
        case "pmap":
            batch = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), make_batch())
            axes, devices = (None, 0, None), list(mesh.devices)
            mapped = jax.pmap(step, sharding.AXIS, in_axes=axes, devices=devices)
            out = jax.tree.map(lambda x: x[0], mapped(state, batch, key))
        case _:
            specs = dict(in_specs=(P(), P(sharding.AXIS), P()), out_specs=P())
            check = how == "shard_map"
            mapped = jax.shard_map(step, mesh=mesh, check_vma=check, **specs)
            out = jax.jit(mapped)(state, make_batch(), key)
    new, metrics = out
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    chex.assert_trees_all_close(jax.device_get(new.params), jax.device_get(expected), rtol=1e-5)
    assert int(new.step) == 1
    assert set(metrics) == {"loss", "grad_norm", "size"}


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch(key, parts):
    loss, expected = reference(key)
    step = training.make_train_step(loss_fn, OPTIMIZER, accumulate=parts)
    new, metrics = jax.jit(step)(training.init_state(make_params(), OPTIMIZER), make_batch(), key)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    chex.assert_trees_all_close(new.params, expected, rtol=1e-4)


def test_accumulation_must_divide(key):
    step = training.make_train_step(loss_fn, OPTIMIZER, accumulate=3)
    with pytest.raises(ValueError, match="expected a divisor of 16, got 3"):
        step(training.init_state(make_params(), OPTIMIZER), make_batch(), key)


def test_mapped_step_wants_a_dictionary(key):
    step = training.make_train_step(lambda p, b, k: jnp.sum(p["a"]), OPTIMIZER, axis_name="data")
    state = training.init_state(make_params(), OPTIMIZER)
    mapped = jax.pmap(step, "data", in_axes=(None, 0, None))
    with pytest.raises(TypeError, match="must be a dictionary of arrays"):
        mapped(state, jnp.ones((8, 2, 3)), key)


def test_given_index_is_kept(key):
    """Examples 8..15 alone, told their place, get the noise they have in the whole batch."""
    whole = training.make_train_step(loss_fn, optax.sgd(0.0))
    state = training.init_state(make_params(), optax.sgd(0.0))
    per_example = loss_fn(make_params(), {**make_batch(), "index": jnp.arange(16)}, key)[0]
    part = {"x": make_batch()["x"][8:], "index": jnp.arange(8, 16)}
    _, metrics = whole(state, part, key)
    np.testing.assert_allclose(metrics["loss"], per_example[8:].mean(), rtol=1e-6)


def test_caller_keeps_its_parameters(key):
    params = make_params()
    state = training.init_state(params, OPTIMIZER, ema=ema.classic(0.9))
    step = jax.jit(
        training.make_train_step(loss_fn, OPTIMIZER, ema=ema.classic(0.9)), donate_argnums=0
    )
    step(state, make_batch(), key)
    assert np.all(np.isfinite(params["a"]))


# ---- averages ----


def run_average(decay, values):
    average = jnp.asarray(values[0] * 0 + 7.0)  # where it starts must be forgotten
    for t, value in enumerate(values, 1):
        average = ema.update(average, jnp.asarray(value), decay(jnp.float32(t)))
    return float(average)


def test_constant_parameters_are_their_own_average():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.float32)}
    for decay in (ema.classic(0.99), ema.power(6.94)):
        for t in (1.0, 2.0, 500.0):
            chex.assert_trees_all_equal(ema.update(params, params, decay(jnp.float32(t))), params)


def test_power_average_has_power_weights():
    """The average of t = 1..n is sum t w_t / sum w_t with weights that approach t^gamma."""
    gamma, n = 3.0, 400
    times = np.arange(1, n + 1)
    expected = np.sum(times * times**gamma) / np.sum(times**gamma)
    assert run_average(ema.power(gamma), times.astype(np.float32)) == pytest.approx(
        expected, rel=5e-3
    )


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
def test_gamma_from_std_by_integration(std):
    gamma = ema.gamma_from_std(std)
    tau = (np.arange(200_000) + 0.5) / 200_000
    weight = tau**gamma / np.sum(tau**gamma)
    mean = np.sum(weight * tau)
    assert np.sqrt(np.sum(weight * (tau - mean) ** 2)) == pytest.approx(std, rel=1e-4)


def test_classic_average():
    assert run_average(ema.classic(0.5, warmup=0), np.array([2.0, 4.0])) == pytest.approx(4.25)
    assert run_average(ema.classic(0.999), np.array([2.0])) == pytest.approx(2.0)
    late = ema.classic(0.9)(jnp.float32(1e4))
    assert float(late) == pytest.approx(0.9)


def test_several_averages_and_averaged(key):
    decays = (ema.classic(0.5, warmup=0), ema.power(6.94))
    state = training.init_state(make_params(), OPTIMIZER, ema=decays)
    assert len(state.ema) == 2
    new, _ = training.make_train_step(loss_fn, OPTIMIZER, ema=decays)(state, make_batch(), key)
    halfway = jax.tree.map(lambda a, b: (a + b) / 2, state.params, new.params)
    chex.assert_trees_all_close(new.averaged, halfway, rtol=1e-6)
    chex.assert_trees_all_close(new.ema[1], new.params, rtol=1e-6)
    assert training.init_state(make_params(), OPTIMIZER).averaged is not None


# ---- optimizers ----


def test_learning_rates():
    f = optimizers.learning_rate(1.0, 100, warmup=10, decay="cosine", final=0.1)
    assert [float(f(s)) for s in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    assert float(f(55)) == pytest.approx(0.55)
    assert float(f(100)) == pytest.approx(0.1)
    g = optimizers.learning_rate(2.0, 1000, decay="inverse-sqrt")
    assert [float(g(s)) for s in (0, 100, 400)] == pytest.approx([2.0, 2.0, 1.0])
    h = optimizers.learning_rate(2.0, 100, decay="linear")
    assert float(h(50)) == pytest.approx(1.0)


@pytest.mark.parametrize("name", optimizers.OPTIONS)
def test_every_optimizer_descends(name):
    optimizer = optimizers.make(name, 0.02, clip=1.0)
    target = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    loss = lambda params, batch, key: jnp.sum((params["w"] - target) ** 2)
    params = {"w": jnp.zeros((4, 3))}
    fitted, metrics = jax.jit(
        lambda k: training.fit(k, params, loss, optimizer, lambda key, step: step, 400)
    )(jax.random.key(0))
    assert metrics["loss"][-1] < 0.05 * metrics["loss"][0]
    assert fitted["w"].shape == (4, 3)


def test_clip_bounds_the_update():
    optimizer = optimizers.make("sgd", 1.0, clip=0.5, b1=0.0)
    updates, _ = optimizer.update(jnp.full(4, 10.0), optimizer.init(jnp.zeros(4)))
    assert float(jnp.linalg.norm(updates)) == pytest.approx(0.5)


def test_optimizer_errors(unchecked):
    with pytest.raises(ValueError, match="unknown optimizer: expected one of 'adam', "):
        optimizers.make("rmsprop", 0.1)
    with pytest.raises(ValueError, match="use 'adamw'"):
        optimizers.make("adam", 0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"option of 'muon': expected one of .*, got b1, eps"):
        optimizers.make("muon", 0.1, eps=0.1, b1=0.5)
    with pytest.raises(
        ValueError, match="warmup out of range: expected 0 to num_steps = 10, got 11"
    ):
        optimizers.learning_rate(1.0, 10, warmup=11)


# ---- fit ----


def test_fit_equals_a_python_loop(key):
    """The scan does what the step does, one after the other."""
    batch_fn = lambda key, step: {"x": jax.random.normal(jax.random.fold_in(key, step), (8, 6))}
    fitted, metrics = training.fit(key, make_params(), loss_fn, OPTIMIZER, batch_fn, 5)
    batch_key, loss_key = jax.random.split(key)
    params, opt_state = make_params(), OPTIMIZER.init(make_params())
    losses = []
    for i in range(5):
        batch = {**batch_fn(batch_key, i), "index": jnp.arange(8)}
        mean = lambda p, b=batch, i=i: jnp.mean(loss_fn(p, b, jax.random.fold_in(loss_key, i))[0])
        loss, grads = jax.value_and_grad(mean)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    chex.assert_trees_all_close(fitted, params, rtol=1e-4, atol=1e-6)


def test_fit_vmaps_over_seeds():
    batch_fn = lambda key, step: {"x": jax.random.normal(jax.random.fold_in(key, step), (8, 6))}
    train = lambda k: training.fit(k, make_params(), loss_fn, OPTIMIZER, batch_fn, 3)
    keys = jax.random.split(jax.random.key(1), 4)
    many, _ = jax.vmap(train)(keys)
    one, _ = train(keys[2])
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[2], many), one, rtol=1e-4, atol=1e-6)
