"""Batches: orders by counting and by chance bounds, positions by Python's whole numbers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from lowdim_diffusion import data, sharding
from lowdim_diffusion.data import _batches


def numbers(count):
    """``count`` vectors that hold their own number."""
    return data.from_arrays(np.arange(count, dtype=np.float32)[:, None], np.arange(count))


def stream(batcher, key, num_steps, first=0):
    """Row numbers drawn from step ``first`` on, one array."""
    draw = jax.jit(lambda arrays, key, step: batcher.batch(key, step, arrays)["row"])
    steps = range(first, first + num_steps)
    return np.concatenate([np.asarray(draw(batcher.arrays, key, step)) for step in steps])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 64, 1797, 60000])
def test_every_example_once_per_epoch(key, count):
    orders = stream(data.batches(numbers(count), count), key, 3).reshape(3, count)
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(count), (3, 1)))
    if count > 20:
        assert not np.array_equal(orders[0], orders[1])
        assert not np.array_equal(orders[0], orders[2])


@pytest.mark.parametrize(("count", "batch_size"), [(1, 3), (7, 7), (10, 3), (13, 40), (40, 24)])
@pytest.mark.parametrize("first", [0, 123457])
def test_epochs_cut_across_batches(key, count, batch_size, first):
    batcher = data.batches(numbers(count), batch_size)
    num_steps = -(-2 * count // batch_size) + 1
    rows = stream(batcher, key, num_steps, first)
    positions = np.arange(first * batch_size, (first + num_steps) * batch_size)
    for epoch in np.unique(positions // count):
        drawn = rows[positions // count == epoch]
        assert len(np.unique(drawn)) == len(drawn)
    whole = [e for e in np.unique(positions // count) if np.sum(positions // count == e) == count]
    assert whole


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**31 - 1), st.integers(1, 2**30), st.integers(1, 2**30))
def test_positions_are_exact_beyond_32_bits(step, factor, modulus):
    quotient, remainder = _batches._divmod_product(step, factor, modulus)
    expected = divmod(step * factor, modulus)
    assert int(quotient) == expected[0] % 2**32
    assert int(remainder) == expected[1]


@pytest.mark.parametrize("first", [10**6, 2**31 - 4])
def test_late_steps_still_cover_an_epoch(key, first):
    count, batch_size = 1797, 4096  # positions near 4e9 and 8.8e12
    rows = stream(data.batches(numbers(count), batch_size), key, 3, first)
    offset = -(first * batch_size) % count
    for start in range(offset, len(rows) - count, count):
        assert np.array_equal(np.sort(rows[start : start + count]), np.arange(count))


def test_all_orders_of_few_examples_are_equally_likely(key):
    for count in (2, 4):
        epochs = 6000
        rows = stream(data.batches(numbers(count), count * epochs), key, 1)
        orders = np.asarray(rows).reshape(epochs, count)
        kinds = list(itertools.permutations(range(count)))
        times = [int(np.sum(np.all(orders == kind, axis=1))) for kind in kinds]
        assert sum(times) == epochs
        assert scipy.stats.chisquare(times).pvalue > 1e-4


@pytest.mark.parametrize("count", [1797, 60000])
def test_orders_look_random(key, count):
    orders = stream(data.batches(numbers(count), count), key, 4).reshape(4, count)
    bound = 4.5 / math.sqrt(count)
    slots = np.arange(count)
    for order in orders:
        assert abs(np.corrcoef(slots, order)[0, 1]) < bound
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < bound
        # Where slots land: 16 x 16 cells, nearly independent Poisson counts.
        cells = np.histogram2d(slots, order, 16)[0]
        chi2 = np.sum((cells - cells.mean()) ** 2) / cells.mean()
        assert scipy.stats.chi2(225).ppf(1e-4) < chi2 < scipy.stats.chi2(225).ppf(1 - 1e-4)
        # Differences of neighbours mod N repeat as often as uniform ones would.
        distinct = len(np.unique(np.diff(order) % count)) / count
        assert abs(distinct - (1 - math.exp(-1))) < 4.5 * 0.33 / math.sqrt(count)
        assert np.sum(order == slots) < 9
    for a, b in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < bound
        assert np.sum(a == b) < 9


def test_keys_decide_the_order():
    batcher = data.batches(numbers(100), 100)
    a, b, again = (stream(batcher, jax.random.key(seed), 1) for seed in (1, 2, 1))
    assert np.array_equal(a, again)
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("shuffle", ["epoch", "replacement", "none"])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_a_part_is_the_part_of_the_whole(shuffle, impl):
    batcher = data.batches(data.load("digits"), 48, shuffle=shuffle, flip=True)
    key = jax.random.key(5, impl=impl)
    whole = jax.jit(batcher.batch)(key, 37, batcher.arrays)
    for part in ([5, 6], [40, 3]):
        index = jnp.asarray(part, jnp.int32)
        drawn = jax.jit(batcher.examples)(batcher.arrays, key, 37, index)
        for name in ("x", "label", "row", "index"):
            assert np.array_equal(drawn[name], whole[name][index])


@pytest.mark.parametrize("shuffle", ["epoch", "replacement"])
def test_devices_draw_their_parts(key, shuffle):
    batcher = data.batches(data.load("digits"), 32, shuffle=shuffle, flip=True)
    mesh = sharding.data_mesh(4)

    def local(arrays, key, step):
        index = sharding.local_index(8, "data")
        return batcher.examples(arrays, key, step, index)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P("data"))
    expected = jax.jit(batcher.batch)(key, 9, batcher.arrays)
    drawn = jax.jit(mapped)(batcher.arrays, key, 9)
    replicated = jax.tree.map(lambda a: np.stack([a] * 4), batcher.arrays)
    one_each = jax.pmap(local, axis_name="data", in_axes=(0, None, None))(replicated, key, 9)
    for name, value in expected.items():
        assert np.array_equal(drawn[name], value)
        assert np.array_equal(one_each[name].reshape(value.shape), value)


def test_inside_loops_and_vmap(key):
    batcher = data.batches(data.load("digits"), 16, flip=True)
    steps = jnp.arange(5)
    draw = jax.jit(batcher.batch)
    expected = np.stack([draw(key, step, batcher.arrays)["x"] for step in range(5)])

    def scanned(arrays, key):
        return jax.lax.scan(lambda _, s: (None, batcher.batch(key, s, arrays)["x"]), None, steps)[1]

    def looped(arrays, key):
        def body(carry):
            step, out = carry
            return step + 1, out.at[step].set(batcher.batch(key, step, arrays)["x"])

        return jax.lax.while_loop(lambda c: c[0] < 5, body, (0, jnp.zeros(expected.shape)))[1]

    assert np.array_equal(jax.jit(scanned)(batcher.arrays, key), expected)
    assert np.array_equal(jax.jit(looped)(batcher.arrays, key), expected)
    keys = jax.random.split(key, 3)
    many = jax.jit(jax.vmap(lambda k: batcher.batch(k, 2)["row"]))(keys)
    assert np.array_equal(many, [draw(k, 2, batcher.arrays)["row"] for k in keys])


def test_traced_once_and_without_the_data_as_a_constant(key):
    batcher = data.batches(data.load("digits"), 16)
    traces = []

    @jax.jit
    def draw(arrays, key, step):
        traces.append(0)
        return batcher.batch(key, step, arrays)

    for step in range(4):
        draw(batcher.arrays, key, step)
    assert len(traces) == 1
    jaxpr = jax.make_jaxpr(lambda a, k, s: batcher.batch(k, s, a))(batcher.arrays, key, 0)
    assert sum(np.size(c) for c in jaxpr.consts) < 200


def test_pictures_are_scaled_and_rows_named(key):
    digits = data.load("digits")
    batcher = data.batches(digits, 64)
    batch = jax.jit(batcher.batch)(key, 3, batcher.arrays)
    rows = np.asarray(batch["row"])
    assert batch["x"].dtype == jnp.float32
    exact = digits.images[rows].astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(batch["x"], exact, atol=1e-7)
    np.testing.assert_array_equal(batch["x"], digits.floats(rows))
    assert np.array_equal(batch["label"], digits.labels[rows])


def test_vectors_are_kept_and_labels_are_optional(key):
    x = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32) * 50
    batcher = data.batches(data.from_arrays(x), 6)
    batch = jax.jit(batcher.batch)(key, 0, batcher.arrays)
    assert set(batch) == {"x", "row", "index"}
    np.testing.assert_array_equal(batch["index"], np.arange(len(batch["x"])))
    assert np.array_equal(batch["x"], x[np.asarray(batch["row"])])


def test_replacement_is_uniform(key):
    rows = stream(data.batches(numbers(50), 5000, shuffle="replacement"), key, 4).reshape(4, -1)
    times = np.stack([np.bincount(row, minlength=50) for row in rows])
    assert scipy.stats.chisquare(times.sum(axis=0)).pvalue > 1e-4
    assert abs(np.corrcoef(rows[0], rows[1])[0, 1]) < 4.5 / math.sqrt(5000)


def test_none_goes_round_in_order(key):
    rows = stream(data.batches(numbers(5), 3, shuffle="none"), key, 4)
    assert rows.tolist() == [p % 5 for p in range(12)]


def test_flips_are_fair_fresh_and_left_to_right(key):
    picture = np.arange(12, dtype=np.uint8).reshape(1, 3, 4, 1)
    batcher = data.batches(data.from_arrays(picture), 2000, flip=True)
    plain = data.from_arrays(picture).floats()[0]
    draw = jax.jit(batcher.batch)
    flips = []
    for step in range(2):
        x = np.asarray(draw(key, step, batcher.arrays)["x"])
        straight = np.all(x == np.asarray(plain), axis=(1, 2, 3))
        mirrored = np.all(x == np.asarray(plain)[:, ::-1], axis=(1, 2, 3))
        assert np.all(straight ^ mirrored)
        flips.append(mirrored)
    for mirrored in (*flips, flips[0] ^ flips[1]):
        assert abs(mirrored.mean() - 0.5) < 4.5 * 0.5 / math.sqrt(2000)


def test_subset_draws_only_its_rows(key):
    batcher = data.batches(numbers(30), 8, subset=[3, 7, 20, 29])
    rows = stream(batcher, key, 3)
    assert batcher.num_examples == 4
    assert np.bincount(rows, minlength=30)[[3, 7, 20, 29]].tolist() == [6, 6, 6, 6]
    first = data.batches(numbers(30), 8, subset=4)
    assert set(stream(first, key, 2).tolist()) == {0, 1, 2, 3}


def test_float64_mode_keeps_the_batch(x64):
    batcher = data.batches(data.load("digits"), 16, flip=True)
    batch = jax.jit(batcher.batch)(jax.random.key(0), 123456, batcher.arrays)
    assert batch["x"].dtype == jnp.float32
    assert batch["row"].dtype == jnp.int32
    with jax.enable_x64(False):
        same = jax.jit(batcher.batch)(jax.random.key(0), 123456, batcher.arrays)
    assert np.array_equal(batch["x"], same["x"])


def test_a_sweep_trains_on_its_own_subsets(key):
    """Arrays with a leading axis of subsets: one program, many training sets."""
    batcher = data.batches(numbers(30), 8, subset=4)
    subsets = jnp.asarray([[0, 1, 2, 3], [10, 11, 12, 13]], jnp.int32)

    def draw(subset):
        return batcher.batch(key, 0, {**batcher.arrays, "subset": subset})["row"]

    rows = np.asarray(jax.jit(jax.vmap(draw))(subsets))
    assert set(rows[1].tolist()) == {10, 11, 12, 13}


def test_nice_errors():
    vectors = numbers(5)
    with pytest.raises(ValueError, match="batch_size too small: expected at least 1, got 0"):
        data.batches(vectors, 0)
    with pytest.raises(ValueError, match="unknown shuffle: expected one of 'epoch'"):
        data.batches(vectors, 2, shuffle="always")
    with pytest.raises(
        ValueError, match=r"flip needs pictures: expected data of shape \(h, w, c\)"
    ):
        data.batches(vectors, 2, flip=True)
    with pytest.raises(ValueError, match="subset out of range: expected 0 to 4, got 0 to 5"):
        data.batches(vectors, 2, subset=[0, 5])
    with pytest.raises(ValueError, match="subset out of range"):
        data.batches(vectors, 2, subset=6)
    with pytest.raises(ValueError, match="unfit subset"):
        data.batches(vectors, 2, subset=np.array([0.5]))
    with pytest.raises(ValueError, match="too many examples: expected at most 1073741824"):
        data.batches(vectors, 2**30 + 1)
