"""Exports: used where this package cannot be imported, equal to ours, and refused when damaged."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from lowdim_diffusion.cli import build, main
from lowdim_diffusion.cli.loading import load_run
from lowdim_diffusion.training import checkpoint, programs

pytest.importorskip("flatbuffers", reason="jax.export writes its files with it")

RUN = (
    "--preset molrg-mlp --data.num-examples 128 --train.batch-size 32 --devices 1 --model.width 16 "
    "--model.depth 1 --model.conditional --loss.label-dropout 0.3 --optim.lr 0.01 --train.steps 40"
).split()
# The snippet of the README, in a process that does not have the package.
ALONE = """
import os, sys
sys.modules["lowdim_diffusion"] = None
import numpy as np
results = {}
for folder, snippet, inputs in %r:
    os.chdir(folder)
    names = {}
    exec(snippet, names)
    results[folder + ":shape"] = names["out"].shape
    given = np.load(inputs)
    results[folder] = names["fn"](*(given[name] for name in given.files))
    try:
        names["fn"](*(given[name][..., None] for name in given.files))
    except ValueError as error:
        results[folder + ":error"] = str(error)
try:
    import lowdim_diffusion
except ImportError:
    np.savez(sys.argv[1], **results)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "r"
    assert main(["train", *RUN, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def exported(trained):
    """The folders of a denoiser and of a guided sampler."""
    jaxtyping.config.update("jaxtyping_disable", True)  # the checker knows no unknown sizes
    sampler = ["--solver", "ancestral", "--steps", "4", "--guidance", "2"]
    assert main(["export", "--run", str(trained), "--format", "denoiser"]) == 0
    assert main(["export", "--run", str(trained), "--format", "sampler", *sampler]) == 0
    jaxtyping.config.update("jaxtyping_disable", False)
    return trained / "export" / "denoiser-step40", trained / "export" / "sampler-step40"


@pytest.mark.slow
def test_programs_run_without_this_package_and_agree(trained, exported, tmp_path):
    draw = np.random.default_rng(0)
    inputs = [
        {
            "x_t": draw.normal(size=(7, 48)).astype(np.float32),
            "t": draw.uniform(0.1, 5, 7).astype(np.float32),
            "label": (np.arange(7) % 3).astype(np.int32),
        },
        {
            "seed": np.uint32(5),
            "index": np.arange(6, dtype=np.int32)[::-1],
            "label": np.arange(6, dtype=np.int32)[::-1] % 2,
        },
    ]
    jobs = []
    for folder, arrays in zip(exported, inputs, strict=True):
        np.savez(tmp_path / f"{folder.name}.npz", **arrays)
        (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
        jobs.append((str(folder), snippet, str(tmp_path / f"{folder.name}.npz")))
    command = [sys.executable, "-c", ALONE % (jobs,), str(tmp_path / "out.npz")]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "out.npz")

    loaded = load_run(str(trained))
    denoiser, sampler = map(str, exported)
    ours = build.denoiser(loaded.model, loaded.averaged, jnp.asarray(inputs[0]["label"]))
    expected = ours(jnp.asarray(inputs[0]["x_t"]), jnp.asarray(inputs[0]["t"]))
    np.testing.assert_allclose(found[denoiser], expected, rtol=1e-5, atol=1e-6)
    argv = ["--solver", "ancestral", "--steps", "4", "--guidance", "2", "--num-samples", "6"]
    out = ["--seed", "5", "--out", str(tmp_path / "ours.npz"), "--devices", "1"]
    assert main(["sample", "--run", str(trained), *argv, *out]) == 0
    np.testing.assert_allclose(
        found[sampler], np.load(tmp_path / "ours.npz")["x"][::-1], rtol=1e-4, atol=1e-5
    )
    for folder in (denoiser, sampler):
        assert tuple(found[f"{folder}:shape"]) == (4, 48)
        assert "ismatch for args[0]" in str(found[f"{folder}:error"])


@pytest.mark.fault("F42")
def test_our_loader_says_what_fits(exported):
    fn, about = programs.load_program(exported[0])
    assert about["step"] == 40 and about["weights"] == "ema" and "cuda" in about["platforms"]
    x, t, label = jnp.ones((3, 48)), jnp.ones(3), jnp.zeros(3, jnp.int32)
    assert fn(x, t, label).shape == (3, 48)
    for arguments, words in (
        ((x[:, :47], t, label), r"wrong x_t: expected float32\[b, 48\], got float32\[3, 47\]"),
        ((x, t, jnp.zeros(3)), r"wrong label: expected int32\[b\], got float32\[3\]"),
        ((x, t), r"wrong number of arguments: expected x_t, t, label, got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            fn(*arguments)


@pytest.mark.fault("F42")
def test_damaged_programs_are_refused(exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "p")
    content = (folder / "program.bin").read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        bad = bytearray(content)
        bad[place] ^= 1
        (folder / "program.bin").write_bytes(bad)
        with pytest.raises(ValueError, match=r"damaged .*program.bin: expected sha256"):
            programs.load_program(folder)
    (folder / "about.json").write_text("{")
    with pytest.raises(ValueError, match=r"damaged .*about.json"):
        programs.load_program(folder)
    with pytest.raises(ValueError, match="no program in"):
        programs.load_program(tmp_path)


def test_exported_weights_stand_for_the_run(trained, tmp_path, capsys):
    assert main(["export", "--run", f"{trained}@40"]) == 0
    file = trained / "export" / "step40-ema.safetensors"
    assert str(file) in capsys.readouterr().out
    more = ["--num-samples", "3", "--steps", "3", "--devices", "1"]
    for source, name in ((trained, "a"), (file, "b")):
        argv = ["sample", "--run", str(source), *more, "--out", str(tmp_path / name)]
        assert main(argv) == 0
    a, b = (np.load(tmp_path / f"{name}.npz") for name in "ab")
    np.testing.assert_array_equal(a["x"], b["x"])
    assert int(b["step"]) == 40
    nothing = ["--train.steps", "1", "--optim.lr", "1e-30", "--optim.warmup", "0"]
    argv = ["--init-from", str(file), *nothing, "--out", str(tmp_path / "fine")]
    assert main(["train", *RUN, *argv]) == 0
    weights = checkpoint.load(tmp_path / "fine" / "checkpoints").state["params"]
    expected = checkpoint.load(trained / "checkpoints").state["ema"]["0"]
    assert checkpoint.digest(weights) == checkpoint.digest(expected)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert main(["sample", "--run", str(file), *more]) == 2
    err = capsys.readouterr().err
    assert "damaged" in err and err.count("\n") == 1


@pytest.mark.slow
def test_averages_of_any_width_are_made_after_training(tmp_path, capsys):
    """That of a run which tracked this width, from checkpoints of one that tracked two others."""
    train = lambda name, *options: main(["train", *RUN, *options, "--out", str(tmp_path / name)])
    every = ["--checkpoint.every", "4", "--checkpoint.keep-every", "4"]
    widths = ["--train.ema-std", "0.05", "--train.ema-std-second", "0.1"]
    assert train("two", *widths, *every) == 0
    assert train("one", "--train.ema-std", "0.15") == 0
    capsys.readouterr()
    assert main(["export", "--run", str(tmp_path / "two"), "--ema-std", "0.15"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"average of width 0.15 from 0.05 and 0.1 at 10 checkpoints, \d\S* % off", out)
    made = load_run(str(tmp_path / "two" / "export" / "step40-ema0.15.safetensors")).params
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    wanted = flat(load_run(str(tmp_path / "one")).averaged)
    kept = checkpoint.load(tmp_path / "two" / "checkpoints").state["ema"]
    error = np.linalg.norm(flat(made) - wanted)
    assert all(error < 0.1 * np.linalg.norm(flat(tree) - wanted) for tree in kept.values())


def test_export_refuses_what_makes_no_sense(trained, tmp_path, capsys):
    for argv, words in (
        (["--steps", "3"], "--steps belongs to --format sampler"),
        (["--out", str(tmp_path / "w.npz")], ".safetensors"),
        (["--format", "sampler", "--solver", "eular"], "did you mean euler"),
        (["--ema-std", "0.1"], "train with --train.ema-std 0.05 --train.ema-std-second 0.1"),
        (["--ema-std", "0.1", "--no-average"], "--no-average takes the last parameters"),
    ):
        assert main(["export", "--run", str(trained), *argv]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert main(["export", "--run", str(tmp_path / "nowhere")]) == 2


def test_about_is_json_for_others(exported):
    about = json.loads(pathlib.Path(exported[1], "about.json").read_text())
    assert about["inputs"]["index"] == {"shape": ["b"], "dtype": "int32"}
    assert (about["solver"], about["num_steps"]) == ("ancestral", 4)
