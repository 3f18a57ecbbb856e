"""Names that the whole package shares: array aliases and the two protocols everything is built on.

Conventions, everywhere: batch first, features last; images are NHWC; ``t`` grows with noise and is
a scalar or ``[b]``; ``sigma`` is a standard deviation; keys are typed (``jax.random.key``).
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, Key, PyTree

__all__ = [
    "Array",
    "ArrayLike",
    "Batch",
    "Bool",
    "DenoiseFn",
    "Float",
    "Int",
    "Key",
    "LossFn",
    "PRNGKey",
    "Params",
    "PyTree",
    "Scalar",
    "Schedule",
]

ArrayLike: TypeAlias = Any
"""Whatever ``jnp.asarray`` takes."""

Scalar: TypeAlias = Float[Array, ""] | float | int
"""One real number, Python's or jax's."""

PRNGKey: TypeAlias = Key[Array, ""]
"""One typed random key."""

Params: TypeAlias = PyTree
Batch: TypeAlias = Any
"""A dictionary of arrays with leading axis b, e.g. ``{"x": [b, *data], "label": [b]}``."""

DenoiseFn: TypeAlias = Callable[[Array, Array], Array]
"""``(x_t: [b, *data], t: [b] or scalar) -> x0_hat: [b, *data]``, the mean E[x_0 | x_t]."""

LossFn: TypeAlias = Callable[[Params, Batch, PRNGKey], Any]
"""``(params, batch, key) -> loss`` or ``(loss, aux)``; a loss is a scalar or one per example."""


@runtime_checkable
class Schedule(Protocol):
    """A noise schedule: ``x_t = alpha(t) x_0 + sigma(t) eps``, noise growing with ``t``.

    ``log_snr(t) = log(alpha(t)^2 / sigma(t)^2)`` decreases in ``t`` and ``t_from_log_snr`` inverts
    it. All methods work elementwise on scalars and arrays.
    """

    @property
    def t_min(self) -> Any:
        """Smallest time at which the schedule is used."""
        ...

    @property
    def t_max(self) -> Any:
        """Largest time: (almost) pure noise."""
        ...

    def alpha(self, t: Any) -> Array:
        """Signal scale at time ``t``."""
        ...

    def sigma(self, t: Any) -> Array:
        """Noise standard deviation at time ``t``."""
        ...

    def log_snr(self, t: Any) -> Array:
        """``log(alpha^2 / sigma^2)`` at time ``t``."""
        ...

    def t_from_log_snr(self, log_snr: Any) -> Array:
        """Time at which the log-SNR has this value."""
        ...
