"""Batches of data that do not fit on the device: decoded ahead by threads, many steps at once.

Which example is drawn where is decided as for data on the device (:mod:`._batches`), by key, step
and place alone. The rows of the next chunk are worked out, its examples decoded and sent to the
devices while the compiled loop works on the chunk before, which it reads as an array with a leading
axis of steps. A process decodes only the places of the batch that its own devices hold.

The pictures are decoded by threads of this process: Pillow lets go of the interpreter's lock while
it decodes. There is no iterator and hence no state of one to save.
"""

import math
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowdim_diffusion._checks import check_choice, check_int
from lowdim_diffusion._types import Array, Batch, Int, PRNGKey, PyTree
from lowdim_diffusion.data._batches import Batcher, check_order
from lowdim_diffusion.data._dataset import DataError, data_error
from lowdim_diffusion.data._lazy import LazyDataset
from lowdim_diffusion.sharding import AXIS, num_cores, replicate, replicated

CHUNK_BYTES, CHUNK_EXAMPLES, CHUNK_STEPS = 2**26, 2**14, 1024
"""Largest chunk, over all processes: the first of these that is reached; one step at least."""

_BLOCK = 16  # examples that a thread decodes at a time


@dataclass(frozen=True, eq=False)
class Stream:
    """Batches of a :class:`LazyDataset`; made by :func:`stream`.

    Attributes:
        dataset: where the examples are.
        order: decides which are drawn.
        on_error: ``"stop"`` before the first step that needs an example that cannot be read, or
            ``"skip"``: take the next one, in the order of the data set, that can.
        max_unreadable: with ``"skip"``, stop beyond so many different ones.
        chunk_examples: largest chunk.
    """

    dataset: LazyDataset
    order: Batcher
    on_error: str = "stop"
    max_unreadable: int = 100
    chunk_examples: int | None = None

    @property
    def batch_size(self) -> int:
        """B, examples in the global batch."""
        return self.order.batch_size

    @property
    def num_examples(self) -> int:
        """N, examples in one epoch."""
        return self.order.num_examples

    @property
    def steps_per_epoch(self) -> float:
        """N / B."""
        return self.order.steps_per_epoch

    @property
    def chunk_steps(self) -> int:
        """Steps in a chunk."""
        each = math.prod(self.dataset.data_shape) * self.dataset.dtype.itemsize
        examples = min(CHUNK_BYTES // each, self.chunk_examples or CHUNK_EXAMPLES)
        return max(min(examples // self.batch_size, CHUNK_STEPS), 1)

    def shapes(self, size: int) -> dict[str, Any]:
        """Return a chunk's arrays, as shapes, for batches of this size (a device's part, say)."""
        steps, dataset = self.chunk_steps, self.dataset
        whole = lambda dtype, *shape: jax.ShapeDtypeStruct((steps, size, *shape), dtype)
        shapes = {"images": whole(dataset.dtype, *dataset.data_shape), "row": whole(np.int32)}
        if dataset.labelled:
            shapes["labels"] = whole(np.int32)
        return {**shapes, "first": jax.ShapeDtypeStruct((), np.int32)}

    def examples(self, arrays: Any, key: Any, step: Any, index: Int[Array, " m"]) -> Batch:
        """Return a step's part of a chunk as a batch, equal to :meth:`Batcher.examples`.

        Args:
            arrays: a chunk that holds the step, or a device's part of it.
            key: typed key of the whole run.
            step: whole number, traced or not.
            index: places in the global batch of all that the chunk holds.
        """
        at = step - arrays["first"]
        take = lambda name: jax.lax.dynamic_index_in_dim(arrays[name], at, keepdims=False)
        label = take("labels") if "labels" in arrays else None
        return self.order.finish(key, step, index, take("row"), take("images"), label)

    def feed(self, mesh: Mesh, key: PRNGKey, first: int, num_steps: int) -> "Feed":
        """Return the :class:`Feed` of a run that goes on after ``first`` of ``num_steps`` steps."""
        return Feed(self, mesh, key, first, num_steps)


def stream(
    dataset: LazyDataset,
    batch_size: int,
    *,
    shuffle: str = "epoch",
    flip: bool = False,
    on_error: str = "stop",
    max_unreadable: int = 100,
    chunk_examples: int | None = None,
) -> Stream:
    """Return the :class:`Stream` that draws from a lazy data set.

    Its batches are those of :func:`lowdim_diffusion.data.batches`, bit for bit. Give it to
    :func:`lowdim_diffusion.training.train` in place of arrays.

    Args:
        dataset: see :func:`load_lazy` and :func:`from_source`.
        batch_size: B, examples per step over all devices.
        shuffle: see :func:`batches`.
        flip: see :func:`batches`.
        on_error: ``"stop"`` before the first step that needs an example that cannot be read, or
            ``"skip"``: take the next example of the data set that can be read in its place. That
            depends on the data alone, so a run that is continued does the same again.
        max_unreadable: with ``"skip"``, stop once a process has met more of them.
        chunk_examples: decode at most so many at a time, of all processes together (but those of
            one step at least): less memory for more turns. None: 16,384; never more than 64 MiB.

    Raises:
        ValueError: if sizes or names do not fit.

    Examples:
        >>> import numpy as np
        >>> from lowdim_diffusion import data, sharding
        >>> numbers = data.from_source([np.full(2, i, np.float32) for i in range(10)])
        >>> drawn, key = data.stream(numbers, 4, shuffle="none"), jax.random.key(0)
        >>> feed = drawn.feed(sharding.data_mesh(1), key, 0, 100)
        >>> batch = drawn.examples(feed(0).arrays, key, 1, jax.numpy.arange(4))
        >>> feed.close()
        >>> batch["x"].tolist(), batch["row"].tolist()
        ([[4.0, 4.0], [5.0, 5.0], [6.0, 6.0], [7.0, 7.0]], [4, 5, 6, 7])
    """
    check_order("stream", dataset, batch_size, shuffle, flip)
    check_choice("stream", "on_error", on_error, ("stop", "skip"))
    check_int("stream", "max_unreadable", max_unreadable)
    if chunk_examples is not None:
        check_int("stream", "chunk_examples", chunk_examples)
    order = Batcher({}, int(batch_size), dataset.num_examples, shuffle, flip)
    return Stream(dataset, order, on_error, max_unreadable, chunk_examples)


class Chunk(NamedTuple):
    """The data of some steps, on the devices."""

    arrays: PyTree
    end: int
    """The first step that is not in it."""
    error: DataError | None = None
    """Why it ends before its time."""


class Feed:
    """Chunks of a :class:`Stream` in the order of the steps, one of them decoded ahead.

    Two chunks are on the devices at most and one more in the host's memory, besides what is being
    decoded. Close it at the end.
    """

    def __init__(self, stream: Stream, mesh: Mesh, key: PRNGKey, first: int, num_steps: int):
        self._stream, self._mesh, self._num_steps = stream, mesh, num_steps
        self._split = NamedSharding(mesh, PartitionSpec(None, AXIS))
        shapes = stream.shapes(stream.batch_size)
        whole = shapes.pop("first")
        place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        self.shapes = {
            **{name: place(x, self._split) for name, x in shapes.items()},
            "first": place(whole, replicated(mesh)),
        }
        """Arrays of every chunk, as shapes with their place."""
        self.unreadable: dict[int, str] = {}
        """What cannot be read, by its number, as far as this process has met it."""
        self._instead: dict[int, int] = {}
        places = own_places(self._split, stream.batch_size)

        def rows(key: PRNGKey, steps: Array) -> Array:
            return jax.vmap(lambda step: stream.order.rows(key, step, jnp.asarray(places)))(steps)

        self._rows, self._key = jax.jit(rows), key
        self._told, self._closed = 0, False
        self._decoders = ThreadPoolExecutor(num_cores(), "decode")
        self._maker = ThreadPoolExecutor(1, "chunk")
        self._chunk: Chunk | None = None
        self._next = self._start(first)

    def __call__(self, step: int) -> Chunk:
        """Return the chunk that holds a step; called with steps in ascending order."""
        if self._chunk is None or (step >= self._chunk.end and self._chunk.error is None):
            self._chunk = None  # let go of its arrays before more are made
            self._chunk = self._next.result()
            if self._chunk.error is None and self._chunk.end < self._num_steps:
                self._next = self._start(self._chunk.end)
        for line in list(self.unreadable.values())[self._told :]:
            warnings.warn(f"left out: {line}", stacklevel=2)
            self._told += 1
        return self._chunk

    def close(self) -> None:
        """Stop decoding."""
        self._closed = True
        self._maker.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)

    def _start(self, first: int) -> Future[Chunk]:
        # Worked out here, not in a thread: there it would wait behind the loop on the device.
        size = self._stream.chunk_steps
        rows = np.asarray(self._rows(self._key, first + np.arange(size, dtype=np.int32)))
        return self._maker.submit(self._make, first, rows[: self._num_steps - first])

    def _make(self, first: int, rows: np.ndarray) -> Chunk:
        """Return the chunk of these rows, ``[steps, places]``."""
        size, dataset = self._stream.chunk_steps, self._stream.dataset
        local = rows.shape[1]
        wanted = np.zeros((size, local), np.int32)
        wanted[: len(rows)] = rows
        images = np.zeros((size, local, *dataset.data_shape), dataset.dtype)
        labels = np.zeros((size, local), np.int32)
        flat = images.reshape(size * local, *dataset.data_shape), labels.reshape(-1)
        drawn, count = wanted.reshape(-1), rows.size

        def put(place: int, row: int) -> None:
            flat[0][place], flat[1][place] = dataset.example(row)
            drawn[place] = row

        def fill(places: Sequence[int]) -> list[tuple[int, DataError]]:
            failed = []
            for place in places:
                if self._closed:
                    break
                try:
                    put(place, self._instead.get(int(drawn[place]), int(drawn[place])))
                except DataError as error:
                    failed.append((place, error))
            return failed

        blocks = [range(i, min(i + _BLOCK, count)) for i in range(0, count, _BLOCK)]
        failed = [item for part in self._decoders.map(fill, blocks) for item in part]
        end, stop = first + len(rows), None
        for place, error in failed:
            try:
                put(place, self._replacement(int(drawn[place]), error))
            except DataError as error:
                end, stop = first + place // local, error
                break
        local_arrays = {"images": images, "row": wanted, "labels": labels}
        arrays = {
            name: jax.make_array_from_process_local_data(
                self._split, local_arrays[name], shape.shape
            )
            for name, shape in self.shapes.items()
            if name != "first"
        }
        return Chunk({**arrays, "first": replicate(np.int32(first), self._mesh)}, end, stop)

    def _replacement(self, row: int, error: DataError) -> int:
        """Return the next row that can be read: the same one whenever, and by whom, it is asked."""
        if self._stream.on_error == "stop":
            raise error
        while row not in self._instead:
            self._instead[row] = self._after(row, error)
        return self._instead[row]

    def _after(self, row: int, error: DataError) -> int:
        limit, count = self._stream.max_unreadable, self._stream.num_examples
        tried = row
        while True:
            self.unreadable.setdefault(tried, str(error))
            if len(self.unreadable) > min(limit, count - 1):
                what = f"{len(self.unreadable)} examples cannot be read, the last: {error}"
                fix = "repair the data, or allow more with --data.max-unreadable"
                raise data_error(self._stream.dataset.where, what, f"at most {limit}", fix=fix)
            tried = (tried + 1) % count
            try:
                self._stream.dataset.example(tried)
                return tried
            except DataError as another:
                error = another


def own_places(split: Any, batch_size: int) -> Int[np.ndarray, " m"]:
    """Return the places in the global batch that this process's devices hold, in order.

    Args:
        split: sharding of a chunk, steps first, then the places of a batch.
        batch_size: B.
    """
    found = split.addressable_devices_indices_map((1, batch_size)).values()
    places = [np.arange(batch_size, dtype=np.int32)[at[1]] for at in found if at is not None]
    return np.unique(np.concatenate(places))
