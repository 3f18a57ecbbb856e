"""A real network: the same losses and parameters on 1, 2, 4, 8 devices, mapped three ways."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lowdim_diffusion import data, losses, networks, schedules, sharding, training

NET = dict(data_shape=(8, 8, 1), channels=8, channel_mult=(1, 2), num_blocks=1, dropout=0.1)


def run(how, num_devices, num_steps=3):
    """Losses and the sum of |parameters| after a few steps on digits."""
    mesh = sharding.data_mesh(num_devices)
    net = networks.make("unet", **NET, num_classes=10)
    loss_fn = losses.make_loss(
        net, schedules.VE(), data_std=0.75, num_strata=16, label_dropout=0.2, dropout=True
    )
    optimizer, decay = optax.adam(2e-3), training.ema.classic(0.9)
    axis = None if how == "jit" else sharding.AXIS
    step = training.make_train_step(loss_fn, optimizer, ema=decay, axis_name=axis)
    state = training.init_state(net.init(jax.random.key(0)), optimizer, ema=decay)
    batcher = data.batches(data.load("digits"), 16)
    match how:
        case "pmap":
            mapped = jax.pmap(step, axis, in_axes=(0, 0, None), devices=list(mesh.devices))
            copies = lambda x: np.broadcast_to(x, (num_devices, *np.shape(x)))
            state = jax.tree.map(copies, state)
            place = lambda b: jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), b)
        case "jit":
            mapped = jax.jit(step)
            state = sharding.replicate(state, mesh)
            place = lambda b: sharding.shard_batch(b, mesh)
        case _:
            specs = dict(in_specs=(P(), P(axis), P()), out_specs=P())
            mapped = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
            place = lambda b: b
    found = []
    for i in range(num_steps):
        batch = place(batcher.batch(jax.random.key(1), i))
        state, metrics = mapped(state, batch, jax.random.fold_in(jax.random.key(2), i))
        found.append(float(np.ravel(metrics["loss"])[0]))
    leaves = [np.asarray(p, np.float64) for p in jax.tree.leaves(state.averaged)]
    return found, sum(np.abs(p[0] if how == "pmap" else p).sum() for p in leaves)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["shard_map", "pmap", "jit"])
def test_unet_step_is_the_same_everywhere(how):
    losses_one, sum_one = run("shard_map", 1)
    for num_devices in (1, 2, 4, 8):
        found, total = run(how, num_devices)
        np.testing.assert_allclose(found, losses_one, rtol=2e-5)
        assert total == pytest.approx(sum_one, rel=1e-5)
