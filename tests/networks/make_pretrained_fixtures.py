"""Small torch models with random weights, and the files that `test_pretrained.py` reads.

    python tests/networks/make_pretrained_fixtures.py --edm <checkout of github.com/NVlabs/edm>

needs torch, diffusers and safetensors. Every parameter is random, also those that training starts
at zero or one, so that no tensor can be lost or swapped unseen. A fixture is a checkpoint as the
other library writes it and ``reference.safetensors``: input, timestep or noise level, output, and
the products of the Jacobian in the input with two vectors, by torch in float64.
"""

import argparse
import json
import math
import pathlib
import sys

import numpy as np
import torch
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).with_name("fixtures")

DDPM = dict(
    norm_eps=1e-6,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    attention_head_dim=None,
    norm_num_groups=4,
)
NCSNPP = dict(
    time_embedding_type="fourier",
    norm_num_groups=None,
    norm_eps=1e-6,
    attention_head_dim=None,
    mid_block_scale_factor=math.sqrt(2),
)
DOWN, ATTN_DOWN, SKIP_DOWN = "DownBlock2D", "AttnDownBlock2D", "SkipDownBlock2D"
UP, ATTN_UP, SKIP_UP = "UpBlock2D", "AttnUpBlock2D", "SkipUpBlock2D"

# name: (options of UNet2DModel, class and options of the scheduler)
DIFFUSERS = {
    "ddpm-tiny": (
        dict(
            DDPM,
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(4, 8),
            down_block_types=(DOWN, ATTN_DOWN),
            up_block_types=(ATTN_UP, UP),
        ),
        ("DDPMScheduler", dict(variance_type="fixed_large")),
    ),
    "shifted-tiny": (
        dict(
            sample_size=(4, 8),
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 12),
            down_block_types=(ATTN_DOWN, DOWN),
            up_block_types=(UP, ATTN_UP),
            norm_num_groups=2,
            attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
            num_class_embeds=3,
            time_embedding_dim=12,
        ),
        (
            "DDIMScheduler",
            dict(
                prediction_type="v_prediction",
                beta_schedule="squaredcos_cap_v2",
                num_train_timesteps=100,
            ),
        ),
    ),
    "ncsnpp-tiny": (
        dict(
            NCSNPP,
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(4, 8),
            down_block_types=(SKIP_DOWN, SKIP_DOWN),
            up_block_types=(SKIP_UP, SKIP_UP),
        ),
        ("ScoreSdeVeScheduler", dict(sigma_max=50.0)),
    ),
    "cifar10": (
        dict(
            DDPM,
            sample_size=16,
            block_out_channels=(8, 16, 16, 16),
            down_block_types=(DOWN, ATTN_DOWN, DOWN, DOWN),
            up_block_types=(UP, UP, ATTN_UP, UP),
        ),
        ("DDPMScheduler", {}),
    ),
    "celebahq": (
        dict(
            DDPM,
            sample_size=32,
            block_out_channels=(8, 8, 16, 16, 24, 24),
            down_block_types=(DOWN, DOWN, DOWN, DOWN, ATTN_DOWN, DOWN),
            up_block_types=(UP, ATTN_UP, UP, UP, UP, UP),
        ),
        ("PNDMScheduler", {}),
    ),
    "attentive": (
        dict(
            sample_size=16,
            block_out_channels=(16, 32, 32),
            down_block_types=(DOWN, ATTN_DOWN, ATTN_DOWN),
            up_block_types=(ATTN_UP, ATTN_UP, UP),
            norm_num_groups=8,
            attn_norm_num_groups=4,
            downsample_type="resnet",
            act_fn="gelu",
            dropout=0.1,
        ),
        ("EulerDiscreteScheduler", dict(beta_schedule="scaled_linear", beta_end=0.012)),
    ),
    "odd": (
        dict(
            sample_size=12,
            layers_per_block=1,
            block_out_channels=(9, 15, 12),
            down_block_types=(DOWN, DOWN, ATTN_DOWN),
            up_block_types=(ATTN_UP, UP, UP),
            norm_num_groups=3,
            attention_head_dim=None,
            act_fn="mish",
            add_attention=False,
            mid_block_scale_factor=2.0,
            center_input_sample=True,
            freq_shift=1,
        ),
        ("DDPMScheduler", dict(prediction_type="sample", beta_schedule="sigmoid")),
    ),
    "no-middle": (
        dict(
            DDPM,
            sample_size=8,
            block_out_channels=(8, 8),
            down_block_types=(DOWN, DOWN),
            up_block_types=(UP, UP),
            mid_block_type=None,
            act_fn="relu",
        ),
        ("DDPMScheduler", dict(trained_betas=[0.01 * i for i in range(1, 20)])),
    ),
    "ncsnpp": (
        dict(
            NCSNPP,
            sample_size=16,
            block_out_channels=(32, 32, 64),
            down_block_types=(SKIP_DOWN, "AttnSkipDownBlock2D", SKIP_DOWN),
            up_block_types=(SKIP_UP, "AttnSkipUpBlock2D", SKIP_UP),
        ),
        ("ScoreSdeVeScheduler", {}),
    ),
}

NCSNPP_SONG = dict(
    embedding_type="fourier",
    channel_mult_noise=2,
    encoder_type="residual",
    resample_filter=[1, 3, 3, 1],
)
TINY_SONG = dict(
    img_resolution=8,
    img_channels=3,
    model_channels=4,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[4],
)

# name: options of EDMPrecond
SONG = {
    "edm-ddpmpp-tiny": dict(TINY_SONG, label_dim=3, augment_dim=9),
    "edm-ncsnpp-tiny": dict(TINY_SONG, **NCSNPP_SONG),
    "edm-ddpmpp": dict(
        img_resolution=16,
        img_channels=3,
        model_channels=16,
        channel_mult=[2, 2, 2],
        num_blocks=2,
        attn_resolutions=[8],
        augment_dim=9,
    ),
    "edm-ncsnpp": dict(
        NCSNPP_SONG,
        img_resolution=16,
        img_channels=3,
        model_channels=16,
        channel_mult=[1, 2, 2],
        num_blocks=2,
        attn_resolutions=[8],
        label_dim=10,
    ),
    "edm-skip": dict(
        img_resolution=8,
        img_channels=1,
        model_channels=8,
        channel_mult=[1, 2, 3],
        channel_mult_emb=2,
        num_blocks=1,
        attn_resolutions=[8, 2],
        encoder_type="skip",
        decoder_type="skip",
        resample_filter=[1, 3, 3, 1],
    ),
    "edm-residual-box": dict(TINY_SONG, encoder_type="residual", decoder_type="skip"),
}


def randomise(model, seed=0):
    """Draw every parameter anew, in evaluation mode and float64."""
    draw = torch.Generator().manual_seed(seed)
    model = model.double().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        fresh = torch.randn(p.shape, generator=draw, dtype=torch.float64)
        if name == "time_proj.weight":
            p.copy_(4 * fresh)
        elif p.ndim > 1:
            p.copy_(fresh / math.sqrt(p[0].numel()))
        else:
            p.copy_(0.2 * fresh + (0 if name.endswith("bias") else 1))
    for name, b in model.named_buffers():
        if name.endswith("freqs"):
            b.copy_(4 * torch.randn(b.shape, generator=draw, dtype=torch.float64))
    return model.float()


class Sinusoids(torch.nn.Module):
    """Timestep features in the precision of the timestep; diffusers' own are always float32."""

    def __init__(self, old):
        super().__init__()
        self.old = old

    def forward(self, t):
        half = self.old.num_channels // 2
        rates = torch.arange(half, dtype=t.dtype) / (half - self.old.downscale_freq_shift)
        angles = t[:, None] * torch.exp(-math.log(10000) * rates)
        parts = [torch.sin(angles), torch.cos(angles)]
        parts = parts[::-1] if self.old.flip_sin_to_cos else parts
        parts.append(torch.zeros(len(t), self.old.num_channels % 2, dtype=t.dtype))
        return torch.cat(parts, dim=-1)


def diffusers_model(name):
    """A random ``UNet2DModel`` in float32 and its scheduler."""
    import diffusers

    options, (kind, more) = DIFFUSERS[name]
    model = diffusers.UNet2DModel(**options)
    for part in model.modules():
        if type(part).__name__ == "Attention":  # the fused one has no forward derivative
            part.set_processor(diffusers.models.attention_processor.AttnProcessor())
            part.upcast_softmax = False  # to float32, that is
    return randomise(model), getattr(diffusers, kind)(**more)


def edm_model(name, checkout, kind="EDMPrecond"):
    """A random network of the EDM releases in float32, differentiable by torch.func."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from training import networks

    def weights(q, k):  # theirs has no forward derivative and rounds to float32
        return torch.einsum("ncq,nck->nqk", q, k / math.sqrt(k.shape[1])).softmax(dim=2)

    networks.AttentionOp = type("AttentionOp", (), {"apply": staticmethod(weights)})
    return randomise(getattr(networks, kind)(model_type="SongUNet", **SONG[name]))


def wide(model):
    """The same in float64 throughout."""
    model = model.double()
    if type(getattr(model, "time_proj", None)).__name__ == "Timesteps":
        model.time_proj = Sinusoids(model.time_proj)
    return model


def edm_function(model, sigma, labels):
    """The network inside the preconditioning: EDMPrecond itself always returns float32."""
    c_noise = torch.log(sigma) / 4
    return lambda x: model.model(x, c_noise, labels)


def diffusers_function(model, t, labels):
    if model.config.time_embedding_type == "fourier":  # as our network: the denoised image
        squared = t.reshape(-1, 1, 1, 1) ** 2
        return lambda x: x + squared * model(x, t, labels).sample
    return lambda x: model(x, t, labels).sample


def reference(function, shape, t, seed=1, dtype=torch.float64):
    """Input, output and Jacobian products, NHWC."""
    draw = torch.Generator().manual_seed(seed)
    x, v, u = (torch.randn(shape, generator=draw).to(dtype) for _ in range(3))
    out, pull = torch.func.vjp(function, x)
    # J v as the transpose of u -> J^T u: torch's own jvp stops at group norms of strided views.
    _, push = torch.func.vjp(lambda u: pull(u)[0], u)
    found = dict(x=x, v=v, u=u, out=out, jvp=push(v)[0], vjp=pull(u)[0])
    nhwc = {name: a.permute(0, 2, 3, 1).contiguous() for name, a in found.items()}
    return {**nhwc, "t": t}


def diffusers_inputs(model, scheduler, dtype):
    """Shape of the input, times and labels."""
    config = model.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    if config.time_embedding_type == "fourier":
        t = torch.tensor([0.05, 1.3, 40.0], dtype=dtype)
    else:
        last = scheduler.config.num_train_timesteps - 1
        last = len(scheduler.config.trained_betas or range(last + 1)) - 1
        t = torch.tensor([0, last // 3, last], dtype=dtype)
    labels = torch.arange(3) % config.num_class_embeds if config.num_class_embeds else None
    return (3, config.in_channels, height, width), t, labels


def edm_inputs(name, dtype):
    options = SONG[name]
    size, count = options["img_resolution"], options.get("label_dim", 0)
    t = torch.tensor([0.01, 0.7, 30.0], dtype=dtype)
    labels = torch.eye(count, dtype=dtype)[torch.arange(3) % count] if count else None
    return (3, options["img_channels"], size, size), t, labels


def old_names(state):
    """Attention layers as they were called before diffusers 0.12."""
    for new, old in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ):
        state = {k.replace(f".{new}.", f".{old}."): v for k, v in state.items()}
    return state


def save_diffusers(name, folder):
    """Write a pipeline's folder: the first in the old layout, the second in bfloat16."""
    model, scheduler = diffusers_model(name)
    unet = folder if name == "ddpm-tiny" else folder / "unet"
    unet.mkdir(parents=True, exist_ok=True)
    if name == "shifted-tiny":
        model = model.to(torch.bfloat16)
    state = old_names(model.state_dict()) if name == "ddpm-tiny" else model.state_dict()
    save_file(state, unet / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    model.save_config(unet)
    scheduler.save_config(folder if name == "ddpm-tiny" else folder / "scheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", type(scheduler).__name__],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shape, t, labels = diffusers_inputs(model, scheduler, torch.float64)
    found = reference(diffusers_function(wide(model), t, labels), shape, t)
    if labels is not None:
        found["labels"] = labels
    save_file(found, folder / "reference.safetensors")


def save_edm(name, checkout, folder):
    """Write the state dict and the reference."""
    model = edm_model(name, checkout)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    shape, t, labels = edm_inputs(name, torch.float64)
    found = reference(edm_function(wide(model), t, labels), shape, t)
    if labels is not None:
        found["labels"] = labels.argmax(1)
    save_file(found, folder / "reference.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edm", type=pathlib.Path, required=True, help="checkout of NVlabs/edm")
    checkout = parser.parse_args().edm
    for name in [name for name in DIFFUSERS if name.endswith("-tiny")]:
        save_diffusers(name, FOLDER / name)
    for name in [name for name in SONG if name.endswith("-tiny")]:
        save_edm(name, checkout, FOLDER / name)
    for file in sorted(FOLDER.rglob("*.*")):
        print(np.format_float_positional(file.stat().st_size / 1000, 1), "kB", file)
