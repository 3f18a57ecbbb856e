"""Meshes, placement and keys."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lowdim_diffusion import sharding


def test_mesh_sizes():
    assert sharding.data_mesh().size == len(jax.devices())
    assert sharding.data_mesh(2).axis_names == ("data",)


@pytest.mark.parametrize("given", ["", "--xla_force_host_platform_device_count=3"])
def test_cores_become_devices_unless_told_otherwise(given):
    program = (
        "import jax; from lowdim_diffusion import sharding; sharding.cores_as_devices(); "
        "print(jax.device_count())"
    )
    environment = {**os.environ, "XLA_FLAGS": given}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == (3 if given else len(os.sched_getaffinity(0)))


def test_too_many_devices():
    count = len(jax.devices())
    with pytest.raises(
        ValueError, match=rf"expected 1 to {count} \(cpu\), got {count + 1}; .*XLA_FLAGS"
    ):
        sharding.data_mesh(count + 1)


def test_placement():
    mesh = sharding.data_mesh(4)
    batch = sharding.shard_batch({"x": jnp.arange(8.0)}, mesh)
    assert [s.data.tolist() for s in batch["x"].addressable_shards] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    whole = sharding.replicate(jnp.arange(3.0), mesh)
    assert all(s.data.tolist() == [0, 1, 2] for s in whole.addressable_shards)


def test_fsdp_splits_the_largest_axis_that_divides():
    mesh = sharding.data_mesh(8)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    tree = {"a": shape(3, 3, 32, 64), "b": shape(1000, 24), "c": shape(8, 8), "d": shape(1001, 3)}
    specs = {name: place.spec for name, place in sharding.fsdp(tree, mesh).items()}
    axis = sharding.AXIS
    assert specs == {"a": P(None, None, None, axis), "b": P(axis), "c": P(), "d": P()}


def test_gradients_of_parts_are_parts_of_the_gradient():
    mesh = sharding.data_mesh(4)
    w, x = jnp.arange(8.0), jnp.linspace(-1, 1, 12)
    specs = {"w": P(sharding.AXIS), "b": P()}

    def loss(params, x):
        return jnp.mean(jnp.tanh(params["w"].sum() * x + params["b"] + params["w"][3] * x**2))

    def split(params, x):
        grads = jax.grad(lambda params: loss(sharding.gather(params, specs), x))(params)
        return sharding.mean_gradients(grads, specs)

    mapped = jax.shard_map(
        split, mesh=mesh, in_specs=(specs, P(sharding.AXIS)), out_specs=specs, check_vma=False
    )
    params = {"w": 0.01 * w, "b": jnp.float32(0.1)}
    expected, found = jax.grad(loss)(params, x), mapped(params, x)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="multiple of 4 devices, got batch size 6; try 8 or 4"):
        sharding.shard_batch(jnp.ones(6), sharding.data_mesh(4))
    with pytest.raises(ValueError, match=r"got batch size 3; try 4\."):
        sharding.check_batch(3, 4)


def test_keys_depend_on_the_index_alone(key):
    whole = sharding.example_keys(key, jnp.arange(6))
    part = sharding.example_keys(key, jnp.arange(2, 4))
    np.testing.assert_array_equal(jax.random.key_data(whole)[2:4], jax.random.key_data(part))
    assert len(np.unique(jax.random.key_data(whole), axis=0)) == 6


def test_local_index_under_a_map():
    out = jax.pmap(lambda _: sharding.local_index(3, "data"), axis_name="data")(jnp.zeros(4))
    np.testing.assert_array_equal(out, np.arange(12).reshape(4, 3))


LAPACK_ON_DEVICES = """
import functools, jax
from jax.sharding import PartitionSpec as P
from lowdim_diffusion import linalg, sharding, subspaces

def one(key):
    a, b = (linalg.random_frames(k, 2, 48, 8) for k in jax.random.split(key))
    return subspaces.projector_distance(a, b).sum()

run = functools.partial(jax.lax.map, one, batch_size=64)
mesh = sharding.data_mesh()
run = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
print(float(jax.jit(run)(jax.random.split(jax.random.key(0), 1024)).mean()))
"""


def test_batched_lapack_on_many_devices_does_not_hang():
    """With jaxlib 0.10.2 and a pool of two threads (NPROC=2) this never ends."""
    environment = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS")}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", LAPACK_ON_DEVICES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    # E ||P - Q||^2 = 2 d (1 - d/n) for each of two pairs.
    assert float(done.stdout) == pytest.approx(2 * (16 * (1 - 8 / 48)) ** 0.5, rel=0.01)
