"""The training step on 1, 2, 4, 8 emulated CPU devices, mapped in three ways.

Emulated devices share the processors, so this shows the cost of mapping, not a speed-up. On real
accelerators the devices present are used. Each device count needs a process of its own.
"""

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.harness import Case, Variant

PROBE = """
import json, sys, time
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from benchmarks.cases._nets import unet
from benchmarks.cases.training import _step
from lowdim_diffusion import sharding

size, how, batch_size, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
net = unet(size)
mesh = sharding.data_mesh()
step, state = _step(net, None if how == "jit" else sharding.AXIS)
batch = {"x": jax.random.normal(jax.random.key(1), (batch_size, *net.data_shape))}
key = jax.random.key(2)
if how == "pmap":
    split = lambda x: x.reshape(mesh.size, -1, *x.shape[1:])
    mapped = jax.pmap(step, sharding.AXIS, in_axes=(None, 0, None))
    args = (state, jax.tree.map(split, batch), key)
elif how == "jit":
    mapped = jax.jit(step)
    args = (sharding.replicate(state, mesh), sharding.shard_batch(batch, mesh), key)
else:
    specs = dict(in_specs=(P(), P(sharding.AXIS), P()), out_specs=P())
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    args = (sharding.replicate(state, mesh), sharding.shard_batch(batch, mesh), key)
(new, metrics) = jax.block_until_ready(mapped(*args))
times = []
for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(mapped(*args))
    times.append(time.perf_counter() - begin)
first = lambda x: np.asarray(x).reshape(-1)[0] if how == "pmap" else np.asarray(x)
total = sum(float(np.abs(np.asarray(p if how != "pmap" else p[0], np.float64)).sum())
            for p in jax.tree.leaves(new.params))
print(json.dumps({"s": sorted(times)[len(times) // 2], "loss": float(first(metrics["loss"])),
"sum": total}))
"""


def probe(size: str, how: str, num_devices: int, *, repeats: int = 5) -> dict[str, Any]:
    """Return seconds per step, the loss and the sum of |parameters| after the step."""
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    env = {**os.environ, "XLA_FLAGS": flags}
    command = [sys.executable, "-c", PROBE, size, how, "16", str(repeats)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{how} on {num_devices} devices failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _mapped(size: str) -> list[Variant]:
    def variant(how: str, count: int) -> Variant:
        bars = {"shard_map, 1 devices": 1.26} if (how, count) == ("shard_map", 2) else {}
        call = lambda: probe(size, how, count)["s"]
        return Variant(f"{how}, {count} devices", call, bars=bars)

    counts = (1, 2) if size == "smoke" else (1, 2, 4, 8)
    return [variant(how, count) for count in counts for how in ("shard_map", "pmap", "jit")]


CASES = [Case("devices", "training step", _mapped, most_rounds=2)]
