"""One battery for every exact distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lowdim_diffusion import schedules
from lowdim_diffusion.distributions import Distribution, Empirical, Gaussian, MoLRG

DIM, BATCH = 12, 4
METHODS = ("log_prob", "posterior_weights", "posterior_mean", "score", "posterior_jacobian")


def _bases(rng):
    return np.linalg.qr(rng.normal(size=(2, DIM, 3)))[0]


def make(name, dtype=np.float32):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(dtype)
    return {
        "gaussian": lambda: Gaussian(normal(DIM), normal(DIM, 3)),
        "gaussian with floor": lambda: Gaussian(normal(DIM), normal(DIM, 3), 0.1),
        "molrg": lambda: MoLRG(_bases(rng).astype(dtype)),
        "molrg with floor": lambda: MoLRG(
            _bases(rng).astype(dtype),
            weights=[0.2, 0.8],
            means=normal(2, DIM),
            scales=np.array([[1, 2, 0], [0.5, 1, 3]], dtype),
            noise_std=0.1,
        ),
        "empirical": lambda: Empirical(normal(9, DIM), block_size=4),
    }[name]()


NAMES = ["gaussian", "gaussian with floor", "molrg", "molrg with floor", "empirical"]
SCHEDULES = [
    schedules.VPLinear(),
    schedules.VPCosine(),
    schedules.VE(),
    schedules.RectifiedFlow(),
]


@pytest.fixture(params=NAMES)
def p(request):
    return make(request.param)


@pytest.fixture(params=["gaussian with floor", "molrg with floor", "empirical"])
def each_class(request):
    return make(request.param)


def inputs(dtype=np.float32, batch=BATCH):
    return np.random.default_rng(1).normal(size=(batch, DIM)).astype(dtype)


def test_score_is_the_gradient_and_tweedie_holds(x64, evaluate):
    x = inputs(np.float64)
    for name in NAMES:
        p = make(name, np.float64)
        gradient = jax.jit(jax.grad(lambda x, a, s: p.log_prob(x, a, s).sum()))  # noqa: B023
        for alpha, sigma in ((1.0, 0.3), (0.5, 0.9)):
            got = evaluate(p, x, alpha, sigma)
            np.testing.assert_allclose(got["score"], gradient(x, alpha, sigma), rtol=1e-9)
            tweedie = (x + sigma**2 * np.asarray(got["score"])) / alpha
            np.testing.assert_allclose(got["posterior_mean"], tweedie, rtol=1e-9, atol=1e-12)


def test_vmap_over_an_extra_axis(each_class, evaluate):
    p, x, sigma = each_class, inputs(), np.array([0.3, 2.0], np.float32)
    stacked = jax.jit(jax.vmap(lambda s: p.posterior_mean(x, 1.0, s)))(sigma)
    for i in range(2):
        expected = evaluate(p, x, 1.0, float(sigma[i]))["posterior_mean"]
        np.testing.assert_allclose(stacked[i], expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["molrg with floor", "empirical"])
def test_eager_equals_jit(evaluate, name):
    p, x = make(name), inputs()
    compiled = evaluate(p, x, 0.8, 0.6)
    np.testing.assert_allclose(
        p.posterior_mean(x, 0.8, 0.6), compiled["posterior_mean"], rtol=1e-4, atol=1e-5
    )


def test_traced_once_for_new_values(each_class):
    p = each_class
    traces = []

    @jax.jit
    def log_prob(p, x, alpha, sigma):
        traces.append(1)
        return p.log_prob(x, alpha, sigma)

    log_prob(p, inputs(), 0.8, 0.6)
    log_prob(jax.tree.map(lambda leaf: 0.5 * leaf, p), 2 * inputs(), 0.7, 1.5)
    assert len(traces) == 1


def test_is_a_pytree_of_its_fields(each_class):
    p = each_class
    paths, treedef = jax.tree_util.tree_flatten_with_path(p)
    assert all(isinstance(path[0], jax.tree_util.GetAttrKey) for path, _ in paths)
    again = jax.tree.unflatten(treedef, [leaf for _, leaf in paths])
    assert isinstance(again, Distribution) and type(again) is type(p)
    for (path, leaf), other in zip(paths, jax.tree.leaves(again), strict=True):
        assert getattr(again, path[0].name) is other is leaf
    assert treedef == jax.tree.structure(again)
    # Placeholders go through: jax puts objects, None and axis numbers where arrays are.
    jax.tree.map(lambda leaf: object(), p)
    jax.tree.map(lambda leaf: None, p)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), p)
    axes = jax.tree.map(lambda leaf: 0, p)
    out = jax.jit(jax.vmap(lambda p, x: p.score(x, 1.0, 0.5), in_axes=(axes, None)))(
        stacked, inputs()
    )
    np.testing.assert_array_equal(out[0], out[1])
    assert out.shape == (2, BATCH, DIM)


def test_abstract_evaluation(each_class):
    p = each_class
    x = jax.ShapeDtypeStruct((BATCH, DIM), jnp.float32)
    shapes = {"log_prob": (BATCH,), "posterior_mean": (BATCH, DIM), "score": (BATCH, DIM)}
    shapes["posterior_jacobian"] = (BATCH, DIM, DIM)
    for name, shape in shapes.items():
        out = jax.eval_shape(lambda p, x: getattr(p, name)(x, 1.0, 0.5), p, x)  # noqa: B023
        assert out.shape == shape and out.dtype == jnp.float32


def test_no_square_matrix_is_formed(each_class):
    """Of the shapes in the traced program, none has the dimension twice, but for the Jacobian."""
    p = each_class

    def square(name, p, x):
        jaxpr = jax.make_jaxpr(lambda p, x: getattr(p, name)(x, 1.0, 0.5))(p, x)
        return any(shape.count(DIM) > 1 for shape in _shapes(jaxpr.jaxpr))

    for name in ("log_prob", "posterior_weights", "posterior_mean", "score"):
        assert not square(name, p, inputs())
    assert square("posterior_jacobian", p, inputs())


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for sub in jaxprs_in_params(equation.params):
            yield from _shapes(getattr(sub, "jaxpr", sub))


@jax.jit
def with_derivatives(p, x, alpha, sigma):
    mean = lambda x: p.posterior_mean(x, alpha, sigma)
    out, pullback = jax.vjp(mean, x)
    return out, pullback(out)[0], jax.jvp(mean, (x,), (x,))[1]


def test_denoiser_is_finite_at_both_ends_with_its_derivatives(p):
    x = inputs()
    for schedule in SCHEDULES:
        for t in (0.0, 1e-5, 0.5, float(schedule.t_max), 1.0):
            for scale in (0.0, 1.0, 1e3):
                values = with_derivatives(p, scale * x, schedule.alpha(t), schedule.sigma(t))
                assert values[0].shape == x.shape and values[0].dtype == x.dtype
                assert all(np.isfinite(value).all() for value in values), (schedule, t, scale)


# A denoiser is a pytree, so all tests share one compiled call for equal shapes.
denoise = jax.jit(lambda denoise_fn, x, t: denoise_fn(x, t))
draw = jax.jit(lambda p, key, num: p.sample(key, num), static_argnums=2)


def test_without_signal_the_denoiser_is_the_prior_mean(p, evaluate):
    x, mean = inputs(), np.tile(p.moments()[0], (BATCH, 1))
    out = denoise(p.denoiser(schedules.RectifiedFlow()), x, 1.0)
    np.testing.assert_allclose(out, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(evaluate(p, x, 0.0, 1.0)["posterior_jacobian"], 0, atol=1e-12)


def test_without_noise_the_denoiser_returns_the_data(p):
    x0, _ = draw(p, jax.random.key(0), BATCH)
    out = denoise(p.denoiser(schedules.RectifiedFlow()), x0, 0.0)
    np.testing.assert_allclose(out, x0, rtol=1e-4, atol=1e-5)


def test_denoiser_takes_images_and_a_time_per_example(p):
    denoise_fn = p.denoiser(schedules.RectifiedFlow())
    x, t = inputs(), np.array([0.0, 0.2, 0.7, 1.0], np.float32)
    images = denoise(denoise_fn, x.reshape(BATCH, 2, 3, 2), t)
    assert images.shape == (BATCH, 2, 3, 2)
    for i in range(BATCH):
        shared = denoise(denoise_fn, x, float(t[i]))
        np.testing.assert_allclose(images[i].ravel(), shared[i], rtol=1e-4, atol=1e-5)


def test_denoiser_is_an_argument_of_jitted_functions(each_class):
    p = each_class
    traces = []

    @jax.jit
    def run(denoise_fn, x):
        traces.append(1)
        return denoise_fn(x, 0.3)

    first = run(p.denoiser(schedules.VPLinear()), inputs())
    second = run(p.denoiser(schedules.VPLinear(beta_max=10.0)), inputs())
    assert len(traces) == 1 and np.abs(first - second).max() > 1e-3


def test_dtypes(x64):
    """Of parameters and inputs the finer precision wins; a denoiser keeps that of its input."""
    for name in ("gaussian", "molrg", "empirical"):
        for parameters in (np.float32, np.float64):
            p = make(name, parameters)
            assert all(leaf.dtype == parameters for leaf in jax.tree.leaves(p))
            for dtype in (np.float32, np.float64):
                x = jax.ShapeDtypeStruct((2, DIM), dtype)
                out = jax.eval_shape(lambda x: p.score(x, 1.0, jnp.asarray(0.5)), x)  # noqa: B023
                assert out.dtype == np.promote_types(parameters, dtype)
                denoise = p.denoiser(schedules.VE())
                assert jax.eval_shape(lambda x: denoise(x, 0.5), x).dtype == dtype  # noqa: B023


def test_samples_depend_on_the_key_only(p):
    (x, labels), (again, _) = draw(p, jax.random.key(0), 4), draw(p, jax.random.key(0), 4)
    np.testing.assert_array_equal(x, again)
    assert np.abs(x - draw(p, jax.random.key(1), 4)[0]).max() > 0
    assert x.shape == (4, DIM) and labels.shape == (4,)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros(DIM, np.float32), 1.0, 0.5), "wrong shape of x.*x\\[None\\] for one example"),
        ((np.zeros((2, 5), np.float32), 1.0, 0.5), "12 numbers per example.*got \\(2, 5\\)"),
        ((inputs(), 1.0, np.ones(3)), r"wrong shape of sigma: expected \(\) or \(4,\), got \(3,\)"),
        ((inputs(), np.ones((4, 1)), 1.0), "wrong shape of alpha"),
        ((inputs(), 1.0, -0.5), "sigma out of range"),
    ],
)
def test_refused_arguments(each_class, arguments, message):
    p = each_class
    for name in METHODS:
        with pytest.raises(ValueError, match=message):
            getattr(p, name)(*arguments)


def test_refused_times(each_class):
    p = each_class
    with pytest.raises(ValueError, match="wrong shape of t"):
        p.denoiser(schedules.VE())(inputs(), np.ones(3))
    with pytest.raises(TypeError, match="num_samples must be an int"):
        p.sample(jax.random.key(0), True)


@pytest.mark.parametrize("name", ["empirical", "molrg"])
def test_the_origin_without_noise_is_finite_however_far_the_data(name):
    """The nearest point or subspace; squared distances must not overflow in float32."""
    far = np.float32(1e5) * np.array([np.ones(DIM), -1.5 * np.ones(DIM)], np.float32)
    bases = np.stack([np.eye(DIM)[:, :2]] * 2).astype(np.float32)
    p = Empirical(far) if name == "empirical" else MoLRG(bases, means=far)
    got = jax.jit(p.denoiser(schedules.VE()))(jnp.zeros((1, DIM)), jnp.zeros(()))
    want = far[0] if name == "empirical" else far[0] * (np.arange(DIM) > 1)
    np.testing.assert_allclose(got[0], want, rtol=1e-3, atol=100.0)
