r"""The U-Net of Hugging Face diffusers, ``UNet2DModel``: the DDPM and NCSN++ families.

Its options have the names of its ``config.json`` and its parameters the names of its modules, so
that :func:`~lowdim_diffusion.networks.from_diffusers` can fill it with a released checkpoint. An
encoder halves the resolution between levels, a decoder doubles it back and joins the encoder's
features. A residual block is

.. math::
    h \leftarrow \tfrac{1}{s}\Bigl(S h + \mathrm{conv}\bigl(a(\mathrm{norm}(
    \mathrm{conv}(R\,a(\mathrm{norm}(h))) + W a(e)))\bigr)\Bigr)

with ``e`` the features of noise level and label, ``a`` the activation, ``R`` a resampling if the
block has one, ``S`` the same with a 1x1 convolution where the channels change, and ``s`` 1 or, in
the Skip blocks, the square root of 2. With ``resnet_time_scale_shift="scale_shift"`` ``e`` scales
and shifts after the second norm instead.

*Noise level.* With ``time_embedding_type="positional"`` the features are sinusoids of the training
step. The network holds the table of training steps (``beta_schedule`` and its kin) and finds the
step, in general fractional, from the log-SNR; a level beyond either end counts as that end. With
``"fourier"`` (NCSN++) they are sinusoids of ``log(sigma / 2)`` at random frequencies: such a
network is given ``x_0 + sigma eps`` unscaled (``input_scale="clean"``) and its ``apply`` returns
``x0_hat = x_t + sigma h``. In diffusers it works on images in [0, 1], here as all networks on those
in [-1, 1]: with ``y = (x + 1) / 2`` and ``s = sigma / 2``, ``h / s`` at ``(y, s)`` is the score
that diffusers returns.

Taps, ``[b, h, w, c]``, have the names of the ResNet and attention modules that make them:
``down_blocks.0.resnets.0``, ``mid_block.attentions.0``, ...

References:
    Ho et al. 2020, arXiv 2006.11239 (DDPM); Song et al. 2021, arXiv 2011.13456 (NCSN++); von Platen
    et al. 2022, "Diffusers", github.com/huggingface/diffusers.
"""

import functools
import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowdim_diffusion import schedules
from lowdim_diffusion._checks import check_choice, check_int, check_range, fail
from lowdim_diffusion._types import Array
from lowdim_diffusion.networks import _layers as layers
from lowdim_diffusion.networks._module import from_module
from lowdim_diffusion.networks._network import Network, check_common, check_data_shape

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")
MID_BLOCKS = ("UNetMidBlock2D", None)
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "mish": jax.nn.mish,
}
_WHERE = "diffusers_unet"
_FIR = (1, 3, 3, 1)
_SKIP_SCALE = 2**0.5
_LOG_2 = math.log(2)
_SKIP_ATTENTION_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ``make("diffusers_unet", ...)``; the defaults are those of ``UNet2DModel``.

    Attributes:
        data_shape: ``(height, width, channels)``; the sides are multiples of ``2^(levels - 1)``.
        block_out_channels: channels of each level.
        down_block_types: block of each level on the way down, see ``DOWN_BLOCKS``.
        mid_block_type: ``"UNetMidBlock2D"`` or None.
        up_block_types: block of each level on the way up, see ``UP_BLOCKS``.
        layers_per_block: residual blocks per level of the encoder (the decoder has one more).
        mid_block_scale_factor: divides the sums in the middle.
        add_attention: whether the middle attends.
        downsample_padding: rows of zeros above and left of an image that is halved, 0 or 1.
        downsample_type: ``"conv"`` or ``"resnet"``, in levels with attention.
        upsample_type: likewise.
        act_fn: one of ``ACTIVATIONS``.
        attention_head_dim: features per head; None is one head.
        norm_num_groups: groups of the normalisations; None (NCSN++) is one per 4 channels, at most
            32. The Skip blocks always have the latter.
        attn_norm_num_groups: groups before the attention in the middle, if other.
        norm_eps: added to the variances.
        resnet_time_scale_shift: ``"default"`` or ``"scale_shift"``.
        time_embedding_type: ``"positional"`` or ``"fourier"``, see the top of this page.
        time_embedding_dim: width of ``e``; None is four times the channels of the first level.
        freq_shift: the lowest of the ``half`` frequencies is ``10^-4`` to the power ``(half - 1) /
            (half - freq_shift)``.
        flip_sin_to_cos: whether cosines come before sines.
        center_input_sample: whether the network itself maps its input ``x`` to ``2 x - 1``; with
            ``"fourier"`` that input is ``(x + 1) / 2``.
        num_train_timesteps: training steps, for ``"positional"``.
        beta_schedule: kind of their table, see :func:`lowdim_diffusion.schedules.beta_table`.
        beta_start: first noise rate.
        beta_end: last noise rate.
        trained_betas: the whole table, instead.
        dropout: rate inside the residual blocks.
        num_classes: number of class labels, ``num_class_embeds`` in diffusers. No label, which
            diffusers does not know, is a row of zeros.
        dtype: ``"float32"`` or ``"bfloat16"`` arithmetic.
    """

    data_shape: tuple[int, ...]
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    down_block_types: tuple[str, ...] = (DOWN_BLOCKS[0],) + (DOWN_BLOCKS[1],) * 3
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = (UP_BLOCKS[1],) * 3 + (UP_BLOCKS[0],)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    add_attention: bool = True
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int | None = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    center_input_sample: bool = False
    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = None
    dropout: float = 0.0
    num_classes: int = 0
    dtype: str = "float32"

    @property
    def schedule(self) -> schedules.Discrete:
        """Schedule of the training steps."""
        if self.trained_betas is not None:
            return schedules.Discrete.from_betas(self.trained_betas)
        steps, first, last = self.num_train_timesteps, self.beta_start, self.beta_end
        return schedules.Discrete.from_betas(
            schedules.beta_table(self.beta_schedule, steps, first, last)
        )

    def groups(self, channels: int) -> int:
        """Groups of a normalisation outside the Skip blocks."""
        return _quarter(channels) if self.norm_num_groups is None else self.norm_num_groups


def _quarter(channels: int) -> int:
    return min(channels // 4, 32)


def _embedding(config: Config, c_noise: Array, cond: Any, dtype: Any) -> Array:
    """Features of noise level and label."""
    first = config.block_out_channels[0]
    width = config.time_embedding_dim or 4 * first
    if config.time_embedding_type == "fourier":
        e = layers.Fourier(first, name="time_proj")(4 * c_noise - _LOG_2)
    else:
        table = config.schedule
        step = table.t_from_log_snr(-8 * c_noise)
        timestep = jnp.clip(step, table.t_min, table.t_max) - 1  # diffusers counts from 0
        half = first // 2
        lowest = 1e-4 ** ((half - 1) / (half - config.freq_shift)) if half > 1 else 1.0
        e = layers.sinusoids(timestep, 2 * half, 1.0, lowest)
        if not config.flip_sin_to_cos:
            e = jnp.concatenate([e[:, half:], e[:, :half]], axis=-1)
        e = jnp.pad(e, ((0, 0), (0, first % 2)))
    e = jax.nn.silu(layers.Dense(width, name="time_embedding.linear_1")(e.astype(dtype)))
    e = layers.Dense(width, name="time_embedding.linear_2")(e)
    if config.num_classes:
        labels = jnp.full(e.shape[:1], config.num_classes) if cond is None else cond
        e = e + layers.Rows(config.num_classes, width, name="class_embedding")(labels, dtype)
    return e


class _UNet(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Any, c_noise: Any, cond: Any = None, keys: Any = None) -> Array:
        config = self.config
        act = ACTIVATIONS[config.act_fn]
        e = _embedding(config, c_noise, cond, x.dtype)
        scale_shift = config.resnet_time_scale_shift == "scale_shift"

        def norm(h: Any, name: str, groups: int, film: Any = None) -> Array:
            channels = h.shape[-1]
            if not groups or channels % groups:
                expected = f"a divisor of its {channels} channels"
                raise fail(_WHERE, f"number of groups of {name}", expected, groups)
            return layers.GroupNorm(config.norm_eps, groups, name=name)(h, film)

        def resnet(
            h: Any,
            name: str,
            out: int,
            groups: int,
            groups_out: int | None = None,
            *,
            scale: float = 1.0,
            resample: Any = None,
            shortcut: bool = False,
        ) -> Array:
            groups_out = groups_out or groups
            y = act(norm(h, f"{name}.norm1", groups))
            if resample is not None:
                h, y = resample(h), resample(y)
            y = layers.Conv(out, name=f"{name}.conv1")(y)
            told = layers.Dense((1 + scale_shift) * out, name=f"{name}.time_emb_proj")(act(e))
            if scale_shift:
                y = norm(y, f"{name}.norm2", groups_out, tuple(jnp.split(told, 2, axis=-1)))
            else:
                y = norm(y + told[:, None, None], f"{name}.norm2", groups_out)
            index = zlib.crc32(name.encode()) & 0x7FFFFFFF  # tells the draws of the blocks apart
            y = layers.dropout(act(y), config.dropout, keys, index)
            y = layers.Conv(out, zero=True, name=f"{name}.conv2")(y)
            if shortcut or h.shape[-1] != out:
                h = layers.Dense(out, name=f"{name}.conv_shortcut")(h)
            h = (h + y) / scale
            layers.tap(self, name, h)
            return h

        def attention(h: Any, name: str, groups: int | None, scale: float = 1.0) -> Array:
            channels = h.shape[-1]
            head_dim = config.attention_head_dim or channels
            if channels % head_dim:
                expected = f"a divisor of the {channels} channels of {name}"
                raise fail(_WHERE, "attention_head_dim", expected, head_dim)
            tokens = h if groups is None else norm(h, f"{name}.group_norm", groups)
            tokens = tokens.reshape(h.shape[0], -1, channels)
            parts = (f"{name}.{part}" for part in ("to_q", "to_k", "to_v"))
            qkv = [layers.Dense(channels, name=part)(tokens) for part in parts]
            y = layers.attend(*qkv, num_heads=channels // head_dim)
            y = layers.Dense(channels, zero=True, name=f"{name}.to_out.0")(y)
            h = (h + y.reshape(h.shape)) / scale
            layers.tap(self, name, h)
            return h

        raw = x
        if config.time_embedding_type == "fourier":
            x = (x + 1) / 2
        x = 2 * x - 1 if config.center_input_sample else x
        widths = config.block_out_channels
        last = len(widths) - 1

        h = layers.Conv(widths[0], name="conv_in")(x)
        joined, image = [h], x
        down = functools.partial(layers.downsample, taps=_FIR)
        up = functools.partial(layers.upsample, taps=_FIR)
        for level, (kind, out) in enumerate(zip(config.down_block_types, widths, strict=True)):
            name, skip, attend = f"down_blocks.{level}", "Skip" in kind, kind.startswith("Attn")
            for i in range(config.layers_per_block):
                part = f"{name}.resnets.{i}"
                if skip:
                    first = _quarter(h.shape[-1])
                    h = resnet(h, part, out, first, _quarter(out), scale=_SKIP_SCALE)
                else:
                    h = resnet(h, part, out, config.groups(out))
                if attend and skip:
                    h = attention(h, f"{name}.attentions.{i}", _SKIP_ATTENTION_GROUPS, _SKIP_SCALE)
                elif attend:
                    h = attention(h, f"{name}.attentions.{i}", config.groups(out))
                joined.append(h)
            if level == last:
                continue
            if skip:
                options: Any = dict(scale=_SKIP_SCALE, resample=down, shortcut=True)
                h = resnet(h, f"{name}.resnet_down", out, _quarter(out), **options)
                image = down(image)
                h = layers.Dense(out, name=f"{name}.skip_conv")(image) + h
            elif attend and config.downsample_type == "resnet":
                options = dict(resample=layers.downsample)
                h = resnet(h, f"{name}.downsamplers.0", out, config.groups(out), **options)
            else:
                before = config.downsample_padding
                h = layers.DownConv(out, before, name=f"{name}.downsamplers.0.conv")(h)
            joined.append(h)

        if config.mid_block_type is not None:
            groups, scale = config.groups(widths[-1]), config.mid_block_scale_factor
            h = resnet(h, "mid_block.resnets.0", widths[-1], groups, scale=scale)
            if config.add_attention:
                of_attention = config.attn_norm_num_groups or (None if scale_shift else groups)
                h = attention(h, "mid_block.attentions.0", of_attention, scale)
            h = resnet(h, "mid_block.resnets.1", widths[-1], groups, scale=scale)

        image = None
        for level, (kind, out) in enumerate(zip(config.up_block_types, widths[::-1], strict=True)):
            name, skip, attend = f"up_blocks.{level}", "Skip" in kind, kind.startswith("Attn")
            for i in range(config.layers_per_block + 1):
                part, beside = f"{name}.resnets.{i}", joined.pop()
                before, more = h.shape[-1], beside.shape[-1]
                h = jnp.concatenate([h, beside], axis=-1)
                if skip:
                    # The first count is as diffusers has it; a quarter of the sum was meant.
                    first = min(before + more // 4, 32) if attend else _quarter(before + more)
                    h = resnet(h, part, out, first, _quarter(out), scale=_SKIP_SCALE)
                else:
                    h = resnet(h, part, out, config.groups(out))
                    if attend:
                        h = attention(h, f"{name}.attentions.{i}", config.groups(out))
            if skip:
                if attend:
                    h = attention(h, f"{name}.attentions.0", _SKIP_ATTENTION_GROUPS, _SKIP_SCALE)
                image = None if image is None else up(image)
            if level == last:
                continue
            if skip:
                y = jax.nn.silu(norm(h, f"{name}.skip_norm", _quarter(out)))
                y = layers.Conv(x.shape[-1], name=f"{name}.skip_conv")(y)
                image = y if image is None else image + y
                options = dict(scale=_SKIP_SCALE, resample=up, shortcut=True)
                h = resnet(h, f"{name}.resnet_up", out, _quarter(out), **options)
            elif attend and config.upsample_type == "resnet":
                options = dict(resample=layers.upsample)
                h = resnet(h, f"{name}.upsamplers.0", out, config.groups(out), **options)
            else:
                h = layers.Conv(out, name=f"{name}.upsamplers.0.conv")(layers.upsample(h))

        h = jax.nn.silu(norm(h, "conv_norm_out", config.groups(widths[0])))
        h = layers.Conv(x.shape[-1], zero=True, name="conv_out")(h)
        h = h if image is None else h + image
        if config.time_embedding_type == "fourier":
            sigma = jnp.exp(4 * c_noise)[:, None, None, None]
            return raw + sigma * h
        return h


def build(config: Config) -> Network:
    """Return the network."""
    config = replace(
        config,
        data_shape=check_data_shape(_WHERE, config.data_shape, 3),
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=tuple(config.down_block_types),
        up_block_types=tuple(config.up_block_types),
        trained_betas=None if config.trained_betas is None else tuple(config.trained_betas),
    )
    check_common(_WHERE, config)
    _check(config)
    net = from_module(_WHERE, _UNet(config), config)
    if config.time_embedding_type == "fourier":
        return replace(net, input_scale="clean")
    return net


def _check(config: Config) -> None:
    where, levels = _WHERE, len(config.block_out_channels)
    if not levels:
        raise fail(where, "empty block_out_channels", "one entry per level", ())
    for out in config.block_out_channels:
        check_int(where, "block_out_channels entry", out)
    for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        kinds = getattr(config, name)
        if len(kinds) != levels:
            raise fail(where, f"wrong number of {name}", f"{levels}, one per level", len(kinds))
        for kind in kinds:
            if kind not in known:
                raise fail(where, f"unsupported block type in {name}", _among(known), repr(kind))
        if len({"Skip" in kind for kind in kinds}) == 2:
            raise fail(where, f"{name} mix Skip blocks with others", "all or none", kinds)
        if "Skip" in kinds[0] and config.data_shape[2] != 3:
            raise fail(where, "Skip blocks", "images of 3 channels", config.data_shape[2])
    check_int(where, "layers_per_block", config.layers_per_block)
    check_choice(where, "mid_block_type", config.mid_block_type, MID_BLOCKS)
    check_choice(where, "downsample_padding", config.downsample_padding, (0, 1))
    check_choice(where, "downsample_type", config.downsample_type, ("conv", "resnet"))
    check_choice(where, "upsample_type", config.upsample_type, ("conv", "resnet"))
    check_choice(where, "act_fn", config.act_fn, tuple(ACTIVATIONS))
    shifts = ("default", "scale_shift")
    check_choice(where, "resnet_time_scale_shift", config.resnet_time_scale_shift, shifts)
    kinds = ("positional", "fourier")
    check_choice(where, "time_embedding_type", config.time_embedding_type, kinds)
    half = config.block_out_channels[0] // 2
    if half > 1:
        check_range(where, "freq_shift", config.freq_shift, 0, half, high_open=True)
    check_range(where, "norm_eps", config.norm_eps, 0, low_open=True)
    check_range(where, "mid_block_scale_factor", config.mid_block_scale_factor, 0, low_open=True)
    counts = ("time_embedding_dim", "attention_head_dim", "norm_num_groups", "attn_norm_num_groups")
    for name in counts:
        if getattr(config, name) is not None:
            check_int(where, name, getattr(config, name))
    multiple = 2 ** (levels - 1)
    if any(side % multiple for side in config.data_shape[:2]):
        expected = f"sides that are multiples of {multiple}, as there are {levels} levels"
        raise fail(where, "image size", expected, config.data_shape[:2])
    if config.time_embedding_type == "positional":
        _ = config.schedule  # which checks the table


def _among(known: tuple[str, ...]) -> str:
    return "one of " + ", ".join(map(repr, known))
