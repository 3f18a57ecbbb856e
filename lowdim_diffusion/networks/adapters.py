"""A flax module of your own as a network.

The module is called as ``module(x, c_noise, cond)`` with ``x: [b, *data]``, ``c_noise: [b]`` and
``cond`` class labels ``[b]`` or None, and returns the shape of ``x``. If its call has a keyword
``train`` or ``deterministic``, it is told whether dropout is on. With dropout the examples run one
by one under ``vmap``, each with its own key, so that a result does not depend on how a batch is
split.

State beside the parameters (batch statistics) has no place in a pure ``apply`` and is refused.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_choice, check_int, check_shape, fail
from lowdim_diffusion._types import Array, Params, PRNGKey
from lowdim_diffusion.networks._network import Network, check_data_shape, check_key, checked

InputScale = Literal["unit", "clean"]


def from_linen(
    module: Any,
    data_shape: tuple[int, ...],
    *,
    num_classes: int = 0,
    name: str = "linen",
    input_scale: InputScale = "unit",
) -> Network:
    """Return the network of a ``flax.linen`` module.

    Args:
        module: linen module, called as the top of this page says; its dropout draws from the stream
            ``"dropout"``.
        data_shape: shape of one example.
        num_classes: number of classes if it takes labels; the label ``num_classes`` means none.
        name: how error messages call it.
        input_scale: what ``x`` the module expects, see :class:`Network`.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, c_noise, cond):
        ...         return nn.Dense(3)(x) * c_noise[:, None]
        >>> net = from_linen(Net(), (3,))
        >>> net.apply(net.init(jax.random.key(0)), jnp.ones((2, 3)), 0.5).shape
        (2, 3)
    """
    mode = _mode_keyword(type(module).__call__)
    data_shape = check_data_shape("from_linen", data_shape)

    def init(key: Any) -> Params:
        check_key(f"{name}.init", key)
        make = lambda k: module.init(k, *_example(data_shape, num_classes), **mode(False))
        variables = jax.jit(make)(key)
        extra = sorted(set(variables) - {"params"})
        if extra:
            raise fail("from_linen", "state beside parameters", "params only", ", ".join(extra))
        return variables["params"]

    def run(params: Params, x: Array, c_noise: Array, cond: Any, key: Any) -> Array:
        rngs = None if key is None else {"dropout": key}
        inputs = (x, c_noise, cond)
        return module.apply({"params": params}, *inputs, rngs=rngs, **mode(key is not None))

    return _adapt(name, data_shape, init, run, num_classes, input_scale)


def from_nnx(
    make_module: Callable[[Any], Any],
    data_shape: tuple[int, ...],
    *,
    num_classes: int = 0,
    name: str = "nnx",
    input_scale: InputScale = "unit",
) -> Network:
    """Return the network of a ``flax.nnx`` module.

    Args:
        make_module: ``rngs -> module``, e.g. ``lambda rngs: MyNet(8, rngs=rngs)``; the module is
            called as the top of this page says. Its parameters are all its ``nnx.Param``.
        data_shape: shape of one example.
        num_classes: number of classes if it takes labels; the label ``num_classes`` means none.
        name: how error messages call it.
        input_scale: what ``x`` the module expects, see :class:`Network`.

    Examples:
        >>> from flax import nnx
        >>> import jax, jax.numpy as jnp
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.dense = nnx.Linear(3, 3, rngs=rngs)
        ...     def __call__(self, x, c_noise, cond):
        ...         return self.dense(x) * c_noise[:, None]
        >>> net = from_nnx(Net, (3,))
        >>> net.apply(net.init(jax.random.key(0)), jnp.ones((2, 3)), 0.5).shape
        (2, 3)
    """
    from flax import nnx

    data_shape = check_data_shape("from_nnx", data_shape)

    def split(key: PRNGKey) -> tuple[Any, Any, Any]:
        module = make_module(nnx.Rngs(key))
        graph, params, streams, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
        if jax.tree.leaves(rest):
            kinds = sorted({type(v).__name__ for v in jax.tree.leaves(rest, is_leaf=_is_variable)})
            raise fail("from_nnx", "state beside parameters", "nnx.Param only", ", ".join(kinds))
        return graph, params, streams

    def init(key: Any) -> Params:
        check_key(f"{name}.init", key)
        return nnx.to_pure_dict(split(key)[1])

    def run(params: Params, x: Array, c_noise: Array, cond: Any, key: Any) -> Array:
        graph, state, streams = split(jax.random.key(0) if key is None else key)
        nnx.replace_by_pure_dict(state, params)
        module = nnx.merge(graph, state, streams)
        (module.eval if key is None else module.train)()
        mode = _mode_keyword(type(module).__call__)
        return module(x, c_noise, cond, **mode(key is not None))

    return _adapt(name, data_shape, init, run, num_classes, input_scale)


def _is_variable(leaf: Any) -> bool:
    from flax import nnx

    return isinstance(leaf, nnx.Variable)


def _adapt(
    name: str,
    data_shape: tuple[int, ...],
    init: Callable[[PRNGKey], Params],
    run: Callable[..., Array],
    num_classes: int,
    input_scale: InputScale,
) -> Network:
    check_int(name, "num_classes", num_classes, 0)
    check_choice(name, "input_scale", input_scale, ("unit", "clean"))

    def forward(params: Params, x: Array, c_noise: Array, cond: Any, keys: Any) -> Array:
        if cond is None and num_classes:
            cond = jnp.full(x.shape[:1], num_classes)
        if keys is None:
            out = run(params, x, c_noise, cond, None)
        else:
            one = lambda *example: run(params, *(a[None] for a in example[:-1]), example[-1])[0]
            if cond is None:
                out = jax.vmap(lambda *e: one_without_label(params, *e))(x, c_noise, keys)
            else:
                out = jax.vmap(one)(x, c_noise, cond, keys)
        check_shape(f"{name}.apply", "the module's output", out, x.shape)
        return out

    def one_without_label(params: Params, x: Array, c_noise: Array, key: Any) -> Array:
        return run(params, x[None], c_noise[None], None, key)[0]

    return Network(
        name,
        data_shape,
        init,
        checked(f"{name}.apply", data_shape, forward, num_classes=num_classes),
        {"data_shape": data_shape, "num_classes": num_classes},
        input_scale,
        num_classes,
    )


def _example(data_shape: tuple[int, ...], num_classes: int) -> tuple[Array, Array, Array | None]:
    return jnp.zeros((1, *data_shape)), jnp.zeros(1), jnp.zeros(1, int) if num_classes else None


def _mode_keyword(call: Callable[..., Any]) -> Callable[[bool], dict[str, bool]]:
    """Return ``dropout_on -> keyword arguments`` that tell a call so, if it has such a keyword."""
    parameters = inspect.signature(call).parameters
    if "train" in parameters:
        return lambda on: {"train": on}
    if "deterministic" in parameters:
        return lambda on: {"deterministic": not on}
    return lambda on: {}
