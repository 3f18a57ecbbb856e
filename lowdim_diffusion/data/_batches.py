r"""Stateless batches: what is drawn at a step is a pure function of ``(arrays, key, step, index)``.

Example ``i`` of step ``s`` sits at position ``p = s B + i`` of an endless stream of epochs:
epoch ``p // N``, slot ``p % N``. A keyed bijection of ``0 .. N - 1`` maps the slot to an example,
so every example comes once per epoch, nothing is stored, and any device can draw any part alone.

The bijection is the swap-or-not shuffle: each of its rounds has a random pivot ``k`` and a random
function ``F`` to one bit, and

.. math:: x \leftarrow \begin{cases} k - x \bmod N & F(\max(x, k - x \bmod N)) = 1 \\ x &
   \text{otherwise} \end{cases}

which swaps the two partners of a pair or leaves both, hence is a bijection for every ``N``. After
``r`` rounds the law of one element is uniform up to ``2^-r``.

References:
    Hoang, Morris & Rogaway 2012, arXiv 1208.1176 (swap-or-not shuffle).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from lowdim_diffusion._checks import check_choice, check_int, fail
from lowdim_diffusion._types import Array, Batch, Int
from lowdim_diffusion.data._dataset import Dataset, from_uint8

LIMIT = 2**30
"""Largest number of examples and largest batch: sums of two stay inside int32."""


@dataclass(frozen=True, eq=False)
class Batcher:
    """Batches of a data set as pure functions; made by :func:`batches`.

    Attributes:
        arrays: ``images`` and, where there are any, ``labels`` and ``subset``. Put them on the
            device once (``jax.device_put``) and hand them to :meth:`examples` as an argument: an
            array that a compiled function closes over would become a constant of the program.
        batch_size: B, examples in the global batch.
        num_examples: N, examples in one epoch.
        shuffle: ``"epoch"``, ``"replacement"`` or ``"none"``.
        flip: whether pictures are mirrored left to right with probability 1/2.
    """

    arrays: dict[str, Any]
    batch_size: int
    num_examples: int
    shuffle: str = "epoch"
    flip: bool = False

    @property
    def steps_per_epoch(self) -> float:
        """N / B."""
        return self.num_examples / self.batch_size

    def batch(self, key: Any, step: Any, arrays: Any = None) -> Batch:
        """Return the whole batch of a step.

        Args:
            key: typed key of the whole run; the step is folded in here.
            step: whole number >= 0, traced or not.
            arrays: see :attr:`arrays`, which is the default.
        """
        index = jnp.arange(self.batch_size, dtype=jnp.int32)
        return self.examples(self.arrays if arrays is None else arrays, key, step, index)

    def examples(self, arrays: Any, key: Any, step: Any, index: Int[Array, " m"]) -> Batch:
        """Return the examples at the given places of a step's batch.

        Args:
            arrays: see :attr:`arrays`.
            key: typed key of the whole run, of any implementation.
            step: whole number in ``[0, 2^31)``.
            index: ``[m]`` int32 places in the global batch, in ``[0, B)``.

        Returns:
            ``x: [m, *data]`` float32 (8-bit pictures scaled to [-1, 1]), ``label: [m]`` int32 if
            there are labels, ``row: [m]`` int32, the example's number in the data set, and
            ``index``, its place in the batch: losses fold their keys with that, so an example
            drawn twice gets two noises.
        """
        rows = self.rows(key, step, index)
        if "subset" in arrays:
            rows = _rows(arrays["subset"], rows)
        label = _rows(arrays["labels"], rows) if "labels" in arrays else None
        return self.finish(key, step, index, rows, _rows(arrays["images"], rows), label)

    def rows(self, key: Any, step: Any, index: Int[Array, " m"]) -> Int[Array, " m"]:
        """Return which examples, of the subset if there is one, are drawn at these places."""
        index, count = index.astype(jnp.int32), self.num_examples
        if self.shuffle == "replacement":
            # Drawn for the whole batch, then picked: the same on every device.
            at_step = _key_of(key, step)
            return jax.random.randint(at_step, (self.batch_size,), 0, count, jnp.int32)[index]
        epoch, start = _divmod_product(step, self.batch_size, count)
        later, rows = jnp.divmod(start + index, jnp.int32(count))
        if self.shuffle == "epoch":
            span = (count + self.batch_size - 2) // count + 1
            rows = _permute(_words(key), epoch, later, rows, count, span)
        return rows

    def finish(
        self, key: Any, step: Any, index: Int[Array, " m"], rows: Array, x: Array, label: Any
    ) -> Batch:
        """Return the batch of examples as they are stored: scaled and mirrored."""
        x = from_uint8(x) if x.dtype == jnp.uint8 else x
        if self.flip:
            at_step = jax.random.fold_in(_key_of(key, step), 1)
            mirror = (jax.random.bits(at_step, (self.batch_size,), jnp.uint32) >> 31)[index] == 1
            x = jnp.where(mirror[:, None, None, None], x[:, :, ::-1, :], x)
        labels = {} if label is None else {"label": label}
        return {"x": x, **labels, "row": rows, "index": index.astype(jnp.int32)}


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    shuffle: str = "epoch",
    flip: bool = False,
    subset: Any = None,
) -> Batcher:
    """Return the :class:`Batcher` that draws from a data set.

    Args:
        dataset: see :func:`lowdim_diffusion.data.load`.
        batch_size: B, examples per step over all devices; may exceed the number of examples.
        shuffle: ``"epoch"``: every example once per epoch in an order that the key decides and that
            differs from epoch to epoch; ``"replacement"``: each example drawn uniformly and
            independently; ``"none"``: in the order of the data set, round and round.
        flip: mirror pictures left to right with probability 1/2, decided per example and step.
        subset: draw only these: a number for the first so many, or an array of whole numbers.

    Raises:
        ValueError: if sizes, names or the subset do not fit.

    Examples:
        >>> import jax
        >>> from lowdim_diffusion import data
        >>> digits = data.batches(data.load("digits"), 32)
        >>> index, key = jax.numpy.arange(32), jax.random.key(0)
        >>> batch = jax.jit(digits.examples)(digits.arrays, key, 7, index)
        >>> batch["x"].shape, batch["label"].dtype.name
        ((32, 8, 8, 1), 'int32')
    """
    check_order("batches", dataset, batch_size, shuffle, flip)
    arrays: dict[str, Any] = {"images": dataset.images}
    if dataset.labels is not None:
        arrays["labels"] = dataset.labels
    count = dataset.num_examples
    if subset is not None:
        rows = np.asarray(subset)
        if rows.ndim == 0:
            check_int("batches", "subset", subset)
            rows = np.arange(int(rows))
        if rows.ndim != 1 or rows.size == 0 or rows.dtype.kind not in "ui":
            got = f"{rows.dtype} {list(rows.shape)}"
            raise fail("batches", "unfit subset", "a number or whole numbers [k], k >= 1", got)
        if rows.min() < 0 or rows.max() >= count:
            got = f"{rows.min()} to {rows.max()}"
            raise fail("batches", "subset out of range", f"0 to {count - 1}", got)
        arrays["subset"] = rows.astype(np.int32)
        count = len(rows)
    return Batcher(arrays, int(batch_size), count, shuffle, flip)


def check_order(where: str, dataset: Any, batch_size: int, shuffle: str, flip: bool) -> None:
    """Raise unless batches can be drawn from a data set in this way."""
    check_int(where, "batch_size", batch_size)
    check_choice(where, "shuffle", shuffle, ("epoch", "replacement", "none"))
    if flip and not dataset.is_image:
        raise fail(where, "flip needs pictures", "data of shape (h, w, c)", dataset.data_shape)
    if (count := max(dataset.num_examples, batch_size)) > LIMIT:
        raise fail(where, "too many examples", f"at most {LIMIT}", count)


def _words(key: Any) -> Array:
    """Return two words of any kind of key; as a threefry key they draw the same everywhere."""
    return jax.random.key_data(key).reshape(-1)[:2]


def _key_of(key: Any, step: Any) -> Array:
    return jax.random.fold_in(jax.random.wrap_key_data(_words(key), impl="threefry2x32"), step)


def _rows(array: Any, rows: Array) -> Array:
    return jnp.asarray(array).at[rows].get(mode="promise_in_bounds")


def _divmod_product(step: Any, factor: int, modulus: int) -> tuple[Array, Array]:
    """Return ``divmod(step * factor, modulus)`` without leaving 32 bits: (uint32 mod 2^32, int32).

    ``step = sum_k b_k 2^k``; quotient and remainder of each ``2^k factor`` are known beforehand,
    and the chosen ones are added pairwise, carrying whenever a remainder reaches the modulus (at
    most 2^30).
    """
    parts = [divmod(factor << k, modulus) for k in range(32)]
    bits = (jnp.asarray(step).astype(jnp.uint32) >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(
        1
    )
    quotient = bits * jnp.asarray(np.array([q % 2**32 for q, _ in parts], np.uint32))
    remainder = bits.astype(jnp.int32) * jnp.asarray(np.array([r for _, r in parts], np.int32))
    while remainder.shape[0] > 1:
        remainder = remainder[::2] + remainder[1::2]
        carry = remainder >= modulus
        remainder = jnp.where(carry, remainder - modulus, remainder)
        quotient = quotient[::2] + quotient[1::2] + carry.astype(jnp.uint32)
    return quotient[0], remainder[0]


def _permute(
    words: Array, epoch: Array, later: Array, slot: Array, size: int, span: int
) -> Int[Array, " m"]:
    """Return where the bijections of 0..size-1 of epochs ``epoch + later`` send ``slot: [m]``.

    ``later: [m]`` lies in ``0 .. span - 1``. Pivot and salt of a round are one threefry block of
    the counter (epoch, 2^31 + round), a place that ``fold_in`` of a step never touches.
    """
    rounds = 32 + 2 * size.bit_length()
    shape = (span, rounds)
    epochs = epoch + jax.lax.broadcasted_iota(jnp.uint32, shape, 0)
    counter = jax.lax.broadcasted_iota(jnp.uint32, shape, 1) + jnp.uint32(2**31)
    block = threefry_2x32((words[0], words[1]), jnp.stack([epochs, counter]))
    pivots, salts = (block[0] % jnp.uint32(size)).astype(jnp.int32), block[1]

    def one_round(r: Array, x: Array) -> Array:
        partner = pivots[later, r] - x
        partner = jnp.where(partner < 0, partner + size, partner)
        pair = jnp.maximum(x, partner).astype(jnp.uint32)
        return jnp.where(_random_bit(pair ^ salts[later, r]), partner, x)

    return jax.lax.fori_loop(0, rounds, one_round, slot)


def _random_bit(h: Array) -> Array:
    """Return one well-mixed bit per uint32 word."""
    h = h * jnp.uint32(0x9E3779B1)
    h = (h ^ (h >> 15)) * jnp.uint32(0x85EBCA77)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE3D)
    return (h >> 31) == 1
