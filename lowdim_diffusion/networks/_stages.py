r"""Networks with one encoder for all noise levels and a decoder for each interval of them.

With bounds ``sigma_1 < ... < sigma_{S-1}`` on the noise level ``sigma / alpha``, stage s covers
``sigma_s <= sigma < sigma_{s+1}``, and

.. math:: F(x, \sigma) = D_{s(\sigma)}\bigl(E(x, \sigma), \sigma\bigr).

The decoders have widths of their own, so a network can spend more where more is to be learnt. None
runs for nothing: examples are sorted by their stage and taken in blocks, and a block runs the
decoders that its examples need. So a batch at one noise level runs one decoder, and a mixed one no
decoder more than ``S - 1`` blocks too often. Where the number of examples of each stage is known
beforehand, as in training on stratified times, ``sizes`` says so and nothing is sorted.

References:
    Zhang, Lu, Zhang, Qu 2023, arXiv 2312.09181.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_int, check_range, fail
from lowdim_diffusion._types import Array, Params
from lowdim_diffusion.linalg import expand_right, largest_divisor
from lowdim_diffusion.networks._module import assemble, one_example, trace
from lowdim_diffusion.networks._network import Network

_BLOCKS, _EXAMPLES = 8, 8  # at most so many blocks, of at least so many examples

Decoder = Callable[[Any], Array]


def check_stages(where: str, bounds: Any, name: str, widths: Any) -> tuple[Any, Any]:
    """Return bounds and widths as tuples; raise unless the bounds ascend and each stage has one."""
    bounds, widths = tuple(float(b) for b in bounds), tuple(widths)
    for bound in bounds:
        check_range(where, "bounds entry", bound, 0, low_open=True)
    if any(a >= b for a, b in pairwise(bounds)):
        raise fail(where, "bounds out of order", "ascending noise levels sigma / alpha", bounds)
    if len(widths) != len(bounds) + 1:
        expected = f"{len(bounds) + 1} for {len(bounds)} bounds"
        raise fail(where, f"wrong number of {name}", expected, len(widths), "one for each interval")
    for width in widths:
        check_int(where, f"{name} entry", width)
    return bounds, widths


def from_stages(name: str, config: Any, encoder: Any, decoders: Sequence[Any]) -> Network:
    """Return the network of an encoder and the decoders of its stages.

    Args:
        name: name of the network.
        config: its options, a dataclass with ``data_shape``, ``bounds``, ``num_classes`` and
            ``dtype``.
        encoder: linen module ``(x, c_noise, cond, dropout_keys) -> encoded``, a tree of arrays
            ``[b, ...]``.
        decoders: linen modules ``(encoded, dropout_keys) -> out``, one per stage.
    """
    bounds = np.log(config.bounds) / 4
    names = [f"stage_{i}" for i in range(len(decoders))]

    def encode(params: Params, *inputs: Any) -> Any:
        return encoder.apply({"params": params["encoder"]}, *inputs)

    def forward(
        params: Params, x: Any, c_noise: Any, cond: Any, keys: Any, sizes: Any = None
    ) -> Any:
        encoded = encode(params, x, c_noise, cond, keys)

        def decoder(module: Any, name: str) -> Decoder:
            return lambda inputs: module.apply({"params": params[name]}, *inputs)

        run = [decoder(*pair) for pair in zip(decoders, names, strict=True)]
        if sizes is not None:
            return _grouped(f"{name}.apply", run, sizes, (encoded, keys))
        stage = jnp.searchsorted(jnp.asarray(bounds, c_noise.dtype), c_noise, side="right")
        return _routed(run, stage, x, (encoded, keys))

    def collect(params: Params, x: Any, c_noise: Any, cond: Any, keys: Any) -> Any:
        inputs = (x, c_noise, cond, keys)
        encoded, state = encoder.apply({"params": params["encoder"]}, *inputs, mutable="taps")
        found = dict(state["taps"]["all"])
        for module, prefix in zip(decoders, names, strict=True):
            variables = {"params": params[prefix]}
            _, state = module.apply(variables, encoded, keys, mutable="taps")
            found |= {f"{prefix}.{tap}": value for tap, value in state["taps"]["all"]}
        return found

    params, taps, encoded = trace(encoder, *one_example(config.data_shape))
    abstract = {"encoder": params}
    for module, prefix in zip(decoders, names, strict=True):
        abstract[prefix], inner, _ = trace(module, encoded, None)
        taps += tuple(f"{prefix}.{tap}" for tap in inner)
    return assemble(name, config, abstract, taps, forward, collect)


def _grouped(where: str, decoders: Sequence[Decoder], sizes: Any, inputs: Any) -> Array:
    """Return the outputs of a batch whose first ``sizes[0]`` examples are of stage 0, and so on."""
    batch = len(jax.tree.leaves(inputs)[0])
    sizes = tuple(sizes)
    if len(sizes) != len(decoders) or sum(sizes) != batch or min(sizes) < 0:
        expected = f"{len(decoders)} numbers of examples with sum {batch}"
        raise fail(where, "wrong sizes", expected, sizes, "examples are ordered by stage")
    edges = pairwise(accumulate(sizes, initial=0))
    part = lambda low, high: jax.tree.map(lambda a: a[low:high], inputs)
    return jnp.concatenate(
        [
            decode(part(*edge))
            for decode, edge in zip(decoders, edges, strict=True)
            if edge[0] < edge[1]
        ]
    )


def _routed(decoders: Sequence[Decoder], stage: Array, like: Array, inputs: Any) -> Array:
    """Return each example's output from the decoder of its stage; ``like`` has its shape."""

    def block(args: Any) -> Array:
        stage, out, inputs = args
        for i, decode in enumerate(decoders):
            mine = expand_right(stage == i, out.ndim)
            replace = lambda out, inputs, decode=decode, mine=mine: jnp.where(
                mine, decode(inputs), out
            )
            out = jax.lax.cond(jnp.any(mine), replace, lambda out, _: out, out, inputs)
        return out

    batch = stage.shape[0]
    num = largest_divisor(batch, min(_BLOCKS, math.ceil(batch / _EXAMPLES)))
    if num == 1:
        return block((stage, like, inputs))
    order = jnp.argsort(stage)
    split = lambda a: a[order].reshape(num, batch // num, *a.shape[1:])
    out = jax.lax.map(block, jax.tree.map(split, (stage, like, inputs)))
    return out.reshape(like.shape)[jnp.argsort(order)]
