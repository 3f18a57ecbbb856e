"""The shared layers against flax's own and against their definitions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import networks
from lowdim_diffusion.networks import _layers as layers
from lowdim_diffusion.networks.dit import positions
from lowdim_diffusion.networks.unet import _resample


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.result_type(float))


@pytest.mark.parametrize(("channels", "groups"), [(12, 3), (6, 1)])
def test_group_norm_is_flax_group_norm(x64, channels, groups):
    x = 3 * normal(0, 2, 5, 4, channels) + 1
    scale, bias, g = 1 + normal(1, channels), normal(2, channels), normal(3, *x.shape)
    module = nn.GroupNorm(groups, epsilon=1e-5)

    def theirs(x, scale, bias):
        return module.apply({"params": {"scale": scale, "bias": bias}}, x)

    ours = lambda x, scale, bias: layers.group_norm(x, scale, bias, groups, eps=1e-5)
    both = lambda f: lambda *args: (f(*args), *jax.vjp(f, *args)[1](g))
    pairs = jax.jit(lambda *args: tuple(zip(both(ours)(*args), both(theirs)(*args), strict=True)))
    for a, b in pairs(x, scale, bias):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_group_norm_film_is_a_second_affine_map(x64):
    x, scale, bias = normal(0, 2, 3, 3, 4), 1 + normal(1, 4), normal(2, 4)
    film = normal(3, 2, 4), normal(4, 2, 4)
    plain = layers.group_norm(x, scale, bias, 2)
    expected = plain * (1 + film[0][:, None, None]) + film[1][:, None, None]
    got = layers.group_norm(x, scale, bias, 2, film=film)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_norms_of_bfloat16_run_in_float32():
    """Moments of 4096 values near 100 are off by percents when they are summed in bfloat16."""
    x = (100 + normal(0, 1, 64, 64, 4)).astype(jnp.bfloat16)
    one, zero = jnp.ones(4), jnp.zeros(4)
    got = layers.group_norm(x, one, zero, 1).astype(jnp.float32)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean()) / wide.std()
    np.testing.assert_allclose(got, expected, atol=0.02)
    assert layers.layer_norm(x).dtype == layers.group_norm(x, one, zero, 1).dtype == jnp.bfloat16


def test_constant_image_has_finite_gradients():
    f = lambda x: layers.group_norm(x, jnp.ones(4), jnp.zeros(4), 2).sum()
    assert bool(jnp.isfinite(jax.grad(f)(jnp.ones((1, 3, 3, 4)))).all())


def test_layer_norm_is_flax_layer_norm(x64):
    x = 2 * normal(0, 3, 7) + 1
    module = nn.LayerNorm(use_scale=False, use_bias=False, epsilon=1e-6)
    np.testing.assert_allclose(layers.layer_norm(x), module.apply({}, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_attention_is_flax_attention(x64, platform, monkeypatch):
    choose = lambda *args, **branches: branches[platform](*args)
    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    q, k, v = (normal(i, 2, 5, 6) for i in range(3))
    heads = lambda a: a.reshape(2, 5, 3, 2)
    expected = nn.dot_product_attention(heads(q), heads(k), heads(v)).reshape(2, 5, 6)
    np.testing.assert_allclose(layers.attend(q, k, v, 3), expected, rtol=1e-9, atol=1e-9)


def test_dropout_drops_at_its_rate_and_keeps_the_mean():
    x = jnp.ones((4, 5000))
    keys = jax.random.split(jax.random.key(0), 4)
    y = layers.dropout(x, 0.3, keys, 0)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1) / np.float32(0.7)}
    assert float((y == 0).mean()) == pytest.approx(0.3, abs=0.02)  # 6 standard deviations
    assert bool(jnp.any(layers.dropout(x, 0.3, keys, 1) != y))
    np.testing.assert_array_equal(layers.dropout(x, 0.3, None, 0), x)


def test_resampling():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    down = _resample(x, "down")[0, :, :, 0]
    np.testing.assert_array_equal(down, [[2.5, 4.5], [10.5, 12.5]])
    up = _resample(down[None, :, :, None], "up")[0, :, :, 0]
    np.testing.assert_array_equal(up, np.kron(down, np.ones((2, 2))))


def test_positions_are_distinct_and_rows_then_columns():
    table = positions(3, 5, 16)
    assert table.shape == (15, 16)
    distance = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert distance[~np.eye(15, dtype=bool)].min() > 0.5
    same_row = table.reshape(3, 5, 16)[:, :, :8]
    np.testing.assert_array_equal(same_row, same_row[:, :1].repeat(5, axis=1))


@pytest.mark.parametrize("size", [(28, 28), (9, 7), (1, 3)])
def test_unet_pads_and_crops_odd_sizes(size):
    net = networks.make(
        "unet", data_shape=(*size, 1), channels=4, channel_mult=(1, 1, 1), attention=()
    )
    shape = (2, *size, 1)
    params = jax.eval_shape(net.init, jax.random.key(0))
    out = jax.eval_shape(net.apply, params, jax.ShapeDtypeStruct(shape, jnp.float32), 0.0)
    assert out.shape == shape


def test_unet_attends_where_asked():
    make = lambda **c: networks.make("unet", data_shape=(8, 8, 1), channels=8, **c)
    paths = lambda net: {
        jax.tree_util.keystr(path[:1], simple=True)
        for path, _ in jax.tree_util.tree_leaves_with_path(
            jax.eval_shape(net.init, jax.random.key(0))
        )
        if "qkv" in jax.tree_util.keystr(path)
    }
    assert paths(make(attention=())) == set()
    assert paths(make()) == {"encoder_1_0", "middle_0", "decoder_1_1"}
    assert paths(make(attention=(8,))) == {"encoder_0_0", "decoder_0_1"}


def test_unet_pads_symmetrically():
    """Mirroring an image and the kernels mirrors the output, so no side is favoured."""
    net = networks.make(
        "unet", data_shape=(2, 2, 1), channels=4, channel_mult=(1, 1, 1), attention=()
    )
    params = net.init(jax.random.key(0))
    params["out"]["zero_kernel"] = normal(3, 3, 3, 4, 1)
    flip = lambda path, a: a[:, ::-1] if a.ndim == 4 else a
    mirrored = jax.tree_util.tree_map_with_path(flip, params)
    x = normal(1, 2, 2, 2, 1)
    apply = jax.jit(net.apply)
    a, b = apply(params, x, 0.1), apply(mirrored, x[:, :, ::-1], 0.1)
    np.testing.assert_allclose(a[:, :, ::-1], b, atol=2e-5)
    assert float(jnp.abs(a - b).max()) > 1e-2


# --- layers of the released U-Nets ---------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("size", [(4, 6), (2, 8)])
def test_down_conv_is_a_strided_convolution(before, size):
    x, params = normal(0, 2, *size, 3), {"kernel": normal(1, 3, 3, 3, 5), "bias": normal(2, 5)}
    got = layers.DownConv(5, before).apply({"params": params}, x)
    padding = ((before, 1), (before, 1))
    dimensions = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        x, params["kernel"], (2, 2), padding, dimension_numbers=dimensions
    )
    assert got.shape == (2, size[0] // 2, size[1] // 2, 5)
    np.testing.assert_allclose(got, expected + params["bias"][None, None, None], atol=1e-5)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 5, 4, 2, 3)])
def test_resampling_is_a_filter_and_its_transpose(taps):
    x = normal(0, 2, 6, 8, 3)
    weights = np.outer(taps, taps) / sum(taps) ** 2
    kernel = np.broadcast_to(weights[:, :, None, None], (*weights.shape, 1, 3)).astype(np.float32)
    pad = (len(taps) - 1) // 2
    filtered = lambda y: jax.lax.conv_general_dilated(
        y,
        kernel,
        (2, 2),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    small, pull = jax.vjp(filtered, x)
    np.testing.assert_allclose(layers.downsample(x, taps), small, atol=1e-6)
    np.testing.assert_allclose(layers.upsample(small, taps), 4 * pull(small)[0], atol=1e-5)


def test_plain_resampling_averages_and_repeats():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(layers.downsample(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    once = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
    np.testing.assert_array_equal(layers.upsample(x), once)


def test_number_of_groups_can_be_set():
    x, params = 2 + normal(0, 2, 3, 3, 6), {"scale": jnp.ones(6), "bias": jnp.zeros(6)}
    got = layers.GroupNorm(1e-6, 3).apply({"params": params}, x)
    grouped = np.asarray(got).reshape(2, 9, 3, 2)
    np.testing.assert_allclose(grouped.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(grouped.std((1, 3)), 1, atol=1e-4)
