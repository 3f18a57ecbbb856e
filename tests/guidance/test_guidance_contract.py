"""What every guided sampler owes: the same examples however they are mapped, and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lowdim_diffusion import distributions, guidance, sampling, schedules, sharding, solvers

VP = schedules.VPLinear()
TS = np.array([1.0, 0.7, 0.4, 0.2, 0.0])
DIM, BATCH = 6, 8
OPERATOR = guidance.inpainting(jnp.arange(DIM) < 3)

rng = np.random.default_rng(0)
PRIOR = distributions.Gaussian(rng.normal(size=DIM), rng.normal(size=(DIM, 2)), 0.1)
OTHER = distributions.Gaussian(rng.normal(size=DIM), rng.normal(size=(DIM, 2)), 0.3)
CENTERS = rng.normal(size=(3, DIM))


def prior(x, t):
    return PRIOR.denoiser(VP)(x, t)


def other(x, t):
    return OTHER.denoiser(VP)(x, t)


def labelled(x, t, label):
    return prior(x, t) + jnp.asarray(CENTERS, x.dtype)[label]


def pulled(x):
    return -jnp.sum((x - 1) ** 2, axis=-1)


VALUE = guidance.posterior_mean_value(prior, pulled)

# Each of y: [b, 3] and labels: [b]; a denoiser, a hook and a solver, where it is not DDIM.
METHODS = {
    "classifier_free": lambda y, label: (
        guidance.classifier_free(lambda x, t: labelled(x, t, label), prior, 2.0),
    ),
    "rescaled in an interval": lambda y, label: (
        guidance.classifier_free(prior, other, 2.0, rescale=0.5, schedule=VP, interval=(0.1, 5.0)),
    ),
    "classifier_free_batched": lambda y, label: (
        lambda x, t: guidance.classifier_free_batched(labelled, 2, 2.0)(x, t, label),
    ),
    "guided_by_terms": lambda y, label: (
        guidance.guided_by_terms(
            prior, guidance.linear_terms(PRIOR, OTHER, VP), mean_shift=0.5, positive=0.1 * y[:, 0]
        ),
    ),
    "local terms": lambda y, label: (
        guidance.guided_by_terms(
            prior,
            guidance.local_terms(prior, other, VP, PRIOR.mean, OTHER.mean),
            negative=0.5,
            rest=1.0,
        ),
    ),
    "autoguidance": lambda y, label: (guidance.autoguidance(prior, other, 1.5),),
    "compose": lambda y, label: (guidance.compose(prior, [other], [0.5]),),
    "classifier": lambda y, label: (guidance.classifier(prior, lambda x, t: pulled(x), VP, 0.1),),
    "reward": lambda y, label: (guidance.reward(prior, pulled, VP, 0.1),),
    "mmps": lambda y, label: (guidance.mmps(prior, VP, OPERATOR, y, noise_std=0.1, num_iters=3),),
    "dps": lambda y, label: (prior, guidance.dps(prior, VP, OPERATOR, y, step=0.1)),
    "pigdm": lambda y, label: (prior, guidance.pigdm(prior, VP, OPERATOR, y, noise_std=0.1)),
    "ddnm": lambda y, label: (prior, guidance.ddnm(VP, OPERATOR, y, noise_std=0.1)),
    "dds": lambda y, label: (prior, guidance.dds(OPERATOR, y, num_iters=5)),
    "replacement": lambda y, label: (prior, guidance.replacement(VP, OPERATOR, y)),
    "repeated": lambda y, label: (
        prior,
        guidance.ddnm(VP, OPERATOR, y),
        guidance.repeated(solvers.ancestral(), 2),
    ),
    "resample": lambda y, label: (
        prior,
        guidance.ddnm(VP, OPERATOR, y, noise_std=0.1),
        guidance.resample(),
    ),
    "svdd": lambda y, label: (
        prior,
        None,
        guidance.svdd(solvers.ancestral(), VALUE, num_proposals=3),
    ),
}


def program(method):
    """``(x_T, y, label, index) -> samples``."""

    def run(x_T, y, label, index):
        made = METHODS[method](y, label)
        denoise_fn, correct, solver = (*made, *(None, solvers.ddim())[len(made) - 1 :])[:3]
        keys = sharding.example_keys(jax.random.key(1), index)
        return sampling.sample(
            jax.random.key(0),
            denoise_fn,
            VP,
            TS,
            x_T,
            solver=solver or solvers.ddim(),
            correct=correct,
            correct_carry=keys if method == "replacement" else None,
            index=index,
        ).x

    return run


def inputs(dtype=jnp.float32):
    draw = np.random.default_rng(1)
    x_T, y = draw.normal(size=(BATCH, DIM)), draw.normal(size=(BATCH, 3))
    return jnp.asarray(x_T, dtype), jnp.asarray(y, dtype), jnp.arange(BATCH) % 3, jnp.arange(BATCH)


QUICK = ("classifier_free", "replacement")
EACH = [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]


@pytest.mark.parametrize("method", EACH)
def test_examples_do_not_depend_on_how_they_are_mapped(method):
    run, args = program(method), inputs()
    traces = []
    counted = jax.jit(lambda *args: traces.append(1) or run(*args))
    whole = counted(*args)
    counted(*(2 * a if a.dtype == jnp.float32 else a for a in args))
    assert len(traces) == 1
    assert whole.shape == args[0].shape and np.all(np.isfinite(whole))
    close = functools.partial(np.testing.assert_allclose, desired=whole, rtol=2e-4, atol=2e-4)

    halves = jax.tree.map(lambda a: a.reshape(2, BATCH // 2, *a.shape[1:]), args)
    close(jax.vmap(run)(*halves).reshape(whole.shape))
    close(jax.pmap(run)(*halves).reshape(whole.shape))
    split = PartitionSpec(sharding.AXIS)
    mapped = jax.shard_map(
        run, mesh=sharding.data_mesh(4), in_specs=split, out_specs=split, check_vma=False
    )
    close(jax.jit(mapped)(*args))
    close(jax.jit(run)(*sharding.shard_batch(args, sharding.data_mesh(4))))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_gradients_through_a_guided_run(method, x64):
    run, (x_T, *rest) = program(method), inputs(jnp.float64)
    loss = jax.jit(lambda x: jnp.sum(jnp.sin(run(x, *rest))))
    step = 1e-4 * jnp.asarray(np.random.default_rng(2).normal(size=x_T.shape))
    slope = jnp.sum(jax.grad(loss)(x_T) * step)
    numeric = (loss(x_T + step) - loss(x_T - step)) / 2
    np.testing.assert_allclose(slope, numeric, rtol=1e-4, atol=1e-13)
    assert abs(slope) > 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_float32_follows_float64(method, x64):
    half = program(method)(*inputs(jnp.float32))
    assert half.dtype == jnp.float32
    if method in ("replacement", "repeated", "resample", "svdd"):
        return  # their draws differ with the type
    np.testing.assert_allclose(half, program(method)(*inputs(jnp.float64)), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_blocks_carry_their_own_measurements(key):
    """Measurements, keys and indices of each block, on one device and on two."""
    x_T, y, _, index = inputs()
    whole = program("replacement")(x_T, y, None, index)
    hook = lambda x0, eps, t, carry, y: guidance.replacement(VP, OPERATOR, y)(x0, eps, t, carry)
    run = functools.partial(
        sampling.sample_batched,
        jax.random.key(0),
        lambda x, t, y: prior(x, t),
        VP,
        TS,
        x_T,
        solver=solvers.ddim(),
        correct=hook,
        correct_carry=lambda index: sharding.example_keys(jax.random.key(1), index),
        cond=y,
    )
    np.testing.assert_allclose(run(batch_size=3).x, whole, rtol=1e-4, atol=1e-4)
    split = run(batch_size=4, mesh=sharding.data_mesh(2), remat=True).x
    np.testing.assert_allclose(split, whole, rtol=1e-4, atol=1e-4)
