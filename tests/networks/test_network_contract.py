"""One battery over every network: the promises of ``Network.apply`` and ``Network.init``."""

import collections
import functools

import chex
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import networks

CONFIGS = {
    "linear": dict(data_shape=(4, 4, 3)),
    "lowrank": dict(data_shape=(4, 4, 3), num_components=2, rank=3),
    "lowrank-hard": dict(data_shape=(12,), num_components=2, rank=3, assignment="hard"),
    "mlp": dict(data_shape=(10,), width=16, depth=2, dropout=0.5, num_classes=3),
    "unet": dict(data_shape=(4, 3, 2), channels=4, channel_mult=(1,), dropout=0.5, num_classes=3),
    "dit": dict(
        data_shape=(4, 4, 2),
        patch_size=2,
        width=16,
        depth=1,
        num_heads=2,
        dropout=0.5,
        num_classes=3,
    ),
    "diffusers_unet": dict(
        data_shape=(4, 4, 2),
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        dropout=0.5,
        num_classes=3,
    ),
    "song_unet": dict(
        data_shape=(4, 4, 2),
        channels=4,
        channel_mult=(1,),
        num_blocks=1,
        attention=(),
        dropout=0.5,
        num_classes=3,
    ),
    "multistage_mlp": dict(
        data_shape=(10,),
        width=16,
        depth=1,
        bounds=(0.5,),
        decoder_widths=(8, 12),
        dropout=0.5,
        num_classes=3,
    ),
    "multistage_unet": dict(
        data_shape=(4, 3, 2),
        channels=4,
        channel_mult=(1,),
        bounds=(0.5,),
        decoder_channels=(8, 4),
        dropout=0.5,
        num_classes=3,
    ),
}
# Their quick tests are in test_pretrained.py and test_multistage.py.
ELSEWHERE = ("diffusers_unet", "song_unet", "multistage_unet")
IMAGES = ("unet", "dit", *ELSEWHERE)


def slow(names, which):
    return [n if n not in which else pytest.param(n, marks=pytest.mark.slow) for n in names]


EVERY = pytest.mark.parametrize("name", slow(CONFIGS, ELSEWHERE))
SLOW_FOR_IMAGES = pytest.mark.parametrize("name", slow(CONFIGS, IMAGES))
TRAINED = pytest.mark.parametrize("name", slow(["mlp", "multistage_mlp", *IMAGES], ELSEWHERE))
BATCH = 3


@functools.cache
def build(name):
    """A network and parameters of a trained look: no zeros left."""
    net = networks.make(name.split("-")[0], **CONFIGS[name])
    draw = np.random.default_rng(0)
    move = lambda a: a + 0.2 * draw.normal(size=a.shape).astype(np.float32)
    return net, jax.tree.map(move, net.init(jax.random.key(0)))


def inputs(net, batch=BATCH, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(2), (batch, *net.data_shape), dtype)
    return x, jnp.linspace(-0.5, 0.3, batch, dtype=dtype)


def labels(net):
    return jnp.array([0, 2, 1]) if net.num_classes else None


def close(a, b, tolerance=2e-5):
    jax.tree.map(
        lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b
    )


TRACES = collections.Counter()


@functools.cache
def jitted(name):
    """The compiled network; all tests call it in three forms: labels, labels and keys, neither."""
    net, _ = build(name)

    def apply(params, x, c_noise, cond=None, dropout_keys=None):
        TRACES[name, x.shape, cond is None, dropout_keys is None] += 1
        return net.apply(params, x, c_noise, cond, dropout_keys=dropout_keys)

    return jax.jit(apply)


@EVERY
def test_config_makes_the_same_network_again(name):
    net, _ = build(name)
    again = networks.make(net.name, **net.config)
    assert again.config == net.config
    key = jax.random.key(5)
    chex.assert_trees_all_equal(net.init(key), again.init(key))
    assert net.num_params == sum(a.size for a in jax.tree.leaves(net.init(key)))


@EVERY
def test_params_are_a_plain_float32_tree_that_depends_on_the_key(name):
    net, _ = build(name)
    params = net.init(jax.random.key(0))
    assert type(params) is dict
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    abstract = jax.eval_shape(net.init, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract)
    if name != "linear":  # which starts at zero
        other = net.init(jax.random.key(1))
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True)
        assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in pairs)


@EVERY
def test_init_under_jit_and_vmap(name):
    net, _ = build(name)
    keys = jax.random.split(jax.random.key(3), 2)
    many = jax.jit(jax.vmap(net.init))(keys)
    close(jax.tree.map(lambda a: np.asarray(a)[1], many), net.init(keys[1]), 1e-6)


@EVERY
def test_shape_and_dtype(name):
    net, params = build(name)
    x, c_noise = inputs(net)
    out = jitted(name)(params, x, c_noise, labels(net))
    chex.assert_shape(out, x.shape)
    assert out.dtype == jnp.float32
    chex.assert_tree_all_finite(out)
    abstract = jax.eval_shape(net.apply, params, x, c_noise, labels(net))
    assert (abstract.shape, abstract.dtype) == (out.shape, out.dtype)
    small = jax.eval_shape(net.apply, params, x.astype(jnp.bfloat16), c_noise)
    assert small.dtype == jnp.float32


@SLOW_FOR_IMAGES
def test_jit_changes_nothing(name):
    net, params = build(name)
    x, c_noise = inputs(net)
    with jax.disable_jit():
        plain = net.apply(params, x, c_noise, labels(net))
    close(plain, jitted(name)(params, x, c_noise, labels(net)))


@EVERY
def test_one_trace_for_equal_shapes(name):
    net, params = build(name)
    x, c_noise = inputs(net)
    for scale in (1.0, 2.0):
        jitted(name)(params, scale * x, scale * c_noise, labels(net))
    assert TRACES[name, x.shape, not net.num_classes, True] == 1


@pytest.mark.parametrize("name", ["linear", "lowrank", "mlp"])
def test_scalar_noise_level_is_one_for_all(name):
    net, params = build(name)
    x, _ = inputs(net)
    close(net.apply(params, x, -0.2), net.apply(params, x, jnp.full(BATCH, -0.2)), 1e-6)


@EVERY
def test_each_example_alone(name):
    """An output depends on its own example, noise level, label and key, not on its neighbours."""
    net, params = build(name)
    x, c_noise = inputs(net)
    cond = labels(net)
    keys = jax.random.split(jax.random.key(4), BATCH)
    apply = jitted(name)
    out = apply(params, x, c_noise, cond, keys)
    pick = jnp.array([1, 2, 2])
    moved = apply(params, x[pick], c_noise[pick], None if cond is None else cond[pick], keys[pick])
    close(moved, out[pick], 1e-6)


@pytest.mark.parametrize("name", ["lowrank", "mlp", "dit"])
def test_batch_size_changes_nothing(name):
    net, params = build(name)
    x, c_noise = inputs(net)
    one_by_one = [jitted(name)(params, x[i : i + 1], c_noise[i : i + 1]) for i in range(BATCH)]
    close(jnp.concatenate(one_by_one), jitted(name)(params, x, c_noise))


@EVERY
def test_vmap_over_networks(name):
    net, params = build(name)
    x, c_noise = inputs(net)
    two = jax.tree.map(lambda a: np.stack([a, 1.1 * a]), params)
    many = jax.jit(jax.vmap(lambda p: net.apply(p, x, c_noise, labels(net))))(two)
    close(many[0], jitted(name)(params, x, c_noise, labels(net)))
    other = jax.tree.map(lambda a: a[1], two)
    close(many[1], jitted(name)(other, x, c_noise, labels(net)), 1e-4)


@EVERY
def test_gradients_are_finite_and_reach_every_parameter(name):
    net, params = build(name)
    x, c_noise = inputs(net)
    cond = labels(net)
    loss = lambda p: jnp.mean(net.apply(p, x, c_noise, cond) ** 2)
    grads = jax.jit(jax.grad(loss))(params)
    chex.assert_tree_all_finite(grads)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.any(np.asarray(leaf) != 0), path


@EVERY
def test_jvp_and_vjp_are_transposes_and_batch(name):
    """``<u, J v> == <J^T u, v>`` for a block of vectors, as the Jacobian tools use them."""
    net, params = build(name)
    x, c_noise = inputs(net)
    fn = lambda y: net.apply(params, y, c_noise, labels(net))
    v, u = jnp.asarray(np.random.default_rng(3).normal(size=(2, 2, *x.shape)), jnp.float32)

    @jax.jit
    def products(x, u, v):
        push = lambda t: jax.jvp(fn, (x,), (t,))[1]
        pull = lambda t: jax.vjp(fn, x)[1](t)[0]
        return jax.vmap(push)(v), jax.vmap(pull)(u)

    jv, jtu = products(x, u, v)
    inner = lambda a, b: jnp.sum(a * b, tuple(range(1, a.ndim)))
    close(inner(u, jv), inner(jtu, v), 1e-3)
    moved = lambda step: jitted(name)(params, x + step * v[0], c_noise, labels(net))
    close(jv[0], (moved(1e-2) - moved(-1e-2)) / 2e-2, 2e-2)


@SLOW_FOR_IMAGES
def test_float64(name, x64):
    net, params = build(name)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
    x, c_noise = inputs(net, dtype=jnp.float64)
    wide = jax.jit(net.apply)(params, x, c_noise, labels(net))
    assert wide.dtype == jnp.float64
    single = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x, c_noise))
    close(wide, jitted(name)(*single, labels(net)), 1e-3)


@EVERY
def test_sigma_zero_is_finite(name):
    net, params = build(name)
    x, _ = inputs(net)
    clean = jnp.full(BATCH, jnp.log(0.0) / 4)
    chex.assert_tree_all_finite(jitted(name)(params, x, clean, labels(net)))


@pytest.mark.parametrize("name", slow(["linear", "mlp", "multistage_mlp", *IMAGES], ELSEWHERE))
def test_output_starts_at_zero(name):
    net, _ = build(name)
    x, c_noise = inputs(net)
    out = jitted(name)(net.init(jax.random.key(0)), x, c_noise, labels(net))
    np.testing.assert_array_equal(out, 0)


@TRAINED
def test_labels(name):
    net, params = build(name)
    x, c_noise = inputs(net)
    apply = lambda cond: jitted(name)(params, x, c_noise, cond)
    a, b = apply(jnp.array([0, 2, 1])), apply(jnp.array([0, 1, 1]))
    close(a[jnp.array([0, 2])], b[jnp.array([0, 2])])
    assert float(jnp.abs(a[1] - b[1]).max()) > 1e-3
    close(apply(jnp.full(BATCH, net.num_classes)), apply(None), 1e-6)
    assert float(jnp.abs(a - apply(None)).max()) > 1e-3


@TRAINED
def test_noise_level_matters(name):
    net, params = build(name)
    x, _ = inputs(net)
    apply = lambda c: jitted(name)(params, x, jnp.full(BATCH, c), labels(net))
    a, b = apply(-0.5), apply(0.5)
    assert float(jnp.abs(a - b).max()) > 1e-3


@TRAINED
def test_dropout(name):
    net, params = build(name)
    x, c_noise = inputs(net)
    key, other = jax.random.split(jax.random.key(8))
    apply = lambda keys: jitted(name)(params, x, c_noise, labels(net), keys)
    keys = jax.random.split(key, BATCH)
    a = apply(keys)
    np.testing.assert_array_equal(a, apply(keys))
    b = apply(keys.at[0].set(other))
    assert float(jnp.abs(a[0] - b[0]).max()) > 1e-3
    np.testing.assert_array_equal(a[1:], b[1:])
    without = jitted(name)(params, x, c_noise, labels(net))
    assert float(jnp.abs(a - without).max()) > 1e-3


@TRAINED
def test_bfloat16_computes_near_float32(name):
    net, params = build(name)
    config = {**net.config, "dtype": "bfloat16"}
    narrow = networks.make(net.name, **config)
    abstract = jax.eval_shape(narrow.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}
    x, c_noise = inputs(net)
    out = jax.jit(narrow.apply)(params, x, c_noise, labels(net))
    assert out.dtype == jnp.float32
    expected = jitted(name)(params, x, c_noise, labels(net))
    error = jnp.sqrt(jnp.mean((out - expected) ** 2) / jnp.mean(expected**2))
    assert 1e-5 < float(error) < 0.05


def test_init_compiles_a_handful_of_programs():
    """Not one per leaf: a U-Net has a hundred leaves."""
    net = networks.make("unet", data_shape=(8, 8, 1), channels=24)
    key = jax.random.key(0)
    events = []
    listen = lambda name, secs, **_: events.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        net.init(key)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert 1 <= len(events) <= 3


def test_leaf_starts_the_same_whatever_else_the_network_has():
    key = jax.random.key(0)
    small = networks.make("mlp", data_shape=(6,), width=16, depth=1).init(key)
    large = networks.make("mlp", data_shape=(6,), width=16, depth=3, num_classes=5).init(key)
    chex.assert_trees_all_equal(small["first_0"], large["first_0"])
    assert bool(jnp.any(large["first_0"]["kernel"] != large["first_1"]["kernel"]))


def test_initial_variances():
    params = networks.make("unet", data_shape=(8, 8, 1), channels=32).init(jax.random.key(0))
    kernel = params["encoder_0_0"]["conv_0"]["kernel"]
    assert kernel.shape == (3, 3, 32, 32)
    assert float(kernel.std()) == pytest.approx((9 * 32) ** -0.5, rel=0.05)
    assert float(jnp.abs(params["out"]["zero_kernel"]).max()) == 0
    np.testing.assert_array_equal(params["norm"]["scale"], 1)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (dict(data_shape=(8,)), r"unet: wrong data_shape: expected \(height, width, channels\)"),
        (dict(data_shape=(8, 8, 0)), "data_shape entry too small"),
        (dict(data_shape=(8, 8, 1), chanels=3), r"got 'chanels'; did you mean 'channels'\?"),
        (dict(), "missing data_shape"),
        (dict(data_shape=(8, 8, 1), attention=(5,)), "expected heights among 8, 4, got 5"),
        (dict(data_shape=(8, 8, 1), channel_mult=()), "empty channel_mult"),
        (dict(data_shape=(8, 8, 1), num_heads=3), "divide the channels of level 1"),
        (dict(data_shape=(8, 8, 1), dropout=1.0), "dropout out of range"),
        (dict(data_shape=(8, 8, 1), dtype="float16"), "unknown dtype: expected one of 'float32'"),
        (dict(data_shape=(8, 8, 1), num_classes=-1), "num_classes too small"),
    ],
)
def test_bad_config(config, match):
    with pytest.raises(ValueError, match=match):
        networks.make("unet", **config)


@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        ("unett", {}, r"make: unknown network: .*got 'unett'; did you mean 'unet'\?"),
        ("dit", dict(data_shape=(7, 8, 1)), "patch_size does not divide the image"),
        ("dit", dict(data_shape=(8, 8, 1), width=18), "a multiple of 4 and of num_heads = 4"),
        ("lowrank", dict(data_shape=(4,), rank=5), "rank too large"),
        (
            "lowrank",
            dict(data_shape=(4,), rank=3, num_components=2, joint=True),
            "no room for mutually orthogonal subspaces",
        ),
        (
            "lowrank",
            dict(data_shape=(4,), rank=1, joint=True, orthonormal="none"),
            "joint=True: expected orthonormal frames",
        ),
        ("lowrank", dict(data_shape=(4,), assignment="sof"), "unknown assignment"),
        ("lowrank", dict(data_shape=(4,), cross_std=0.2), "cross_std 0.2: expected joint=True"),
    ],
)
def test_bad_name_or_config(name, config, match):
    with pytest.raises(ValueError, match=match):
        networks.make(name, **config)


def test_bad_calls():
    net, params = build("mlp")
    x, c_noise = inputs(net)
    fails = lambda match, error=ValueError: pytest.raises(error, match=match)
    with fails(r"mlp.apply: wrong shape of x: expected \(any, 10\), got \(3, 9\)"):
        net.apply(params, x[:, :9], c_noise)
    with fails("x must be floating", TypeError):
        net.apply(params, x.astype(int), c_noise)
    with fails(r"wrong shape of c_noise: expected \(\) or \(3,\), got \(2,\)"):
        net.apply(params, x, c_noise[:2])
    with fails(r"cond out of range: expected \[0, 3\].*3 stands for no label"):
        net.apply(params, x, c_noise, jnp.array([0, 1, 4]))
    with fails(r"wrong shape of cond: expected \(3,?\), got \(2,\)"):
        net.apply(params, x, c_noise, jnp.array([0, 1]))
    with fails("cond must be integer", TypeError):
        net.apply(params, x, c_noise, jnp.ones(3))
    with fails("dropout_keys must be typed keys", TypeError):
        net.apply(params, x, c_noise, dropout_keys=jnp.zeros((3, 2), jnp.uint32))
    with fails("wrong shape of dropout_keys"):
        net.apply(params, x, c_noise, dropout_keys=jax.random.key(0))
    with fails("one typed key", TypeError):
        net.init(jnp.zeros(2, jnp.uint32))
    linear, params = build("linear")
    x, c_noise = inputs(linear)
    with fails("unexpected cond: expected None"):
        linear.apply(params, x, c_noise, jnp.array([0, 1, 2]))
    soft, params = build("lowrank")
    with fails("unexpected clean"):
        soft.apply(params, x, c_noise, clean=x)
