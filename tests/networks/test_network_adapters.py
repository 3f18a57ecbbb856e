"""A user's own flax module as a network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowdim_diffusion import networks


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, c_noise, cond, deterministic=True):
        h = nn.Dense(6)(x) + c_noise[:, None]
        if cond is not None:
            h = h + nn.Embed(4, 6)(cond)
        h = nn.Dropout(0.5)(h, deterministic=deterministic)
        return nn.Dense(x.shape[-1])(h)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 6, rngs=rngs)
        self.table = nnx.Embed(4, 6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x, c_noise, cond):
        h = self.first(x) + c_noise[:, None]
        if cond is not None:
            h = h + self.table(cond)
        return self.second(self.dropout(h))


def build(kind, num_classes=3):
    if kind == "linen":
        return networks.from_linen(Linen(), (3,), num_classes=num_classes)
    return networks.from_nnx(Nnx, (3,), num_classes=num_classes)


KINDS = pytest.mark.parametrize("kind", ["linen", "nnx"])
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


@KINDS
def test_value_is_the_modules(kind, key):
    net = build(kind, num_classes=0)
    params = net.init(key)
    got = net.apply(params, X, 0.3)
    if kind == "linen":
        expected = Linen().apply({"params": params}, X, jnp.full(4, 0.3), None)
    else:
        module = Nnx(nnx.Rngs(key))
        module.eval()
        expected = module(X, jnp.full(4, 0.3), None)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert net.num_params == sum(a.size for a in jax.tree.leaves(params))


@KINDS
def test_labels_and_null_label(kind, key):
    net = build(kind)
    params = net.init(key)
    apply = jax.jit(net.apply)
    a = apply(params, X, 0.1, jnp.array([0, 1, 2, 0]))
    assert float(jnp.abs(a - apply(params, X, 0.1)).max()) > 1e-3
    null = apply(params, X, 0.1, jnp.full(4, 3))
    np.testing.assert_allclose(null, apply(params, X, 0.1), rtol=1e-6)
    with pytest.raises(ValueError, match="cond out of range"):
        net.apply(params, X, 0.1, jnp.full(4, 4))


@KINDS
@pytest.mark.parametrize("num_classes", [0, 3])
def test_dropout_follows_the_examples_key(kind, num_classes, key):
    net = build(kind, num_classes)
    params = net.init(key)
    keys = jax.random.split(key, 4)
    apply = jax.jit(lambda x, keys: net.apply(params, x, 0.1, dropout_keys=keys))
    whole = apply(X, keys)
    halves = jnp.concatenate([apply(X[:2], keys[:2]), apply(X[2:], keys[2:])])
    np.testing.assert_allclose(whole, halves, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(whole - net.apply(params, X, 0.1)).max()) > 1e-3
    assert float(jnp.abs(whole - apply(X, keys[::-1])).max()) > 1e-3


@KINDS
def test_transformations(kind, key):
    net = build(kind)
    params = jax.jit(net.init)(key)
    assert type(params) is dict
    loss = lambda p, x: jnp.sum(net.apply(p, x, 0.1, jnp.zeros(4, int)) ** 2)
    grads = jax.jit(jax.grad(loss))(params, X)
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(grads))
    many = jax.vmap(net.init)(jax.random.split(key, 2))
    assert jax.vmap(net.apply, (0, None, None))(many, X, 0.1).shape == (2, 4, 3)
    push = jax.jvp(lambda x: net.apply(params, x, 0.1), (X,), (X,))[1]
    assert push.shape == X.shape


def test_state_beside_parameters_is_refused(key):
    class WithState(nn.Module):
        @nn.compact
        def __call__(self, x, c_noise, cond):
            return nn.BatchNorm(use_running_average=True)(x)

    class NnxState(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x, c_noise, cond):
            return self.norm(x)

    with pytest.raises(ValueError, match=r"state beside parameters.*batch_stats"):
        networks.from_linen(WithState(), (3,)).init(key)
    with pytest.raises(ValueError, match=r"state beside parameters.*BatchStat"):
        networks.from_nnx(NnxState, (3,)).init(key)


def test_wrong_output_shape_is_named(key):
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x, c_noise, cond):
            return nn.Dense(7)(x)

    net = networks.from_linen(Wide(), (3,), name="mine")
    with pytest.raises(ValueError, match=r"mine.apply: wrong shape of the module's output"):
        net.apply(net.init(key), X, 0.1)


def test_train_keyword_and_input_scale(key):
    class Told(nn.Module):
        @nn.compact
        def __call__(self, x, c_noise, cond, *, train):
            return nn.Dense(3)(x) * (2.0 if train else 1.0)

    net = networks.from_linen(Told(), (3,), input_scale="clean")
    assert net.input_scale == "clean"
    params = net.init(key)
    on = net.apply(params, X, 0.1, dropout_keys=jax.random.split(key, 4))
    np.testing.assert_allclose(on, 2 * net.apply(params, X, 0.1), rtol=1e-6)
