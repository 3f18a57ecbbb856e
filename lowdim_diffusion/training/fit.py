"""Training as one compiled loop over a pure function, for problems that fit on the device."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from lowdim_diffusion._checks import check_int
from lowdim_diffusion._types import Array, Batch, LossFn, Params, PRNGKey
from lowdim_diffusion.training.step import Decays, init_state, make_train_step

__all__ = ["fit"]


def fit(
    key: PRNGKey,
    params: Params,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    batch_fn: Callable[[Any, Any], Batch],
    num_steps: int,
    *,
    ema: Decays = None,
) -> tuple[Params, dict[str, Array]]:
    """Return ``(params, metrics)`` after ``num_steps`` steps: one ``lax.scan``, ready for ``vmap``.

    Args:
        key: typed random key; one part drives the batches, the other the losses.
        params: initial parameters.
        loss_fn: ``(params, batch, key) -> loss``, see :func:`make_train_step`.
        optimizer: optax transformation.
        batch_fn: stateless ``(key, step) -> batch``.
        num_steps: number of updates.
        ema: if given, the (first) moving average is returned in place of the last parameters.

    Returns:
        Trained parameters, and ``metrics`` with ``loss`` and ``grad_norm`` of shape
        ``[num_steps]``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> loss_fn = lambda params, batch, key: (params - batch) ** 2
        >>> draw = lambda key, step: jax.random.normal(jax.random.fold_in(key, step), (64,))
        >>> batch_fn = lambda key, step: 3.0 + draw(key, step)
        >>> seeds = jax.random.split(jax.random.key(0), 3)
        >>> train = lambda k: fit(k, jnp.zeros(()), loss_fn, optax.sgd(0.1), batch_fn, 200)[0]
        >>> bool(jnp.all(jnp.abs(jax.jit(jax.vmap(train))(seeds) - 3) < 0.3))
        True
    """
    check_int("fit", "num_steps", num_steps, 0)
    batch_key, loss_key = jax.random.split(key)
    train_step = make_train_step(loss_fn, optimizer, ema=ema)

    def body(state: Any, _: None):
        batch = batch_fn(batch_key, state.step)
        return train_step(state, batch, jax.random.fold_in(loss_key, state.step))

    state, metrics = jax.lax.scan(
        body, init_state(params, optimizer, ema=ema), None, length=num_steps
    )
    return state.averaged, metrics
