"""From a flax module of this room to a ``Network``, its parameters drawn leaf by leaf.

Compiling ``module.init`` of a small U-Net takes over ten seconds. Here the module is only traced
for the shapes of its parameters, and the *name* of a leaf says how it starts:

===============  ====================================================================
``kernel``       normal with variance 1 / fan-in (the product of all axes but the last)
``zero_kernel``  zeros: the last layer of a branch, which so starts silent
``table``        standard normal: one row per class
``frequencies``  normal with standard deviation 16, as in NCSN++
``scale``        ones
``bias``         zeros
===============  ====================================================================

The key of a leaf is the network's key folded with a checksum of the leaf's path, so a leaf starts
the same whatever else the network has. All leaves are cut from one drawing of rows of fixed length,
since each random generator in a program costs compilation.

A module offers features by ``layers.tap``. They are collected only by ``Network.features``; without
it the calls leave no trace in a program.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import is_concrete
from lowdim_diffusion._types import Params, PRNGKey
from lowdim_diffusion.networks._network import Network, check_key, checked

_ROW = 256
_CONSTANTS = {"zero_kernel": 0.0, "bias": 0.0, "scale": 1.0}
_STDS = {"table": 1.0, "frequencies": 16.0}


def from_module(name: str, module: Any, config: Any) -> Network:
    """Return the network of a linen module ``(x, c_noise, cond, dropout_keys) -> out``.

    Args:
        name: name of the network.
        module: a module whose parameters are named as above.
        config: its options, a dataclass with ``data_shape``, ``num_classes`` and ``dtype``.
    """

    def forward(params: Params, *inputs: Any) -> Any:
        return module.apply({"params": params}, *inputs)

    def collect(params: Params, *inputs: Any) -> Any:
        _, state = module.apply({"params": params}, *inputs, mutable="taps")
        return dict(state["taps"]["all"])

    abstract, taps, _ = trace(module, *one_example(config.data_shape))
    return assemble(name, config, abstract, taps, forward, collect)


def assemble(
    name: str,
    config: Any,
    abstract: Params,
    taps: tuple[str, ...],
    forward: Callable[..., Any],
    collect: Callable[..., Any],
) -> Network:
    """Return the network whose parameters have the shapes of ``abstract``, its inputs checked."""
    shape, options = config.data_shape, dict(num_classes=config.num_classes, dtype=config.dtype)
    return Network(
        name,
        shape,
        _initializer(name, abstract),
        checked(f"{name}.apply", shape, forward, **options),
        asdict(config),
        num_classes=config.num_classes,
        taps=taps,
        collect=checked(f"{name}.features", shape, collect, **options),
    )


def one_example(data_shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return an abstract batch of one, and its noise conditioning."""
    x = jax.ShapeDtypeStruct((1, *data_shape), jnp.float32)
    return x, jax.ShapeDtypeStruct((1,), jnp.float32)


def trace(module: Any, *inputs: Any) -> tuple[Params, tuple[str, ...], Any]:
    """Return the parameters and the output, abstract, and the taps in the order of the run."""
    taps: list[str] = []

    def init(*inputs: Any) -> tuple[Params, Any]:
        out, variables = module.init_with_output(*inputs)
        taps.extend(name for name, _ in variables["taps"]["all"])
        return variables["params"], out

    params, out = jax.eval_shape(init, jax.random.key(0), *inputs)
    return params, tuple(taps), out


def _initializer(name: str, abstract: Params) -> Callable[[PRNGKey], Params]:
    """Return ``key -> params`` for parameters of these shapes, named as above."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    shapes = [leaf.shape for _, leaf in leaves]
    kinds = [path.rsplit("/", 1)[-1] for path in paths]
    both = list(zip(kinds, shapes, strict=True))
    sizes = [0 if kind in _CONSTANTS else math.prod(shape) for kind, shape in both]
    stds = [_STDS.get(kind, math.prod(shape[:-1]) ** -0.5) for kind, shape in both]
    checksums = [zlib.crc32(path.encode()) for path in paths]
    num_rows = [-(-size // _ROW) for size in sizes]
    leaf_of_row = np.repeat(np.array(checksums, np.uint32), num_rows)
    row_in_leaf = np.concatenate([np.arange(n, dtype=np.uint32) for n in num_rows])
    std_of_row = np.repeat(np.array(stds, np.float32), num_rows)

    @jax.jit
    def draw_rows(key: PRNGKey) -> Any:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, leaf_of_row)
        keys = jax.vmap(jax.random.fold_in)(keys, row_in_leaf)
        rows = jax.vmap(lambda k: jax.random.normal(k, (_ROW,), jnp.float32))(keys)
        return rows * std_of_row[:, None]

    def init(key: Any) -> Params:
        check_key(f"{name}.init", key)
        rows = draw_rows(key)
        on_host = is_concrete(rows)  # then cut there: no compilation per leaf
        rows = np.asarray(rows) if on_host else rows
        values, start = [], 0
        for kind, shape, size, n in zip(kinds, shapes, sizes, num_rows, strict=True):
            if kind in _CONSTANTS:
                value = np.full(shape, _CONSTANTS[kind], np.float32)
            else:
                value = rows[start : start + n].reshape(-1)[:size].reshape(shape)
            values.append(jax.device_put(value.copy() if on_host else value))
            start += n
        return jax.tree_util.tree_unflatten(tree, values)

    return init
