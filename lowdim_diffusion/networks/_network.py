"""What a network is to the rest of the package: a pure pair ``(init, apply)``, described.

Every network is called as ``apply(params, x, c_noise, cond)`` with ``c_noise = log(sigma / alpha) /
4`` (Karras et al. 2022, arXiv 2206.00364). This module checks the call once for all of them,
broadcasts ``c_noise`` and casts: a network computes in the dtype of ``x`` (at least float32) or,
built with ``dtype="bfloat16"``, in bfloat16 with float32 parameters, reductions and output.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lowdim_diffusion._checks import check_choice, check_int, check_range, check_shape, fail
from lowdim_diffusion._types import Array, Params, PRNGKey

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, eq=False)
class Network:
    """A network: ``params = net.init(key)``, ``out = net.apply(params, x, c_noise, cond=None)``.

    Attributes:
        name: as given to ``make``; an adapter has the name it was given.
        data_shape: shape of one example; ``apply`` takes and returns ``[b, *data_shape]``.
        init: ``key -> params``, a plain tree of float32 arrays.
        apply: ``(params, x, c_noise, cond=None, *, dropout_keys=None) -> out``, where

            - ``x: [b, *data_shape]``, scaled as ``input_scale`` says;
            - ``c_noise: [b]`` or scalar, ``log(sigma / alpha) / 4``; values outside [-10, 10] count
              as the nearer end, so ``sigma = 0`` is allowed;
            - ``cond: [b]`` integer class labels in ``0 .. num_classes``, the last one standing for
              "no label"; ``None`` leaves all examples without a label;
            - ``dropout_keys: [b]`` typed keys, one per example; dropout is on only when they are
              given.

            The out-of-range checks of ``cond`` see only concrete arrays: under ``jit`` a label
            above ``num_classes`` counts as no label. A network with ``takes_clean`` also takes
            ``clean: [b, *data_shape]``.
        config: plain Python values; ``make(net.name, **net.config)`` builds the same network again.
        input_scale: ``"unit"``: ``x`` is ``c_in x_t`` with unit variance; ``"clean"``: ``x`` is
            ``x_t / alpha``, a clean example plus ``exp(4 c_noise)`` times standard normal noise.
        num_classes: number of classes, 0 for an unconditional network.
        takes_clean: whether training shows it the clean examples (hard assignment does).
        taps: names of the features inside it, in the order of the run; the table of this package
            says what they are. None in adapters.
        collect: like ``apply``, but returns every tap; :meth:`features` is what to call.
    """

    name: str
    data_shape: tuple[int, ...]
    init: Callable[[PRNGKey], Params]
    apply: Callable[..., Array]
    config: Mapping[str, Any] = field(default_factory=dict)
    input_scale: Literal["unit", "clean"] = "unit"
    num_classes: int = 0
    takes_clean: bool = False
    taps: tuple[str, ...] = ()
    collect: Callable[..., dict[str, Array]] | None = None

    def features(
        self,
        params: Params,
        x: Array,
        c_noise: Any,
        cond: Any = None,
        *,
        taps: str | Sequence[str],
        dropout_keys: Any = None,
    ) -> Any:
        """Return what flows through the network at the given taps.

        Compiled, it costs the layers up to the last tap asked for; the rest is cut away.

        Args:
            params: as for ``apply``.
            x: ``[b, *data_shape]``, scaled as for ``apply``;
                :func:`lowdim_diffusion.denoisers.features` scales an ``x_t`` for you.
            c_noise: ``[b]`` or scalar, as for ``apply``.
            cond: as for ``apply``.
            taps: one of ``net.taps``, or several.
            dropout_keys: as for ``apply``.

        Returns:
            ``[b, *features]`` for one name, a dictionary of such arrays for several.

        Raises:
            ValueError: for a name that is not in ``net.taps``.

        Examples:
            >>> import jax, jax.numpy as jnp
            >>> from lowdim_diffusion import networks
            >>> net = networks.make("mlp", data_shape=(48,), width=32, depth=2)
            >>> net.taps
            ('hidden_0', 'block_0', 'hidden_1', 'block_1', 'last')
            >>> params, x = net.init(jax.random.key(0)), jnp.ones((5, 48))
            >>> net.features(params, x, -0.4, taps="hidden_1").shape
            (5, 32)
        """
        for tap in (taps,) if isinstance(taps, str) else taps:
            if tap not in self.taps:
                known = "one of " + ", ".join(self.taps) if self.taps else "none, it has no taps"
                raise fail(
                    f"{self.name}.features", "unknown tap", known, repr(tap), near(tap, self.taps)
                )
        assert self.collect is not None
        found = self.collect(params, x, c_noise, cond, dropout_keys=dropout_keys)
        return found[taps] if isinstance(taps, str) else {tap: found[tap] for tap in taps}

    @property
    def num_params(self) -> int:
        """Number of parameters, found without making them."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def near(word: Any, known: Any) -> str:
    """Return a hint at the known name nearest to a mistyped one, or nothing."""
    close = difflib.get_close_matches(str(word), list(known), 1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def check_data_shape(where: str, data_shape: Any, ndim: int | None = None) -> tuple[int, ...]:
    """Return ``data_shape`` as a tuple of positive ints; raise unless it has ``ndim`` of them."""
    shape = (data_shape,) if isinstance(data_shape, int | np.integer) else tuple(data_shape)
    if not shape or (ndim is not None and len(shape) != ndim):
        expected = "(height, width, channels)" if ndim == 3 else "at least one axis"
        raise fail(where, "wrong data_shape", expected, shape, "images are height, width, channels")
    for size in shape:
        check_int(where, "data_shape entry", size)
    return tuple(int(size) for size in shape)


def check_common(where: str, config: Any) -> None:
    """Check the options that several networks share, as far as ``config`` has them."""
    if hasattr(config, "dtype"):
        check_choice(where, "dtype", config.dtype, DTYPES)
    if hasattr(config, "num_classes"):
        check_int(where, "num_classes", config.num_classes, 0)
    if hasattr(config, "dropout"):
        check_range(where, "dropout", config.dropout, 0, 1, high_open=True)


def checked(
    where: str,
    data_shape: tuple[int, ...],
    forward: Callable[..., Any],
    *,
    num_classes: int = 0,
    dtype: str = "float32",
) -> Callable[..., Any]:
    """Return the public ``apply`` around a ``forward`` of the same arguments in the same order.

    ``forward`` gets ``x`` in the dtype to compute in, ``c_noise: [b]`` in float32 or wider and
    ``cond`` and ``dropout_keys`` as given. It returns an array or a tree of them.
    """

    def apply(
        params: Params,
        x: Any,
        c_noise: Any,
        cond: Any = None,
        *,
        dropout_keys: Any = None,
        **options: Any,
    ) -> Any:
        check_shape(where, "x", x, (None, *data_shape), "the network was built for this data_shape")
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{where}: x must be floating, got {x.dtype}.")
        batch = x.shape[0]
        if np.shape(c_noise) not in ((), (batch,)):
            expected = f"() or ({batch},)"
            raise fail(where, "wrong shape of c_noise", expected, np.shape(c_noise))
        _check_labels(where, cond, batch, num_classes)
        _check_keys(where, dropout_keys, batch)

        wide = jnp.promote_types(x.dtype, jnp.float32)
        c_noise = jnp.asarray(c_noise)
        c_noise = c_noise.astype(jnp.promote_types(c_noise.dtype, jnp.float32))
        c_noise = jnp.broadcast_to(jnp.clip(c_noise, -10, 10), (batch,))
        compute = jnp.dtype(dtype) if dtype == "bfloat16" else wide
        out = forward(params, x.astype(compute), c_noise, cond, dropout_keys, **options)
        return jax.tree.map(lambda a: a.astype(wide), out)

    return apply


def check_key(where: str, key: Any) -> None:
    """Raise unless ``key`` is one typed random key."""
    if not _is_typed(key) or np.shape(key) != ():
        raise TypeError(f"{where}: expected one typed key, e.g. jax.random.key(0), got {key!r}.")


def _is_typed(key: Any) -> bool:
    return isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _check_labels(where: str, cond: Any, batch: int, num_classes: int) -> None:
    if cond is None:
        return
    if not num_classes:
        raise fail(
            where,
            "unexpected cond",
            "None, as the network was built with num_classes=0",
            f"labels of shape {np.shape(cond)}",
            "build it with num_classes",
        )
    if not jnp.issubdtype(jnp.result_type(cond), jnp.integer):
        raise TypeError(f"{where}: cond must be integer class labels, got {jnp.result_type(cond)}.")
    check_shape(where, "cond", cond, (batch,), "give one label per example")
    check_range(where, "cond", cond, 0, num_classes, fix=f"{num_classes} stands for no label")


def _check_keys(where: str, dropout_keys: Any, batch: int) -> None:
    if dropout_keys is None:
        return
    if not _is_typed(dropout_keys):
        raise TypeError(
            f"{where}: dropout_keys must be typed keys, one per example, "
            "e.g. jax.random.split(jax.random.key(0), batch)."
        )
    check_shape(where, "dropout_keys", dropout_keys, (batch,), "give one key per example")
