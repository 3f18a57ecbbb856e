"""One encoder, a decoder per interval: against the same decoders run alone, on every example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_solver import ALL

from lowdim_diffusion import denoisers, networks, sampling, schedules
from lowdim_diffusion.training import throughput

BOUNDS = (0.5, 2.0)
CONFIGS = {
    "multistage_mlp": (dict(data_shape=(6,), width=16, depth=1), "decoder_widths", (24, 16, 8)),
    "multistage_unet": (
        dict(data_shape=(4, 4, 1), channels=4, channel_mult=(1,), attention=()),
        "decoder_channels",
        (8, 4, 4),
    ),
}
BATCH = 32  # four blocks
BOTH = pytest.mark.parametrize(
    "name", ["multistage_mlp", pytest.param("multistage_unet", marks=pytest.mark.slow)]
)


@functools.cache
def build(name):
    config, option, widths = CONFIGS[name]
    net = networks.make(name, **config, bounds=BOUNDS, **{option: widths})
    draw = np.random.default_rng(0)
    move = lambda a: a + 0.2 * draw.normal(size=a.shape).astype(np.float32)
    return net, jax.tree.map(move, net.init(jax.random.key(0)))


@functools.cache
def alone(name):
    """Networks of one stage, ``(params, x, c_noise, s)``: encoder and decoder s on everything."""
    config, option, widths = CONFIGS[name]
    nets = [networks.make(name, **config, bounds=(), **{option: (width,)}) for width in widths]

    def apply(params, x, c_noise, s):
        own = {"encoder": params["encoder"], "stage_0": params[f"stage_{s}"]}
        return nets[s].apply(own, x, c_noise)

    return apply


def inputs(net, seed=1):
    """Examples in no order, at levels on, below and above the bounds."""
    draw = np.random.default_rng(seed)
    edges = np.log(np.float32(BOUNDS)) / np.float32(4)
    edges = np.concatenate([edges, np.nextafter(edges, -1), np.nextafter(edges, 1)])
    c_noise = np.concatenate([edges, draw.uniform(-0.5, 0.5, BATCH - len(edges))])
    c_noise = draw.permutation(c_noise.astype(np.float32))
    stage = (c_noise >= edges[0]).astype(int) + (c_noise >= edges[1])
    x = draw.normal(size=(BATCH, *net.data_shape)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(c_noise), stage


def close(a, b, tolerance=2e-5):
    jax.tree.map(
        lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b
    )


@BOTH
def test_values_and_gradients_are_those_of_the_dense_formulation(name):
    """Every decoder on every example and then a choice, which is what routing saves."""
    net, params = build(name)
    x, c_noise, stage = inputs(net)
    order = np.argsort(stage, kind="stable")
    sizes = tuple(np.bincount(stage).tolist())
    u = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    def dense(p):
        outs = jnp.stack([alone(name)(p, x, c_noise, s) for s in range(3)])
        return outs[stage, jnp.arange(BATCH)]

    routed = lambda p: net.apply(p, x, c_noise)
    grouped = lambda p: net.apply(p, x[order], c_noise[order], sizes=sizes)[np.argsort(order)]

    @jax.jit
    def run(p):
        both = lambda fn: jax.value_and_grad(lambda p: (jnp.sum(u * fn(p)), fn(p)), has_aux=True)(p)
        return [both(fn) for fn in (routed, grouped, dense)]

    with_routing, with_sizes, expected = run(params)
    close(with_routing, expected, 1e-4)
    close(with_sizes, expected, 1e-4)


@pytest.mark.slow
def test_other_decoders_neither_run_nor_learn_and_encoder_gradients_sum():
    net, params = build("multistage_mlp")
    x, c_noise, stage = inputs(net)
    broken = lambda s: {
        name: part
        if name in ("encoder", f"stage_{s}")
        else jax.tree.map(lambda a: a + np.nan, part)
        for name, part in params.items()
    }
    loss = lambda p, x, c_noise, w: jnp.sum(w[:, None] * net.apply(p, x, c_noise) ** 2)
    slopes = jax.jit(jax.grad(loss))
    levels = (-0.4, 0.0, 0.4)
    for s in range(3):  # the whole batch at one level, as in sampling: NaNs are never touched
        found = slopes(broken(s), x, jnp.full(BATCH, levels[s]), jnp.ones(BATCH))
        for name, part in found.items():
            leaves = jax.tree.leaves(part)
            assert all(np.isfinite(leaf).all() for leaf in leaves), (s, name)
            idle = name.startswith("stage") and name != f"stage_{s}"
            assert all((leaf == 0).all() for leaf in leaves) == idle, (s, name)
    of_stage = [slopes(params, x, c_noise, jnp.asarray(stage == s, jnp.float32)) for s in range(3)]
    whole = slopes(params, x, c_noise, jnp.ones(BATCH))
    close(whole["encoder"], jax.tree.map(lambda *parts: sum(parts), *of_stage)["encoder"], 1e-4)
    for s in range(3):
        close(whole[f"stage_{s}"], of_stage[s][f"stage_{s}"], 1e-4)


@BOTH
def test_cost_of_a_step_is_the_mean_over_the_stages(name):
    net, params = build(name)
    x, c_noise, _ = inputs(net)

    def flops(*sizes):
        loss = lambda p: jnp.sum(net.apply(p, x, c_noise, sizes=sizes) ** 2)
        return sum(throughput.count_flops(jax.make_jaxpr(jax.grad(loss))(params)).values())

    single = [flops(BATCH, 0, 0), flops(0, BATCH, 0), flops(0, 0, BATCH)]
    assert single[0] > 1.1 * single[1]
    mean = (8 * single[0] + 16 * single[1] + 8 * single[2]) / BATCH
    assert flops(8, 16, 8) == mean


def test_blocks_choose_their_decoders_at_run_time():
    """Eight blocks, each with a condition per decoder and no arithmetic outside of them."""
    net, params = build("multistage_mlp")
    jaxpr = jax.make_jaxpr(lambda c: net.apply(params, jnp.ones((64, 6)), c))(jnp.zeros(64))
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert [eqn.params["length"] for eqn in scans] == [8]
    inner = [eqn.primitive.name for eqn in scans[0].params["jaxpr"].eqns]
    assert inner.count("cond") == 3 and "dot_general" not in inner


@pytest.mark.slow
@pytest.mark.parametrize("solver", ALL)
def test_samples_with_every_solver(solver):
    """With the same decoder at every stage it is the network of one stage."""
    config, option, _ = CONFIGS["multistage_mlp"]
    make = lambda bounds: networks.make(
        "multistage_mlp", **config, bounds=bounds, **{option: (16,) * (len(bounds) + 1)}
    )
    one, three = make(()), make(BOUNDS)
    _, params = build("multistage_mlp")
    single = {"encoder": params["encoder"], "stage_0": params["stage_1"]}
    same = {"encoder": params["encoder"]} | {f"stage_{s}": params["stage_1"] for s in range(3)}
    schedule, ts = schedules.VE(), schedules.karras_grid(4, 0.1, 5.0)

    @jax.jit
    def draw(key):
        run = lambda net, p: sampling.sample(
            *(key, denoisers.from_network(net, p, schedule), schedule, ts, (16, 6)),
            solver=ALL[solver],
        )
        return run(one, single).x, run(three, same).x

    expected, found = draw(jax.random.key(3))
    close(found, expected, 1e-4)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (dict(bounds=(2.0, 0.5)), "multistage_mlp: bounds out of order"),
        (dict(bounds=(0.0, 0.5)), "bounds entry out of range"),
        (dict(bounds=(1.0,)), "wrong number of decoder_widths: expected 2 for 1 bounds, got 3"),
        (dict(decoder_widths=(8, 0, 8)), "decoder_widths entry too small"),
        (dict(decoder_depth=0), "decoder_depth too small"),
    ],
)
def test_bad_config(config, match):
    with pytest.raises(ValueError, match=match):
        networks.make("multistage_mlp", **dict(data_shape=(6,)) | config)


def test_bad_channels_of_a_decoder():
    with pytest.raises(ValueError, match="num_heads does not divide the channels"):
        networks.make(
            "multistage_unet", data_shape=(4, 4, 1), num_heads=4, decoder_channels=(8, 5, 8)
        )


@pytest.mark.parametrize("sizes", [(8, 8), (8, 8, 8), (40, -8, 0)])
def test_bad_sizes(sizes):
    net, params = build("multistage_mlp")
    x, c_noise, _ = inputs(net)
    with pytest.raises(ValueError, match="wrong sizes: expected 3 numbers of examples with sum 32"):
        net.apply(params, x, c_noise, sizes=sizes)
