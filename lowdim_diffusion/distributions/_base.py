"""What the exact distributions share: interface, pytree registration, handling of arguments."""

import abc
import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lowdim_diffusion._checks import check_range, check_time, fail
from lowdim_diffusion._types import Array, ArrayLike, DenoiseFn, PRNGKey, Schedule

T = TypeVar("T", bound=type)


class Distribution(abc.ABC):
    """A law of ``x_0`` whose noisy versions ``x = alpha x_0 + sigma eps`` are known in closed form.

    In every method ``x`` is ``[b, *data]`` with ``prod(data)`` equal to the dimension n, and
    ``alpha`` and ``sigma`` are scalars or ``[b]``, both >= 0 and not both 0. Results that live in
    data space have the shape of ``x``.
    """

    min_steps = 0
    """Steps below which a sampler leaves the paths of this law's denoiser; it warns of fewer."""

    @abc.abstractmethod
    def sample(self, key: PRNGKey, num_samples: int) -> tuple[Array, Array]:
        """Return ``(x0, labels)``: draws and the component that each came from."""

    @abc.abstractmethod
    def log_prob(self, x: Array, alpha: ArrayLike = 1.0, sigma: ArrayLike = 0.0) -> Array:
        """Return the log-density ``[b]`` of the noisy law at ``x``."""

    @abc.abstractmethod
    def score(self, x: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
        """Return the gradient of the log-density with respect to ``x``."""

    @abc.abstractmethod
    def posterior_mean(self, x: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
        """Return ``E[x_0 | x]``, the least-squares optimal denoiser."""

    @abc.abstractmethod
    def posterior_weights(self, x: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
        """Return ``[b, components]``, the probability of each component given ``x``."""

    @abc.abstractmethod
    def posterior_jacobian(self, x: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
        """Return ``[b, n, n]``, the derivative of the posterior mean: symmetric, PSD."""

    @abc.abstractmethod
    def moments(self) -> tuple[Array, Array]:
        """Return ``(mean [n], covariance [n, n])`` of ``x_0``."""

    def denoiser(self, schedule: Schedule) -> DenoiseFn:
        """Return the posterior mean as ``(x_t: [b, *data], t: scalar or [b]) -> x0_hat``.

        Finite for every finite ``x_t`` and every ``t`` of the schedule, with finite derivatives in
        ``x_t``: without signal (``alpha = 0``) it is the prior mean, without noise (``sigma = 0``)
        the limit ``sigma -> 0``. The function is a pytree whose leaves are the parameters of the
        distribution and of the schedule, so it may be handed to a jitted function as an argument.
        """
        return _Denoiser(self, schedule)


def register_pytree(cls: T) -> T:
    """Register a frozen dataclass as a pytree and return it; ``static`` fields are not leaves.

    Unflattening sets the fields directly, without ``__init__``: transformations put tracers,
    stacked arrays and placeholders into the leaves, which the checks of user input must not see.
    """
    fields = dataclasses.fields(cls)
    leaves = [f.name for f in fields if not f.metadata.get("static")]
    static = [f.name for f in fields if f.metadata.get("static")]

    def flatten(p: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(p, name) for name in leaves], tuple(getattr(p, name) for name in static)

    def flatten_with_keys(p: Any) -> tuple[list[Any], tuple[Any, ...]]:
        children, aux = flatten(p)
        keys = [jax.tree_util.GetAttrKey(name) for name in leaves]
        return list(zip(keys, children, strict=True)), aux

    def unflatten(aux: tuple[Any, ...], children: Any) -> Any:
        values = zip(static + leaves, (*aux, *children), strict=True)
        return set_fields(object.__new__(cls), **dict(values))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def set_fields(p: Any, **values: Any) -> Any:
    """Return the frozen dataclass ``p`` with its fields set, for use while it is being built."""
    for name, value in values.items():
        object.__setattr__(p, name, value)
    return p


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class _Denoiser:
    """The posterior mean along a schedule."""

    distribution: Distribution
    schedule: Schedule

    def __call__(self, x_t: ArrayLike, t: ArrayLike) -> Array:
        x_t = jnp.asarray(x_t)
        check_time("denoiser", t, x_t.shape[0] if x_t.ndim else 0)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return self.distribution.posterior_mean(x_t, alpha, sigma).astype(x_t.dtype)

    @property
    def min_steps(self) -> int:
        return self.distribution.min_steps


def real_array(value: ArrayLike, dtype: Any = None) -> Array:
    """Return ``value`` as a floating-point array."""
    value = jnp.asarray(value, dtype)
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    return value if floating else value.astype(jnp.result_type(float))


def noisy_arguments(
    where: str, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike, like: Array, dim: int
) -> tuple[Array, Array, Array]:
    """Return ``(x [b, n], alpha [b], sigma [b])`` in the common dtype of ``x`` and ``like``."""
    x = real_array(x)
    if x.ndim < 2 or math.prod(x.shape[1:]) != dim:
        what = f"(batch, *data) with {dim} numbers per example"
        raise fail(
            where, "wrong shape of x", what, x.shape, "put the batch first, x[None] for one example"
        )
    batch = x.shape[0]
    dtype = jnp.result_type(x.dtype, like.dtype)
    levels = []
    for name, level in (("alpha", alpha), ("sigma", sigma)):
        if jnp.shape(level) not in ((), (batch,)):
            raise fail(where, f"wrong shape of {name}", f"() or ({batch},)", jnp.shape(level))
        if isinstance(level, int | float):
            check_range(where, name, level, 0)
        levels.append(jnp.broadcast_to(jnp.asarray(level, dtype), (batch,)))
    return x.reshape(batch, dim).astype(dtype), levels[0], levels[1]


def resolvable_noise(x: Array) -> Array:
    """Return ``[b]``, the noise at the rounding of ``x [b, n]``; it stands in for none at all.

    At the origin it is 1e-12: squared distances of up to 1e14 over its square fit into float32.
    """
    size = jnp.linalg.norm(jax.lax.stop_gradient(x), axis=-1)
    return jnp.maximum(jnp.finfo(x.dtype).eps * size, 1e-12)
