"""Training steps as PyTorch scripts have them: EDM's loss, Adam, an average of the weights."""

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import peers

if peers.present("torch"):
    import torch  # pyright: ignore[reportMissingImports]


def edm_step(denoise: Callable[..., Any], parameters: Iterable[Any], x: Any) -> Callable[[], None]:
    """Return a call that makes one step on the batch ``x``.

    Args:
        denoise: ``(x_t, sigma [b, 1, ..]) -> x0_hat``.
        parameters: tensors to train.
        x: batch.
    """
    parameters = list(parameters)
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    shape = (len(x), *(1,) * (x.ndim - 1))

    def step() -> None:
        sigma = torch.exp(1.2 * torch.randn(shape) - 1.2)
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        loss = (weight * (denoise(x + sigma * torch.randn_like(x), sigma) - x) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1e-3)

    return step


def unet_step(model: Any, x: Any) -> Callable[[], None]:
    """Return a step of a U-Net ``(x, c_noise)`` in EDM's preconditioning."""

    def denoise(x_t: Any, sigma: Any) -> Any:
        total = sigma**2 + 0.25
        out = model(x_t * total.rsqrt(), torch.log(sigma).flatten() / 4)
        return 0.25 / total * x_t + 0.5 * sigma * total.rsqrt() * out

    return edm_step(denoise, model.parameters(), x)


def lowrank_step(bases: Any, x: Any) -> Callable[[], None]:
    """Return a step of the low-rank autoencoder with soft weights, ``bases: [K, n, d]`` free."""
    free = bases.clone().requires_grad_(True)

    def denoise(x_t: Any, sigma: Any) -> Any:
        frames = torch.linalg.qr(free)[0]
        inner = torch.einsum("bn,knd->bkd", x_t, frames)
        sharpness = 1 / (2 * sigma**2 * (1 + sigma**2))
        shares = torch.softmax(sharpness * (inner**2).sum(-1), dim=1)
        return torch.einsum("bkd,knd->bn", shares[..., None] * inner, frames) / (1 + sigma**2)

    return edm_step(denoise, [free], x)
