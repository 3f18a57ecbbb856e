"""Training from a folder of pictures, decoded as they are drawn, against data on the device.

Every call trains on a chunk of its own, so it waits for data whenever decoding is the slower of the
two. ``decoding alone`` does no training.
"""

import atexit
import functools
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks.cases._nets import unet
from benchmarks.harness import Case, Variant
from lowdim_diffusion import data, losses, schedules, sharding, training

SIDE, COUNT, STEPS, BATCH = (
    {"smoke": 40, "small": 64, "medium": 128, "large": 256},
    {"smoke": 64, "small": 1024, "medium": 4096, "large": 8192},
    {"smoke": 4, "small": 32, "medium": 64, "large": 64},
    {"smoke": 8, "small": 32, "medium": 64, "large": 64},
)


@functools.cache
def _folder(side: int, count: int) -> pathlib.Path:
    """PNG files of smooth pictures with some noise, which pack about as photographs do."""
    from PIL import Image

    path = pathlib.Path(tempfile.mkdtemp(prefix="lowdim-stream-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = smooth + rng.integers(-4, 5, smooth.shape)
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path / f"{i}.png")
    return path


def _streams(size: str) -> list[Variant]:
    net = unet(size)
    batch, steps = BATCH[size], STEPS[size]
    side, channels = net.data_shape[0], net.data_shape[-1]
    lazy = data.load_lazy(_folder(SIDE[size], COUNT[size]), size=side, channels=channels)
    resident = data.batches(lazy.load(), batch)
    # Chunks as short as a call, so that every call takes one.
    stream = data.stream(lazy, batch, chunk_examples=batch * steps)
    mesh, key = sharding.data_mesh(1), jax.random.key(0)
    optimizer = training.optimizers.make("adam", 1e-4)
    loss_fn = losses.make_loss(net, schedules.VE())
    step = training.make_train_step(loss_fn, optimizer, axis_name=sharding.AXIS)
    state = training.init_state(net.init(key), optimizer)

    def loop(examples: Any, arrays: Any) -> tuple[Any, Any]:
        first = sharding.replicate(jax.tree.map(jax.numpy.copy, state), mesh)
        program = training.compile_loop(step, examples, batch, mesh, first, arrays)
        return program, [first]

    arrays = sharding.replicate(resident.arrays, mesh)
    held = loop(resident.examples, arrays)
    feeds = [stream.feed(mesh, jax.random.split(key)[0], 0, 2**30) for _ in range(2)]
    for feed in feeds:
        atexit.register(feed.close)
    streamed = loop(stream.examples, feeds[0].shapes)
    at = [0, 0]

    def train(program: Any, held: list[Any], chunk: Any) -> None:
        held[0] = program(held[0], chunk, key, steps).state

    def from_folder() -> None:
        train(*streamed, feeds[0](at[0]).arrays)
        at[0] += steps

    def decode() -> None:
        jax.block_until_ready(feeds[1](at[1]).arrays)
        at[1] += steps

    return [
        Variant("on the device", lambda: train(*held, arrays), steps * batch),
        Variant("streamed", from_folder, steps * batch),
        Variant("decoding alone", decode, steps * batch),
    ]


CASES = [
    Case(
        "train-stream",
        "image",
        _streams,
        "streamed at most 1.1 of on the device, where decoding alone is below it",
    )
]
