"""What checkpoints, the log and the guards cost a run: the save itself, and the steps around it."""

import itertools
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks.harness import Case, Variant
from lowdim_diffusion import losses, networks, schedules, sharding, training
from lowdim_diffusion.training.checkpoint import Checkpointer
from lowdim_diffusion.training.rundir import RunDirectory

MEGABYTES = {"smoke": 1, "small": 60, "medium": 600, "large": 2400}
LEAVES = 48
STEPS = {"smoke": 20, "small": 400, "medium": 1000, "large": 1000}
"""Of one run, which saves half way; that is more often than by default, every 1000."""
WIDTH = {"smoke": 32, "small": 256, "medium": 512, "large": 1024}


def _saves(size: str) -> list[Variant]:
    """One save of a state as it lies on the device: all of it, and the part that training waits."""
    per_leaf = MEGABYTES[size] * 1_000_000 // (4 * LEAVES)
    keys = jax.random.split(jax.random.key(0), LEAVES)
    state = {"params": {f"w{i}": jax.random.normal(k, (per_leaf,)) for i, k in enumerate(keys)}}
    jax.block_until_ready(state)
    folder = tempfile.TemporaryDirectory(prefix="lowdim-bench-")
    checkpointer = Checkpointer(folder.name, keep=1).__enter__()  # for the whole run, as training
    step = itertools.count(1)

    def save(blocking: bool) -> float:
        begin = time.perf_counter()
        checkpointer.save(next(step), state, {"folder": folder.name})
        blocked = time.perf_counter() - begin
        checkpointer.wait()
        return blocked if blocking else time.perf_counter() - begin

    flat = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    room = [np.empty_like(leaf) for leaf in flat]

    def copy() -> None:
        for target, leaf in zip(room, flat, strict=True):
            np.copyto(target, leaf)

    bars = {"whole save": 0.03, "copy in memory": 1.2}
    return [
        Variant("whole save", lambda: save(False)),
        Variant("blocking part", lambda: save(True), bars=bars),
        Variant("copy in memory", copy, ours=False),
    ]


class _Watch:
    """A monitor that looks at the clock when the loop begins and when its last stretch is done."""

    def __init__(self) -> None:
        self.begin = self.end = 0.0

    def start(self, step: int, num_steps: int) -> None:
        self.begin = time.perf_counter()

    def update(self, report: training.Report) -> None:
        self.end = time.perf_counter()

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def _runs(size: str) -> list[Variant]:
    """The compiled loop alone, and runs of the trainer in the same number of steps."""
    net = networks.make("mlp", data_shape=(64,), width=WIDTH[size], depth=4)
    optimizer = training.optimizers.make("adam", 1e-4, clip=1.0)  # as lowdim train makes it
    decay = training.ema.classic(0.999)
    step = training.make_train_step(
        losses.make_loss(net, schedules.VE()), optimizer, ema=decay, axis_name=sharding.AXIS
    )
    init = lambda: training.init_state(net.init(jax.random.key(0)), optimizer, ema=decay)
    examples = lambda arrays, key, step, index: {"x": arrays[index], "index": index}
    mesh, count, batch = sharding.data_mesh(1), STEPS[size], 256
    arrays = sharding.replicate(jax.random.normal(jax.random.key(1), (batch, 64)), mesh)
    key = sharding.replicate(jax.random.key(2), mesh)
    held = [sharding.replicate(init(), mesh)]
    loop = training.compile_loop(step, examples, batch, mesh, held[0], arrays)

    def bare() -> float:
        begin, left = time.perf_counter(), count
        while left:
            out = loop(held[0], arrays, key, left)
            held[0], left = out.state, left - out.num_steps
        return time.perf_counter() - begin

    def trainer(every: int, **options: Any) -> float:
        watch = _Watch()
        with tempfile.TemporaryDirectory(prefix="lowdim-bench-") as folder:
            with RunDirectory(pathlib.Path(folder) / "run") as run:
                training.train(
                    run,
                    init,
                    step,
                    examples,
                    arrays,
                    batch_size=batch,
                    num_steps=count,
                    key=key,
                    mesh=mesh,
                    checkpoint_every=every,
                    monitor=watch,
                    **options,
                )
        return watch.end - watch.begin

    return [
        Variant("compiled loop alone", bare, count),
        Variant("trainer, log", lambda: trainer(count), count),
        Variant(
            "trainer, log, checkpoints",
            lambda: trainer(count // 2),
            count,
            bars={"compiled loop alone": 1.03},
        ),
        Variant("the same, spikes looked for", lambda: trainer(count // 2, max_spike=9.0), count),
    ]


CASES = [
    Case(
        "checkpoint",
        "save",
        _saves,
        f"training waits for at most 0.03 of a save, 1.2 of a copy; {MEGABYTES['medium']} MB",
    ),
    Case(
        "trainer-overhead",
        "step",
        _runs,
        "log and checkpoints at most 1.03 of the loop alone",
        most_rounds=5,
    ),
]
