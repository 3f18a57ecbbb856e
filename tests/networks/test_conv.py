"""The convolution against lax's own, in every transformation that the package uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lowdim_diffusion.networks import _conv
from lowdim_diffusion.networks._conv import conv

pytestmark = pytest.mark.usefixtures("x64")


def lax_conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def inputs(shape=(4, 5, 6, 3), size=(3, 5), channels=2):
    a, b, c = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(a, shape, jnp.float64)
    kernel = jax.random.normal(b, (*size, shape[3], channels), jnp.float64)
    return x, kernel, jax.random.normal(c, (*shape[:3], channels), jnp.float64)


def total(f):
    return lambda x, kernel: jnp.sum(jnp.sin(f(x, kernel)))


def same(a, b):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-11, atol=1e-11), a, b)


def agree(make, *args):
    """``make(convolution)(*args)`` is the same with ours and with lax's."""
    same(*jax.jit(lambda *a: (make(conv)(*a), make(lax_conv)(*a)))(*args))


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_value_is_the_definition(size):
    x, kernel, _ = inputs(size=size)
    (kh, kw), (h, w) = size, x.shape[1:3]
    padded = np.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    expected = np.zeros((*x.shape[:3], kernel.shape[3]))
    for r in range(kh):
        for c in range(kw):
            expected += padded[:, r : r + h, c : c + w] @ np.asarray(kernel[r, c])
    same(conv(x, kernel), expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_derivatives(size):
    x, kernel, g = inputs(size=size)
    agree(lambda f: lambda x, k, g: jax.vjp(f, x, k)[1](g), x, kernel, g)
    agree(lambda f: lambda x, k: jax.jvp(f, (x, k), (jnp.cos(x), k**2)), x, kernel)


def test_second_derivatives():
    x, kernel, _ = inputs((2, 3, 4, 2), (3, 3), 2)

    def second(f):
        grad = jax.grad(total(f), (0, 1))
        forward = lambda x, k: jax.jvp(grad, (x, k), (jnp.cos(x), k**2))
        backward = lambda x, k: jax.vjp(grad, x, k)[1]((jnp.cos(x), k**2))
        return lambda x, k: (forward(x, k), backward(x, k))

    agree(second, x, kernel)


def test_the_two_kernel_gradients_agree():
    """What runs on a CPU against the form that other platforms get."""
    x, kernel, g = inputs()
    size = kernel.shape[:2]
    expected = jax.vjp(lambda k: lax_conv(x, k), kernel)[1](g)[0]
    same(_conv._kernel_grad_exchanged(x, g, size=size), expected)
    same(_conv._kernel_grad_transposed(x, g, size=size), expected)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (1, 2)])
def test_vmap(axes):
    x, kernel, _ = inputs((2, 3, 4, 2), (3, 3), 3)
    stack = lambda a, axis: a if axis is None else jnp.stack([a, a + 1, 2 * a], axis)
    modes = lambda f: (
        lambda x, k: (
            f(x, k),
            jax.jvp(f, (x, k), (jnp.cos(x), k**2)),
            jax.grad(total(f), (0, 1))(x, k),
        )
    )
    args = stack(x, axes[0]), stack(kernel, axes[1])
    agree(lambda f: jax.vmap(modes(f), axes), *args)


def test_batched_jacobian_products_inside_a_loop():
    """The shape of a block power iteration: linearize once, vectors batched, jvp, vjp, scan."""
    x, kernel, _ = inputs((2, 3, 4, 3), (3, 3), 3)

    def iterate(f):
        def body(v, _):
            push = jax.linearize(lambda y: f(jnp.tanh(f(y, kernel)), kernel), x)[1]
            pull = jax.linear_transpose(push, x)
            return 0.1 * jax.vmap(lambda u: pull(push(u))[0])(v), None

        return lambda v: jax.lax.scan(body, v, None, length=2)[0]

    agree(iterate, jnp.stack([x, x**2]))


def test_remat():
    x, kernel, _ = inputs()
    agree(lambda f: jax.grad(jax.checkpoint(total(f))), x, kernel)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    x, kernel, _ = inputs()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def body(x, kernel):
        g = jax.grad(total(conv), 1)(x, kernel)  # summed over devices when types are checked
        return g if check_vma else jax.lax.psum(g, "data")

    split = jax.shard_map(
        body, mesh=mesh, in_specs=(P("data"), P()), out_specs=P(), check_vma=check_vma
    )
    same(jax.jit(split)(x, kernel), jax.jit(jax.grad(total(lax_conv), 1))(x, kernel))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_named_sharding(axis_type):
    x, kernel, _ = inputs()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    expected = jax.jit(jax.grad(total(lax_conv), (0, 1)))(x, kernel)
    with jax.set_mesh(mesh):
        args = (
            jax.device_put(x, NamedSharding(mesh, P("data"))),
            jax.device_put(kernel, NamedSharding(mesh, P())),
        )
        same(jax.jit(jax.grad(total(conv), (0, 1)))(*args), expected)


def test_exports_for_other_platforms():
    x, kernel, _ = inputs()
    export = jax.export.export(jax.jit(jax.grad(total(conv), 1)), platforms=["cpu", "cuda", "tpu"])(
        x.astype(jnp.float32), kernel.astype(jnp.float32)
    )
    assert export.platforms == ("cpu", "cuda", "tpu")
    assert export.out_avals[0].shape == kernel.shape


def test_no_slow_convolution_in_a_scanned_gradient():
    """Outside the entry computation XLA:CPU is fast only for NHWC x HWIO -> NHWC."""
    x, kernel, _ = (a.astype(jnp.float32) for a in inputs((2, 4, 4, 3), (3, 3), 3))

    def text(f):
        def body(k, _):
            return k - 0.1 * jax.grad(lambda k: total(f)(jnp.tanh(f(x, k)), k))(k), None

        step = jax.jit(lambda k: jax.lax.scan(body, k, None, length=3)[0])
        return step.lower(kernel).as_text()

    convolutions = lambda f: [s for s in text(f).splitlines() if "stablehlo.convolution" in s]
    fast = "dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    assert len(convolutions(conv)) == 5
    assert all(fast in line for line in convolutions(conv))
    assert not all(fast in line for line in convolutions(lax_conv))  # the check can fail


def test_per_example_kernel_gradients_are_not_grouped_convolutions():
    x, kernel, _ = inputs((2, 4, 4, 3), (3, 3), 3)
    per_example = lambda x, k: jax.vmap(jax.grad(total(conv), 1), (0, None))(x[:, None], k)
    assert _conv._kernel_grad_p.name not in str(jax.make_jaxpr(per_example)(x, kernel))
    agree(lambda f: jax.vmap(jax.grad(total(f), 1), (0, None)), x[:, None], kernel)


def test_even_kernel_is_refused():
    x, _, _ = inputs()
    with pytest.raises(ValueError, match=r"even kernel: expected odd kernel sides, got \(2, 3\)"):
        conv(x, jnp.zeros((2, 3, 3, 2)))
