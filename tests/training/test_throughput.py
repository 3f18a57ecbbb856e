"""FLOPs against counts by hand and XLA's own, utilisation against arithmetic, rows on time."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lowdim_diffusion import sharding
from lowdim_diffusion.networks._conv import conv
from lowdim_diffusion.training import throughput
from lowdim_diffusion.training.throughput import Meter, count_flops, peak_flops


def flops(fn, *args):
    return count_flops(jax.make_jaxpr(fn)(*args))


def mlp_loss(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def test_a_training_step_of_an_mlp_is_three_times_its_forward_pass():
    x, params = jnp.ones((32, 5)), [jnp.ones((5, 64)), jnp.ones((64, 64)), jnp.ones((64, 7))]
    forward = 2 * 32 * (5 * 64 + 64 * 64 + 64 * 7)
    assert flops(mlp_loss, params, x) == {"float32": forward}
    # Backward: twice that, but for the derivative in x, which nobody asks for.
    backward = 2 * forward - 2 * 32 * 5 * 64
    assert flops(jax.grad(mlp_loss), params, x) == {"float32": forward + backward}
    again = flops(jax.grad(jax.checkpoint(mlp_loss)), params, x)
    assert again == {"float32": 2 * forward + backward}
    # XLA counts the elementwise operations too.
    theirs = jax.jit(jax.grad(mlp_loss)).lower(params, x).compile().cost_analysis()["flops"]
    assert forward + backward < theirs < 1.1 * (forward + backward)


def test_convolutions_are_counted_ours_and_jaxs():
    x, kernel = jnp.ones((2, 16, 16, 8)), jnp.ones((3, 3, 8, 4))
    one = 2 * (2 * 16 * 16 * 4) * (3 * 3 * 8)
    assert flops(conv, x, kernel) == {"float32": one}
    total = lambda x, kernel: jnp.sum(conv(x, kernel) ** 2)
    assert flops(jax.grad(total, (0, 1)), x, kernel) == {"float32": 3 * one}
    jaxs = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops(jaxs, x, kernel) == {"float32": one}
    # XLA leaves out the products with padding: 46 of 48 rows and columns are inside.
    theirs = jax.jit(jaxs).lower(x, kernel).compile().cost_analysis()["flops"]
    assert theirs == pytest.approx(one * (46 / 48) ** 2, rel=1e-3)


def test_loops_branches_and_devices_count_as_often_as_they_run():
    a = jnp.ones((4, 4))
    one = 2 * 4**3
    scan = lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=5)[0]
    assert flops(scan, a) == {"float32": 5 * one}
    forever = lambda a: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ a, a)
    assert flops(forever, a) == {"float32": one}
    either = lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a @ a)
    assert flops(either, a) == {"float32": 2 * one}
    assert flops(lambda a: a.astype(jnp.bfloat16) @ a.astype(jnp.bfloat16), a) == {"bfloat16": one}
    mesh = sharding.data_mesh(2)
    mapped = jax.shard_map(
        lambda a: a @ jnp.ones((4, 4)), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    assert flops(mapped, a) == {"float32": one}
    assert flops(jnp.sin, a) == {}


@pytest.mark.parametrize(
    ("kind", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "float32", 378),
        ("NVIDIA L40S", "float16", 362),
        ("NVIDIA L4", "float16", 121),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5p", "bfloat16", 459),
        ("NVIDIA A100-SXM4-80GB", "int8", None),
        ("cpu", "float32", None),
    ],
)
def test_peaks_of_devices(kind, dtype, tera):
    assert peak_flops(kind, dtype) == (None if tera is None else pytest.approx(tera * 1e12))


def devices(count, kind, memory=None):
    device = lambda i: types.SimpleNamespace(
        device_kind=kind, process_index=0, memory_stats=lambda: memory and {**memory, "i": i}
    )
    return [device(i) for i in range(count)]


def test_utilisation_by_hand(monkeypatch):
    now = iter([0.0, 4.0, 4.0, 10.0, 10.0])
    monkeypatch.setattr(throughput.time, "monotonic", lambda: next(now))
    two = devices(2, "NVIDIA A100", {"peak_bytes_in_use": 7})
    # 0.5 s of bfloat16 and 0.5 s of float32 at the peak of two devices.
    meter = Meter({"bfloat16": 312e12, "float32": 156e12}, two, batch_size=8, interval_s=5)
    assert not meter.due
    meter.add(2, 4.0)
    meter.add(2, 4.0)
    row = meter.row(4)
    assert row["step"] == 4 and row["images_per_s"] == 4 and row["step_time_s"] == 2
    assert row["mfu"] == pytest.approx(0.5) and row["other_share"] == 0
    assert row["flops_per_s"] == 468e12 / 2 and row["peak_memory_bytes"] == 7


def test_what_is_not_known_is_left_out():
    for flops, kind in (({"float32": 5.0}, "cpu"), ({"int8": 5.0}, "NVIDIA A100"), ({}, "cpu")):
        meter = Meter(flops, devices(1, kind), batch_size=8)
        assert meter.row(0) is None
        meter.add(1, 0.5)
        row = meter.row(1)
        assert not {"mfu", "peak_memory_bytes"} & set(row) and row["images_per_s"] == 16
        assert ("flops_per_s" in row) == bool(flops)
