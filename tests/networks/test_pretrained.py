"""Networks of other libraries: equal to torch, and clear words for what does not fit.

The files in ``fixtures/`` are written by ``make_pretrained_fixtures.py``, the references by torch
in float64. Where torch and diffusers are installed the same is checked live on more architectures;
for those of EDM set LOWDIM_EDM to a checkout of github.com/NVlabs/edm.
"""

import json
import os
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import denoisers, networks, schedules

pytest.importorskip("safetensors")
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).parent
FIXTURES = HERE / "fixtures"
DIFFUSERS = ["ddpm-tiny", "shifted-tiny", "ncsnpp-tiny"]
EDM = ["edm-ddpmpp-tiny", "edm-ncsnpp-tiny"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(folder):
    if folder.name.startswith("edm"):
        return networks.from_edm(folder / "model.safetensors")
    return networks.from_diffusers(folder)


def c_noise(found, t):
    """What the network is told at a timestep of diffusers, or at a sigma."""
    t = t + 1 if isinstance(found.schedule, schedules.Discrete) else t
    return -found.schedule.log_snr(2 * t if centred(found) else t) / 8


def centred(found):
    """Whether diffusers gives it images in [0, 1]; ours are in [-1, 1]."""
    return found.net.name == "diffusers_unet" and found.net.input_scale == "clean"


def products(found, reference, dtype):
    """Output and Jacobian products at the inputs of a reference."""
    x, v, u, t = (jnp.asarray(reference[name], dtype) for name in "xvut")
    params = jax.tree.map(lambda a: a.astype(dtype), found.params)
    cond = jnp.asarray(reference["labels"], jnp.int32) if "labels" in reference else None
    told = c_noise(found, t)

    @jax.jit
    def evaluate(params, x, v, u):
        fn = lambda y: found.net.apply(params, y, told, cond)
        if centred(found):
            fn = lambda y: (found.net.apply(params, 2 * y - 1, told, cond) + 1) / 2
        out, pull = jax.vjp(fn, x)
        return {"out": out, "jvp": jax.jvp(fn, (x,), (v,))[1], "vjp": pull(u)[0]}

    return evaluate(params, x, v, u)


def agree(got, expected, tolerance):
    for name, value in got.items():
        a, b = np.asarray(value, np.float64), np.asarray(expected[name], np.float64)
        assert a.shape == b.shape
        for i in range(len(b)):  # each noise level by itself
            assert np.abs(a[i] - b[i]).max() < tolerance * np.abs(b[i]).max(), (name, i)


# --- agreement with torch -----------------------------------------------------------------------


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in DIFFUSERS[1:] + EDM]


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFUSERS[:1] + SLOW)
def test_float32(name):
    found = load(FIXTURES / name)
    reference = load_file(FIXTURES / name / "reference.safetensors")
    agree(products(found, reference, jnp.float32), reference, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFUSERS + EDM)
def test_float64(name, x64):
    found = load(FIXTURES / name)
    reference = load_file(FIXTURES / name / "reference.safetensors")
    agree(products(found, reference, jnp.float64), reference, 1e-11)


@pytest.fixture(scope="module")
def maker():
    pytest.importorskip("torch")
    sys.path.insert(0, str(HERE))
    try:
        import make_pretrained_fixtures
    finally:
        sys.path.remove(str(HERE))
    return make_pretrained_fixtures


def live(found, maker, function, inputs):
    """Both in float32."""
    import torch

    shape, t, labels = inputs
    reference = maker.reference(function, shape, t, dtype=torch.float32)
    reference = {name: value.numpy() for name, value in reference.items()}
    if labels is not None:
        reference["labels"] = labels.numpy()
    agree(products(found, reference, jnp.float32), reference, 1e-5)


LIVE_DIFFUSERS = ["cifar10", "celebahq", "attentive", "odd", "no-middle", "ncsnpp"]
LIVE_EDM = ["edm-ddpmpp", "edm-ncsnpp", "edm-skip", "edm-residual-box", "edm-ddpmpp-tiny"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVE_DIFFUSERS)
def test_live_diffusers(name, maker, tmp_path):
    """Saved by diffusers itself, in shards."""
    pytest.importorskip("diffusers")
    import torch

    model, scheduler = maker.diffusers_model(name)
    model.save_pretrained(tmp_path / "unet", max_shard_size="60KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    scheduler.save_pretrained(tmp_path / "scheduler")
    found = networks.from_diffusers(tmp_path)
    shape, t, labels = maker.diffusers_inputs(model, scheduler, torch.float32)
    live(found, maker, maker.diffusers_function(model, t, labels), (shape, t, labels))
    if hasattr(scheduler, "alphas_cumprod"):
        table = scheduler.alphas_cumprod.numpy()
        ours = found.schedule.alpha(np.arange(1.0, 1 + len(table))) ** 2
        np.testing.assert_allclose(ours, table, rtol=2e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm-ddpmpp-tiny", "edm-ncsnpp-tiny"])
@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_live_baselines(name, kind, maker, tmp_path):
    """The whole denoiser, against the modules of the baseline releases."""
    if "LOWDIM_EDM" not in os.environ:
        pytest.skip("set LOWDIM_EDM to a checkout of github.com/NVlabs/edm")
    import torch

    model = maker.edm_model(name, os.environ["LOWDIM_EDM"], f"{kind.upper()}Precond")
    file = tmp_path / f"baseline-tiny-{kind}.safetensors"
    maker.save_file(model.state_dict(), file)
    found = networks.from_edm(file)
    shape, t, labels = maker.edm_inputs(name, torch.float32)
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=draw) * (0.5 + t[:, None, None, None])
    expected = model(x, t, labels).permute(0, 2, 3, 1).numpy()
    cond = None if labels is None else jnp.asarray(labels.argmax(1).numpy())
    got = jax.jit(denoiser(found, cond))(x.permute(0, 2, 3, 1).numpy(), t.numpy())
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVE_EDM)
def test_live_edm(name, maker, tmp_path):
    if "LOWDIM_EDM" not in os.environ:
        pytest.skip("set LOWDIM_EDM to a checkout of github.com/NVlabs/edm")
    import torch

    model = maker.edm_model(name, os.environ["LOWDIM_EDM"])
    inside = model.model if name == "edm-skip" else model
    maker.save_file(inside.state_dict(), tmp_path / "model.safetensors")
    found = networks.from_edm(tmp_path)
    shape, t, labels = maker.edm_inputs(name, torch.float32)
    function = maker.edm_function(model, t, labels)
    live(found, maker, function, (shape, t, None if labels is None else labels.argmax(1)))
    # The whole denoiser, against the whole preconditioned model.
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * (
        0.5 + t[:, None, None, None]
    )
    expected = model(x, t, labels).permute(0, 2, 3, 1).numpy()
    cond = None if labels is None else jnp.asarray(labels.argmax(1).numpy())
    denoise_fn = jax.jit(denoiser(found, cond))
    got = denoise_fn(jnp.asarray(x.permute(0, 2, 3, 1).numpy()), jnp.asarray(t.numpy()))
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


# --- the parts of a Pretrained ------------------------------------------------------------------


def denoiser(found, cond=None):
    return denoisers.from_network(
        found.net,
        found.params,
        found.schedule,
        parametrization=found.parametrization,
        data_std=found.data_std,
        cond=cond,
    )


def written_out(name, x, t, out):
    """``x_t``, ``t`` and denoised images from the network's input and output, by the papers."""
    t = t[:, None, None, None]
    if name == "ncsnpp-tiny":
        return 2 * x - 1, 2 * t, 2 * out - 1
    if name.startswith("edm"):
        std = np.sqrt(0.25 + t**2)
        return std * x, t, 0.25 / std**2 * (std * x) + 0.5 * t / std * out
    if name == "ddpm-tiny":
        kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t.astype(int)]
        return x, t + 1, (x - np.sqrt(1 - kept) * out) / np.sqrt(kept)
    f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    kept = f((t + 1) / 100) / f(0)  # but for the cap at the last of 100 steps
    kept = np.where(t == 99, f(0.99) / f(0) * 1e-3, kept)
    return x, t + 1, np.sqrt(kept) * x - np.sqrt(1 - kept) * out


# One of each kind by default.
SEEN = [pytest.param(name, marks=pytest.mark.slow) for name in ("shifted-tiny", "edm-ddpmpp-tiny")]


@pytest.mark.parametrize("name", [*DIFFUSERS[::2], *EDM[1:], *SEEN])
def test_denoiser(name):
    found = load(FIXTURES / name)
    reference = load_file(FIXTURES / name / "reference.safetensors")
    x_t, t, x0_hat = written_out(name, *(reference[part] for part in ("x", "t", "out")))
    cond = jnp.asarray(reference["labels"], jnp.int32) if "labels" in reference else None
    told = (jnp.asarray(x_t, jnp.float32), jnp.asarray(t.reshape(-1), jnp.float32))
    got = np.asarray(jax.jit(denoiser(found, cond))(*told))
    for i in range(len(t)):  # errors of the prediction grow by sigma / alpha
        size = max(np.abs(x0_hat[i]).max(), np.abs(x_t[i]).max())
        np.testing.assert_allclose(got[i], x0_hat[i], atol=2e-5 * size)


@pytest.mark.parametrize("name", DIFFUSERS + EDM)
def test_config_makes_the_same_network_again(name):
    found = load(FIXTURES / name)
    stored = json.loads(json.dumps(found.net.config))
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    again = networks.make(found.net.name, **config)
    assert again.config == found.net.config
    assert (again.input_scale, again.num_classes) == (found.net.input_scale, found.net.num_classes)
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    made = again.init(jax.random.key(0))
    assert shapes(made) == shapes(found.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {np.dtype("float32")}


def test_what_the_files_mean():
    ddpm, shifted, ncsnpp = (load(FIXTURES / name) for name in DIFFUSERS)
    assert (ddpm.parametrization, shifted.parametrization, ncsnpp.parametrization) == (
        "eps",
        "v",
        "x0",
    )
    assert ddpm.data_std == shifted.data_std == 1.0
    assert float(ddpm.schedule.sigma(1)) == pytest.approx(0.01, rel=1e-5)
    assert (ddpm.schedule.t_max, shifted.schedule.t_max) == (1000.0, 100.0)
    assert ncsnpp.schedule == schedules.VE(0.02, 100.0)  # of images in [-1, 1]
    assert ncsnpp.net.input_scale == "clean"
    assert shifted.net.num_classes == 3
    conditional, plain = (load(FIXTURES / name) for name in EDM)
    assert (conditional.net.num_classes, plain.net.num_classes) == (3, 0)
    assert conditional.schedule == schedules.VE()
    assert conditional.net.config["attention"] == (4,)
    assert plain.net.config["resample_filter"] == (1.0, 3.0, 3.0, 1.0)
    assert (plain.net.config["embedding"], plain.net.config["encoder"]) == ("fourier", "residual")
    half = networks.from_edm(FIXTURES / EDM[1] / "model.safetensors", data_std=0.25)
    assert half.data_std == 0.25


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_baselines_of_the_edm_release(kind, tmp_path):
    """By the name of their file; written out as VPPrecond and VEPrecond have it."""
    source = FIXTURES / "edm-ddpmpp-tiny" / "model.safetensors"
    plain = networks.from_edm(source)
    file = shutil.copy(source, tmp_path / f"baseline-cifar10-32x32-cond-{kind}.safetensors")
    found = networks.from_edm(file)
    sigma = np.array([0.003, 0.02, 0.03], np.float32)
    x = np.asarray(jax.random.normal(jax.random.key(0), (3, *found.net.data_shape)))
    s = sigma[:, None, None, None]
    if kind == "vp":  # sigma^2 = exp(9.95 t^2 + 0.1 t) - 1
        t = (np.sqrt(0.1**2 + 2 * 19.9 * np.log1p(sigma.astype(float) ** 2)) - 0.1) / 19.9
        inner, told, sign = x / np.sqrt(1 + s**2), 999 * t, -1
    else:
        inner, told, sign = x, np.log(sigma / 2), 1
    raw = jax.jit(plain.net.apply)(plain.params, inner, jnp.asarray(told, jnp.float32))
    got = jax.jit(denoiser(found))(x, sigma)
    assert np.abs(got - x).max() > 1e-3
    np.testing.assert_allclose(got - x, sign * s * raw, atol=2e-6)
    again = networks.make(found.net.name, **found.net.config)
    assert (
        again.input_scale
        == found.net.input_scale
        == ("clean" if kind == "ve" else plain.net.input_scale)
    )
    given = networks.from_edm(source, preconditioning=kind)
    assert given[2:] == found[2:] and given.schedule != plain.schedule


def test_other_image_size():
    found = networks.from_diffusers(FIXTURES / "ddpm-tiny", data_shape=(4, 6, 3), dtype="bfloat16")
    x = jax.ShapeDtypeStruct((2, 4, 6, 3), jnp.float32)
    assert jax.eval_shape(found.net.apply, found.params, x, 0.1).shape == (2, 4, 6, 3)
    assert found.net.config["dtype"] == "bfloat16"


def test_steps_are_found_exactly():
    """At every step of the table the network is told that very step, in float32."""
    schedule = networks.from_diffusers(FIXTURES / "ddpm-tiny").schedule
    t = jnp.arange(1.0, 1001.0, dtype=jnp.float32)
    found = jax.jit(lambda t: schedule.t_from_log_snr(-8 * (-schedule.log_snr(t) / 8)))(t)
    np.testing.assert_array_equal(found, t)


# --- bad input ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    other = shutil.ignore_patterns("reference.safetensors")
    return pathlib.Path(shutil.copytree(FIXTURES / "ddpm-tiny", tmp_path / "model", ignore=other))


def edit(file, **changes):
    stored = json.loads(file.read_text())
    stored.update(changes)
    file.write_text(json.dumps(stored))


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refused(path, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        networks.from_diffusers(path, **options)
    return str(caught.value)


def test_missing_and_unknown_tensors_are_named(folder):
    rewrite(folder / WEIGHTS, lambda t: t.pop("mid_block.resnets.1.conv1.bias"))
    refused(folder, "tensors do not fit.*: missing mid_block.resnets.1.conv1.bias.$")
    rewrite(folder / WEIGHTS, lambda t: t.update({"down_blocks.7.conv.bias": np.zeros(3, "f")}))
    message = refused(folder, "unknown down_blocks.7.conv.bias.$")
    assert "missing mid_block.resnets.1.conv1.bias" in message
    rewrite(folder / WEIGHTS, lambda t: [t.pop(k) for k in list(t) if k.startswith("up_blocks.0")])
    refused(folder, r"up_blocks.0.attentions.0.group_norm.bias.* and \d+ more")


def test_wrong_shapes_are_named(folder):
    name = "up_blocks.1.resnets.0.conv1.weight"
    rewrite(folder / WEIGHTS, lambda t: t.update({name: t[name].transpose(1, 0, 2, 3).copy()}))
    refused(folder, rf"{name} \(12, 4, 3, 3\) instead of \(4, 12, 3, 3\)")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(down_block_types=["DownBlock2D", "KDownBlock2D"]), "unsupported block type in down_"),
        (dict(up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"]), "got 'CrossAttnUpBlock2D'"),
        (dict(up_block_types=["UpBlock2D"]), "wrong number of up_block_types: expected 2"),
        (dict(down_block_types=["SkipDownBlock2D", "DownBlock2D"]), "mix Skip blocks"),
        (dict(mid_block_type="UNetMidBlock2DCrossAttn"), "unknown mid_block_type"),
        (dict(_class_name="UNet2DConditionModel"), "unsupported model class"),
        (dict(cross_attention_dim=8), "unsupported option 'cross_attention_dim'"),
        (dict(class_embed_type="timestep"), "unsupported option 'class_embed_type'"),
        (dict(time_embedding_type="learned"), "unknown time_embedding_type"),
        (dict(time_embedding_type="fourier"), "unsupported scheduler of a network with time_emb"),
        (dict(act_fn="elu"), "unknown act_fn"),
        (dict(resnet_time_scale_shift="spatial"), "unknown resnet_time_scale_shift"),
        (dict(downsample_padding=2), "unknown downsample_padding: expected one of 0, 1, got 2"),
        (dict(norm_num_groups=3), r"groups of down_blocks.0.resnets.0.norm1: expected a divisor"),
        (dict(attention_head_dim=5), "attention_head_dim: expected a divisor of the 8 channels"),
        (dict(out_channels=6), "out_channels: expected in_channels = 3, got 6"),
        (dict(sample_size=None), "no sample_size in config.json.*give data_shape"),
        (dict(sample_size=7), "image size: expected sides that are multiples of 2"),
        (dict(sample_size=[8, 8, 8]), "sample_size: expected one or two sides"),
        (dict(sample_size=-8), "data_shape"),
        (dict(sample_size="8"), "wrong value of 'sample_size': expected int | list of int | None"),
        (dict(in_channels="3"), "wrong value of 'in_channels': expected int, got '3'"),
        (dict(block_out_channels=8), "wrong value of 'block_out_channels': expected list of int"),
        (dict(block_out_channels=[4, None]), r"expected list of int, got \[4, None\]"),
        (dict(block_out_channels=[4, -8]), "block_out_channels entry too small"),
        (dict(down_block_types={"a": 1}), "wrong value of 'down_block_types'"),
        (dict(up_block_types=[3, "UpBlock2D"]), "expected list of str"),
        (dict(layers_per_block=10**9), "wrong value of 'layers_per_block'"),
        (dict(layers_per_block=10**6), "layers_per_block: expected at most 64"),
        (dict(layers_per_block=True), "wrong value of 'layers_per_block': expected int, got True"),
        (dict(norm_eps=float("nan")), "wrong value of 'norm_eps': expected float, got nan"),
        (dict(add_attention="yes"), "wrong value of 'add_attention': expected bool"),
        (dict(act_fn=["silu"]), "wrong value of 'act_fn': expected str"),
        (dict(freq_shift=2), "freq_shift out of range"),
        (dict(attn_norm_num_groups=-4), "attn_norm_num_groups too small"),
        (dict(num_class_embeds=-1), "num_classes too small"),
        (dict(dropout=2), "dropout out of range"),
        (dict(unknown="a\nb" * 999), r"unsupported option 'unknown' of UNet2DModel: .*a\\nb"),
    ],
)
def test_unsupported_config(change, match, folder):
    edit(folder / "config.json", **change)
    assert "\n" not in refused(folder, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "unsupported scheduler.*'FlowMatch"),
        (dict(_class_name="ScoreSdeVeScheduler"), "unsupported scheduler"),
        (dict(prediction_type="flow_prediction"), "unknown prediction_type"),
        (dict(beta_schedule="laplace"), "unknown beta_schedule"),
        (dict(rescale_betas_zero_snr=True), "no rescale_betas_zero_snr"),
        (dict(trained_betas=[0.1, 1.0]), "betas out of range"),
        (
            dict(trained_betas="0.1"),
            "wrong value of 'trained_betas': expected list of float | None",
        ),
        (dict(beta_start="small"), "wrong value of 'beta_start': expected float, got 'small'"),
        (dict(beta_schedule=["linear"]), "unknown beta_schedule"),
        (dict(num_train_timesteps=1e3), "wrong value of 'num_train_timesteps': expected int"),
        (dict(num_train_timesteps=10**12), "wrong value of 'num_train_timesteps'"),
        (dict(num_train_timesteps=0), "num_steps too small"),
        (dict(prediction_type={}), "unknown prediction_type"),
    ],
)
def test_unsupported_scheduler(change, match, folder):
    edit(folder / "scheduler_config.json", **change)
    refused(folder, match)


def test_missing_files(folder):
    (folder / "scheduler_config.json").unlink()
    refused(folder, r"no noise schedule: expected scheduler/scheduler_config.json.*scheduler=")
    assert networks.from_diffusers(folder, scheduler={}).schedule.t_max == 1000
    (folder / "config.json").unlink()
    refused(folder, "missing file: expected config.json, got no such file")
    (folder / "config.json").write_text("{ not json")
    refused(folder, "cannot read .*config.json: expected a JSON object")
    refused(folder / "elsewhere", "no such folder.*snapshot_download")
    shutil.copy(FIXTURES / "ddpm-tiny" / "config.json", folder)
    (folder / WEIGHTS).unlink()
    refused(folder, f"no checkpoint in .*expected {WEIGHTS}", scheduler={})


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "weights.pkl"])
def test_pickles_are_refused(name, folder):
    (folder / WEIGHTS).rename(folder / name)
    refused(folder, "pickled checkpoint.*never opened.*safetensors.torch.save_file")
    refused(folder / name, "pickled checkpoint")
    with pytest.raises(ValueError, match="pickled checkpoint"):
        networks.from_edm(folder / name)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(keep, folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    refused(folder, f"damaged .*{WEIGHTS}.*fetch it again")


def test_pickle_under_another_name(folder):
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04" + b"a pickle in a zip" * 10)
    refused(folder, "damaged")


def test_bad_values(folder):
    name = "conv_out.bias"
    rewrite(folder / WEIGHTS, lambda t: t.update({name: np.full(3, np.nan, "f")}))
    refused(folder, f"values of {name}: expected finite ones")
    rewrite(folder / WEIGHTS, lambda t: t.update({name: np.zeros(3, np.int32)}))
    refused(folder, f"dtype of {name}: expected one of F64, F32, .*, got I32")


def test_shards(folder):
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name].astype(np.float16) for name in part}, folder / file)
    (folder / WEIGHTS).unlink()
    table = {name: file for file, part in parts.items() for name in part}
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    whole = networks.from_diffusers(FIXTURES / "ddpm-tiny").params
    halves = networks.from_diffusers(folder).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), whole, halves)
    (folder / "b.safetensors").rename(folder / "c")
    refused(folder, "missing shard of .*expected b.safetensors")
    index.write_text(json.dumps({"weight_map": {"conv_in.bias": "../b.safetensors"}}))
    refused(folder, "points elsewhere: .*got '../b.safetensors'")
    index.write_text(json.dumps({}))
    refused(folder, "no weight_map")


def test_bad_edm_files(tmp_path):
    file = tmp_path / "model.safetensors"
    stored = load_file(FIXTURES / EDM[1] / "model.safetensors")

    def refused(match, **changes):
        tensors = {k: v for k, v in (stored | changes).items() if v is not None}
        save_file(tensors, file)
        with pytest.raises(ValueError, match=match):
            networks.from_edm(file)

    refused("missing dec.8x8_up.conv0.bias", **{"model.dec.8x8_up.conv0.bias": None})
    refused("unknown extra.weight", **{"model.extra.weight": np.zeros(3, "f")})
    refused(
        r"map_layer1.weight \(3, 16\) instead of \(16, 16\)",
        **{"model.map_layer1.weight": np.zeros((3, 16), "f")},
    )
    refused("unsupported network.*DhariwalUNet", **{"model.out_conv.weight": np.zeros(3, "f")})
    refused("expected a tensor enc.<size>x<size>_conv", **{"model.enc.8x8_conv.weight": None})
    refused(
        "one separable filter",
        **{"model.enc.4x4_down.conv0.resample_filter": np.eye(4)[None, None]},
    )
    refused("not a SongUNet: expected map_layer0", **{"model.map_layer0.weight": None})
    with pytest.raises(ValueError, match="no checkpoint: expected a"):
        networks.from_edm(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="data_std out of range"):
        networks.from_edm(file, data_std=0.0)


def test_library_missing(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lowdim-diffusion\[pretrained\]'"):
        networks.from_diffusers(folder)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (dict(data_shape=(8, 8, 1), encoder="residul"), "unknown encoder"),
        (dict(data_shape=(8, 6, 1)), "image size: expected a square, its side a multiple of 4"),
        (dict(data_shape=(8, 8, 1), attention=(3,)), "expected sizes among 8, 4, 2, got 3"),
        (dict(data_shape=(8, 8, 1), attention=(), resample_filter=(1, 2, 1)), "resample_filter"),
        (
            dict(data_shape=(8, 8, 1), attention=(), channels=33),
            r"channels of enc.8x8_block0.norm0",
        ),
        (dict(data_shape=(8, 8, 1), attention=(), channel_mult=()), "empty channel_mult"),
    ],
)
def test_bad_song_config(config, match):
    with pytest.raises(ValueError, match=match):
        networks.make("song_unet", **config)
