"""Our U-Net in PyTorch, as its users write it: modules, fused attention, channels last.

The same network to rounding: its weights are copied from ours, and outputs are compared before
anything is timed.
"""

from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.peers.unets import check_agreement, to_torch
from lowdim_diffusion import networks
from lowdim_diffusion.linalg import largest_divisor

if peers.present("torch"):
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]
    from torch.nn import functional  # pyright: ignore[reportMissingImports]

    def _norm(channels: int) -> Any:
        return nn.GroupNorm(largest_divisor(channels, min(32, channels // 4)), channels, eps=1e-5)

    class _Block(nn.Module):
        """Residual block, maybe resampling, maybe followed by attention."""

        def __init__(self, given: int, channels: int, width: int, resample: str, num_heads: int):
            super().__init__()
            self.resample, self.num_heads = resample, num_heads
            self.norm_0, self.norm_1 = _norm(given), _norm(channels)
            self.conv_0 = nn.Conv2d(given, channels, 3, padding=1)
            self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
            self.film = nn.Linear(width, 2 * channels)
            self.skip = nn.Conv2d(given, channels, 1) if given != channels else nn.Identity()
            if num_heads:
                self.norm_2 = _norm(channels)
                self.qkv = nn.Conv2d(channels, 3 * channels, 1)
                self.mix = nn.Conv2d(channels, channels, 1)

        def forward(self, x: Any, e: Any) -> Any:
            h = self.conv_0(self._resampled(functional.silu(self.norm_0(x))))
            scale, shift = self.film(e)[:, :, None, None].chunk(2, dim=1)
            h = self.conv_1(functional.silu(torch.addcmul(shift, self.norm_1(h), scale + 1)))
            x = (self.skip(self._resampled(x)) + h) * 0.5**0.5
            if self.num_heads:
                parts = self.qkv(self.norm_2(x)).chunk(3, dim=1)
                split = (x.shape[0], self.num_heads, -1, x.shape[2] * x.shape[3])
                q, k, v = (part.reshape(split).transpose(2, 3) for part in parts)
                mixed = functional.scaled_dot_product_attention(q, k, v)
                x = (x + self.mix(mixed.transpose(2, 3).reshape(x.shape))) * 0.5**0.5
            return x

        def _resampled(self, x: Any) -> Any:
            if self.resample == "down":
                return functional.avg_pool2d(x, 2)
            if self.resample == "up":
                return functional.interpolate(x, scale_factor=2, mode="nearest")
            return x

    class UNet(nn.Module):
        """``make("unet", ...)`` without labels and dropout, on sides that need no padding."""

        def __init__(self, net: networks.Network):
            super().__init__()
            channels, mults = net.config["channels"], tuple(net.config["channel_mult"])
            sides = [net.data_shape[0] // 2**level for level in range(len(mults))]
            attention = net.config["attention"]
            attention = sides[-1:] if attention is None else attention
            last, width, blocks = len(mults) - 1, 4 * channels, net.config["num_blocks"]
            self.up_levels = range(last - 1, -1, -1)

            def block(
                name: str, given: int, level: int, resample: str = "", at: bool = False
            ) -> int:
                heads = net.config["num_heads"] if at and sides[level] in attention else 0
                made = _Block(given, channels * mults[level], width, resample, heads)
                self.blocks[name] = made
                return channels * mults[level]

            self.blocks = nn.ModuleDict()
            self.plan: list[tuple[str, bool, bool]] = []
            """Blocks in order: name, whether a skip is joined before it, or kept after it."""
            self.noise, self.joint = nn.Linear(128, width), nn.Linear(width, width)
            size = channels * mults[0]
            self.first, kept = nn.Conv2d(net.data_shape[2], size, 3, padding=1), [size]
            for level in range(last + 1):
                names = [(f"down_{level}", "down", False)] if level else []
                names += [(f"encoder_{level}_{i}", "", True) for i in range(blocks)]
                for name, resample, at in names:
                    size = block(name, size, level, resample, at)
                    kept.append(size)
                    self.plan.append((name, False, True))
            for i in range(2):
                size = block(f"middle_{i}", size, last, at=i == 0)
                self.plan.append((f"middle_{i}", False, False))
            for level in range(last, -1, -1):
                if level != last:
                    size = block(f"up_{level}", size, level, "up")
                    self.plan.append((f"up_{level}", False, False))
                for i in range(blocks + 1):
                    name = f"decoder_{level}_{i}"
                    size = block(name, size + kept.pop(), level, at=i == blocks)
                    self.plan.append((name, True, False))
            self.norm, self.out = _norm(size), nn.Conv2d(size, net.data_shape[2], 3, padding=1)
            self.register_buffer("frequencies", torch.tensor(np.geomspace(0.25, 16.0, 64)).float())

        def forward(self, x: Any, c_noise: Any) -> Any:
            """Return images of the shape of ``x``."""
            angles = c_noise[:, None] * self.frequencies
            e = torch.cat([angles.cos(), angles.sin()], dim=1)
            e = functional.silu(self.joint(functional.silu(self.noise(e))))
            h = self.first(x)
            skips = [h]
            for name, joins, keeps in self.plan:
                h = torch.cat([h, skips.pop()], dim=1) if joins else h
                h = self.blocks[name](h, e)
                if keeps:
                    skips.append(h)
            return self.out(functional.silu(self.norm(h)))


def unet(net: networks.Network, params: Any, x: Any, c_noise: Any) -> Any:
    """Return ``net`` in torch with these weights, or None without torch.

    Raises:
        RuntimeError: if it computes something else at ``x``.
    """
    if not peers.present("torch"):
        return None
    model = UNet(net)
    with torch.no_grad():
        _copy(model.noise, params["embedding"]["noise"])
        _copy(model.joint, params["embedding"]["joint"])
        for ours, theirs in {"in": model.first, "norm": model.norm, "out": model.out}.items():
            _copy(theirs, params[ours])
        for name, block in model.blocks.items():
            for layer, module in block.named_children():
                if not isinstance(module, nn.Identity):
                    _copy(module, params[name][layer])
    model = model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        theirs = model(*arguments(x, c_noise))
    check_agreement("the torch network", theirs, net.apply(params, x, c_noise), 1e-4)
    return model


def arguments(x: Any, c_noise: Any) -> tuple[Any, Any]:
    """Return images and noise conditioning as ``forward`` takes them, channels last."""
    x = to_torch(x).to(memory_format=torch.channels_last)
    return x, torch.tensor(np.asarray(c_noise))


def _copy(module: Any, layer: Any) -> None:
    """Copy a layer's parameters."""
    named = {name.removeprefix("zero_"): np.array(value) for name, value in layer.items()}
    weight = named["scale"] if "scale" in named else named["kernel"]
    if weight.ndim == 2 and module.weight.ndim == 4:
        weight = weight[None, None]
    order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[weight.ndim]
    module.weight.copy_(torch.tensor(weight.transpose(order).copy()))
    module.bias.copy_(torch.tensor(named["bias"]))
