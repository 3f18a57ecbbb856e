"""Features inside the networks: each tap against the layers around it, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import denoisers, distributions, linalg, networks, schedules

CONFIGS = {
    "linear": dict(data_shape=(6,)),
    "lowrank": dict(data_shape=(12,), num_components=2, rank=3),
    "mlp": dict(data_shape=(6,), width=16, depth=2, num_classes=3),
    "dit": dict(data_shape=(4, 4, 1), width=16, depth=2, num_heads=2),
    "unet": dict(data_shape=(4, 4, 1), channels=4, channel_mult=(1, 1)),
    "multistage_mlp": dict(
        data_shape=(6,), width=16, depth=1, bounds=(0.5,), decoder_widths=(8, 12)
    ),
    "multistage_unet": dict(
        data_shape=(4, 4, 1),
        channels=4,
        channel_mult=(1,),
        bounds=(0.5,),
        decoder_channels=(8, 4),
    ),
    "song_unet": dict(
        data_shape=(4, 4, 1), channels=4, channel_mult=(1,), num_blocks=1, attention=()
    ),
    "diffusers_unet": dict(
        data_shape=(4, 4, 1),
        block_out_channels=(4,),
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
    ),
}
TAPS = {
    "linear": ("out",),
    "lowrank": ("gated",),
    "mlp": ("hidden_0", "block_0", "hidden_1", "block_1", "last"),
    "dit": ("block_0", "block_1"),
    "unet": (
        *("encoder_0_0", "down_1", "encoder_1_0", "middle_0", "middle_1", "decoder_1_0"),
        *("decoder_1_1", "up_0", "decoder_0_0", "decoder_0_1"),
    ),
    "multistage_mlp": (
        *("hidden_0", "block_0", "stage_0.hidden_1", "stage_0.block_1", "stage_0.last"),
        *("stage_1.hidden_1", "stage_1.block_1", "stage_1.last"),
    ),
    "multistage_unet": (
        *("encoder_0_0", "middle_0", "middle_1", "stage_0.decoder_0_0", "stage_0.decoder_0_1"),
        *("stage_1.decoder_0_0", "stage_1.decoder_0_1"),
    ),
    "song_unet": (
        *("enc.4x4_block0", "dec.4x4_in0", "dec.4x4_in1", "dec.4x4_block0", "dec.4x4_block1"),
    ),
    "diffusers_unet": (
        *("down_blocks.0.resnets.0", "down_blocks.0.attentions.0", "mid_block.resnets.0"),
        *("mid_block.attentions.0", "mid_block.resnets.1"),
        *("up_blocks.0.resnets.0", "up_blocks.0.resnets.1"),
    ),
}
BATCH = 3
CHEAP = ("linear", "lowrank", "mlp")


def build(name):
    net = networks.make(name, **CONFIGS[name])
    draw = np.random.default_rng(0)
    move = lambda a: a + 0.2 * draw.normal(size=a.shape).astype(np.float32)
    x = jnp.asarray(draw.normal(size=(BATCH, *net.data_shape)), jnp.float32)
    return net, jax.tree.map(move, net.init(jax.random.key(0))), x


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes(name):
    net, params, x = build(name)
    assert net.taps == TAPS[name]
    shapes = jax.eval_shape(lambda: net.features(params, x, -0.3, taps=net.taps))
    assert set(shapes) == set(net.taps)  # a tree of jax sorts its keys
    for tap, found in shapes.items():
        assert found.shape[0] == BATCH and found.dtype == jnp.float32, tap
    narrow = jax.eval_shape(lambda: net.features(params, x.astype("bfloat16"), 0, taps=net.taps[0]))
    assert narrow.dtype == jnp.float32


def test_mlp_layers_join_its_taps():
    net, params, x = build("mlp")
    cond = jnp.array([0, 2, 1])
    run = lambda p: (net.features(p, x, -0.3, cond, taps=net.taps), net.apply(p, x, -0.3, cond))
    found, out = jax.tree.map(np.asarray, jax.jit(run)(params))
    second, last = jax.tree.map(np.asarray, (params["second_1"], params["out"]))
    close(
        found["block_1"], found["block_0"] + found["hidden_1"] @ second["kernel"] + second["bias"]
    )
    close(out, found["last"] @ last["zero_kernel"] + last["bias"])


def test_lowrank_gates_as_the_posterior_of_the_mixture():
    net, _, x = build("lowrank")
    bases = linalg.random_frames(jax.random.key(1), 2, 12, 3)
    params, sigma = {"bases": bases}, 0.8

    @jax.jit
    def run(params, x):
        weights = distributions.MoLRG(bases).posterior_weights(x, 1.0, sigma)
        c_noise = jnp.log(sigma) / 4
        return (
            net.features(params, x, c_noise, taps="gated"),
            weights,
            net.apply(params, x, c_noise),
        )

    gated, weights, out = run(params, x)
    inside = np.einsum("knd,bn->bkd", bases, x)
    close(gated, np.asarray(weights)[..., None] * inside / (1 + sigma**2))
    close(np.einsum("knd,bkd->bn", bases, gated), out)


def test_linear_tap_is_its_output():
    net, params, x = build("linear")
    close(
        net.features(params, x, 0.0, taps="out"), x @ params["kernel"] + params["bias"][None], 1e-6
    )


def test_dit_block_is_that_of_a_shallower_network():
    net, params, x = build("dit")
    shallow = networks.make("dit", **CONFIGS["dit"] | {"depth": 1})
    fewer = {name: value for name, value in params.items() if name != "block_1"}
    get = lambda n, p: jax.jit(lambda: n.features(p, x, 0.1, taps="block_0"))()
    close(get(net, params), get(shallow, fewer))


@pytest.mark.parametrize(
    ("name", "tap", "before", "after"),
    [
        ("mlp", "block_0", "second_0", "first_1"),
        ("unet", "middle_0", "encoder_1_0", "middle_1"),
        pytest.param(
            *("song_unet", "dec.4x4_in0", "enc.4x4_block0.conv1", "dec.4x4_in1.conv0"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("diffusers_unet", "mid_block.resnets.0", "down_blocks.0.resnets.0.conv2"),
            "mid_block.resnets.1.conv1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tap_sees_what_comes_before_it_and_nothing_after(name, tap, before, after):
    net, params, x = build(name)
    get = jax.jit(lambda p: net.features(p, x, -0.2, taps=tap))
    moved = lambda part: {**params, part: jax.tree.map(lambda a: a + 0.3, params[part])}
    here = get(params)
    np.testing.assert_array_equal(get(moved(after)), here)
    assert float(jnp.abs(get(moved(before)) - here).max()) > 1e-3


@pytest.mark.parametrize("name", CHEAP)
def test_jit_and_vmap_over_networks(name):
    net, params, x = build(name)
    get = lambda p: net.features(p, x, -0.2, taps=net.taps)
    two = jax.tree.map(lambda a: jnp.stack([a, 1.1 * a]), params)
    many = jax.jit(jax.vmap(get))(two)
    for tap, one in jax.jit(get)(params).items():
        close(many[tap][0], one)


def test_layers_beyond_the_tap_are_cut_away():
    net = networks.make("mlp", data_shape=(32,), width=64, depth=4)
    params, x = net.init(jax.random.key(0)), jnp.ones((4, 32))
    flops = lambda fn: jax.jit(fn).lower(params, x).cost_analysis()["flops"]
    whole = flops(lambda p, x: net.apply(p, x, 0.0))
    first = flops(lambda p, x: net.features(p, x, 0.0, taps="block_0"))
    assert first < 0.4 * whole
    last = flops(lambda p, x: net.features(p, x, 0.0, taps="last"))
    assert 0.9 * whole < last < whole


def test_gradient_flows_through_a_tap():
    net, params, x = build("mlp")
    loss = jax.jit(lambda y: jnp.sum(net.features(params, y, -0.2, taps="hidden_1") ** 2))
    slope = jax.jit(jax.grad(loss))(x)
    step = 1e-2 * jnp.ones_like(x)
    np.testing.assert_allclose(
        (loss(x + step) - loss(x - step)) / 2, jnp.sum(slope * step), rtol=1e-2
    )


@pytest.mark.parametrize(
    ("schedule", "t"),
    [(schedules.VPLinear(), 0.3), (schedules.VE(), 1.3)],
    ids=["vp", "ve"],
)
@pytest.mark.parametrize("name", ["mlp", "lowrank"])
def test_features_of_a_denoiser_see_the_scaled_input(name, schedule, t):
    net, params, x_t = build(name)
    data_std, alpha, sigma = 0.7, schedule.alpha(t), schedule.sigma(t)
    scale = 1 / alpha if name == "lowrank" else (alpha**2 * data_std**2 + sigma**2) ** -0.5
    tap = net.taps[-1]
    direct = lambda x, c_noise: net.features(params, x, c_noise, taps=tap)
    expected = jax.jit(direct)(scale * x_t, jnp.log(sigma / alpha) / 4)

    @jax.jit
    def run(t):
        return denoisers.features(net, params, schedule, x_t, t, taps=tap, data_std=data_std)

    close(run(t), expected, 1e-4)
    close(run(jnp.full(BATCH, t)), expected, 1e-4)


def test_labels_reach_the_features():
    net, params, x = build("mlp")
    schedule = schedules.VE()
    run = lambda cond: denoisers.features(net, params, schedule, x, 0.5, taps="last", cond=cond)
    get = jax.jit(run)
    change = jnp.abs(get(jnp.array([0, 1, 2])) - get(jnp.array([0, 2, 2]))).max(1)
    assert float(change[1]) > 1e-3 and not np.any(np.asarray(change)[[0, 2]])


def test_bad_calls():
    net, params, x = build("mlp")
    known = "hidden_0, block_0, hidden_1, block_1, last"
    match = f"mlp.features: unknown tap: expected one of {known}, got 'blok_0'; .*'block_0'"
    with pytest.raises(ValueError, match=match):
        net.features(params, x, 0.0, taps="blok_0")
    with pytest.raises(ValueError, match="got 'mid'"):
        net.features(params, x, 0.0, taps=["last", "mid"])
    with pytest.raises(ValueError, match=r"mlp.features: wrong shape of x: expected \(any, 6\)"):
        net.features(params, x[:, :5], 0.0, taps="last")
    with pytest.raises(ValueError, match="features: wrong shape of t"):
        denoisers.features(net, params, schedules.VE(), x, jnp.ones(2), taps="last")
    hand = networks.from_nnx(lambda rngs: None, (3,))
    with pytest.raises(ValueError, match="features: unknown tap: expected none, it has no taps"):
        hand.features({}, jnp.ones((1, 3)), 0.0, taps="last")
