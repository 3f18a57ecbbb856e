"""Commands at work on small real runs."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest

from lowdim_diffusion.cli import build, doctor, main, toml
from lowdim_diffusion.cli.parse import parse_run
from lowdim_diffusion.cli.presets import PRESETS, preset
from lowdim_diffusion.training import checkpoint
from lowdim_diffusion.training.rundir import read_metrics

SMALL = "--preset molrg --data.num-examples 256 --train.batch-size 32 --devices 1".split()
ROOT = pathlib.Path(__file__).resolve().parents[2]


def train(out, *argv):
    return main(["train", *SMALL, "--out", str(out), *argv])


def digest(out, capsys):
    capsys.readouterr()
    assert main(["checkpoint", "digest", str(out)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "r"
    assert train(out, "--train.steps", "20", "--checkpoint.every", "8") == 0
    return out


def test_training_leaves_everything_a_later_reader_needs(trained):
    config = toml.load(trained / "config.toml")
    assert config.train.steps == 20
    # The file keeps what was given; the checkpoint has what the data decided.
    assert config.loss.data_std is None
    meta = checkpoint.load(trained / "checkpoints").meta
    assert toml.loads(meta["config"], source="meta").loss.data_std > 0
    rows = read_metrics(trained / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.fault("F02")
def test_a_run_continued_equals_a_run_in_one_go(trained, tmp_path, capsys):
    out = tmp_path / "r"
    assert train(out, "--train.steps", "9") == 0
    assert train(out, "--train.steps", "20") == 0
    said = capsys.readouterr().out
    assert "continuing" in said and "START at step 9 of 20" in said
    assert digest(out, capsys) == digest(trained, capsys)


@pytest.mark.fault("F25")
def test_a_finished_run_stays_as_it_is(trained, capsys):
    before = digest(trained, capsys)
    files = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.name == "metrics.jsonl"}
    assert main(["train", "--out", str(trained), "--devices", "1"]) == 0
    assert "done already" in capsys.readouterr().out
    assert digest(trained, capsys) == before
    assert files == {p: p.stat().st_mtime_ns for p in files}


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--seed", "1"], "seed: 0 -> 1"),
        (["--optim.lr", "0.5"], "optim.lr: 0.001 -> 0.5"),
        (["--data.seed", "5"], "data.seed: 0 -> 5"),
        (["--model.rank", "5"], "bases is float32[2,48,6]"),
    ],
)
def test_another_run_is_refused(trained, argv, words, capsys):
    before = digest(trained, capsys)
    assert train(trained, "--train.steps", "30", *argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert digest(trained, capsys) == before


def test_training_has_exit_codes_for_what_goes_wrong(tmp_path, capsys):
    assert train(tmp_path / "a", "--data.path", str(tmp_path / "nowhere")) == 2
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("mine")
    assert train(tmp_path / "b") == 2
    err = capsys.readouterr().err
    assert "thesis.tex" in err
    wild = "--model.name mlp --model.width 8 --optim.lr 1e30 --optim.clip 0 --train.steps 50"
    assert train(tmp_path / "c", *wild.split()) == 4
    err = capsys.readouterr().err
    assert re.search(r"step \d+: loss", err)


def test_a_locked_directory_is_refused(trained, capsys):
    from lowdim_diffusion.training.rundir import RunDirectory

    with RunDirectory(trained):
        assert train(trained, "--train.steps", "30") == 5
    assert "in use by another process" in capsys.readouterr().err


@pytest.mark.fault("F28")
def test_devices_and_batch_size_must_fit(tmp_path, capsys):
    count = jax.device_count()
    assert train(tmp_path / "a", "--devices", str(count + 1)) == 2
    err = capsys.readouterr().err
    assert str(count + 1) in err and f"to {count}" in err
    assert f"XLA_FLAGS=--xla_force_host_platform_device_count={count + 1}" in err
    assert train(tmp_path / "a", "--devices", "2", "--train.batch-size", "33") == 2
    err = capsys.readouterr().err
    assert "2 devices" in err and "33" in err
    assert not (tmp_path / "a").exists()


def test_verify_and_digest_find_damage(trained, tmp_path, capsys, monkeypatch):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(tmp_path)  # a relative path must do
    assert main(["checkpoint", "verify", "copy"]) == 0
    assert capsys.readouterr().out.split("\n")[-2] == "step 20  ok"
    largest = max(
        (copy / "checkpoints" / "20" / "state").rglob("*"), key=lambda p: p.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert main(["checkpoint", "verify", "copy"]) == 3
    out, err = capsys.readouterr()
    assert "step 20  DAMAGED" in out and err.count("\n") == 1
    # The digest falls back to the step before; a copy without any is code 3.
    capsys.readouterr()
    assert main(["checkpoint", "digest", "copy"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 16
    shutil.rmtree(copy / "checkpoints")
    assert main(["checkpoint", "digest", "copy"]) == 3


# ---- dry run ------------------------------------------------------------------------------------


def test_dry_run_tells_and_touches_nothing(tmp_path, capsys):
    out = tmp_path / "r"
    assert train(out, "--dry-run", "--devices", "4", "--train.steps", "100") == 0
    said = capsys.readouterr().out
    assert not out.exists()
    # 2 frames of 48 x 6; parameters, two Adam moments, the average: 4 copies and three counters.
    assert "lowrank, 576 parameters" in said
    assert "mesh (data=4), batch 32 = 8 per device" in said
    assert "100 steps, 3,200 images, 12.5 epochs" in said
    # The text is itself a config.
    again = toml.loads(said)
    assert again.train.steps == 100 and again.loss.data_std is not None


def test_dry_run_of_the_paper_size_makes_no_arrays(tmp_path, capsys):
    pictures_ = np.zeros((4, 32, 32, 3), np.uint8)
    pictures_[1:] = 255
    np.savez(tmp_path / "x.npz", x=pictures_)
    argv = ["--preset", "cifar10-paper", "--data.path", str(tmp_path / "x.npz"), "--devices", "8"]
    assert main(["train", "--dry-run", *argv]) == 0
    said = capsys.readouterr().out
    millions = int(re.search(r"unet, ([\d,]+) parameters", said)[1].replace(",", "")) / 1e6
    # EDM's CIFAR-10 network has 56 million.
    assert 40 < millions < 75
    assert "batch 512 = 64 per device" in said
    assert re.search(r"200,000,000 images|199,\d{3},\d{3} images", said)


def test_data_that_would_not_fit_are_streamed(tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "x.npy", np.arange(40 * 64, dtype=np.uint8).reshape(40, 8, 8, 1))
    argv = ["train", "--dry-run", "--data.path", str(tmp_path / "x.npy"), "--model.name", "linear"]
    assert main([*argv, "--devices", "2"]) == 0
    assert "stream" not in capsys.readouterr().out.split("# data")[1]
    monkeypatch.setattr(build, "STREAM_BYTES", 40 * 64 - 1)
    assert main([*argv, "--devices", "2"]) == 0
    said = capsys.readouterr().out
    assert "40 images 8x8x1, uint8, no labels, read lazily" in said
    # 2^14 examples in 128 steps, 64 bytes and a number each.
    assert "128 steps at a time (1.11 MB per process" in said
    assert "data 1.11 MB" in said  # half of each of two chunks on each of two devices
    assert main([*argv, "--data.on-error", "skip"]) == 2
    assert "add --data.stream on" in capsys.readouterr().err


@pytest.mark.slow
def test_a_streamed_run_is_continued_either_way(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.integers(0, 256, (40, 4, 4, 1)).astype(np.uint8))
    argv = ["train", "--data.path", str(tmp_path / "x.npy"), "--model.name", "linear"]
    argv += ["--train.batch-size", "8", "--data.held-out", "10", "--out", str(tmp_path / "run")]
    assert main([*argv, "--train.steps", "4", "--data.stream", "on"]) == 0
    assert main([*argv, "--train.steps", "6"]) == 0
    assert main([*argv, "--train.steps", "8", "--data.stream", "on"]) == 0
    assert "from step 6" in capsys.readouterr().out
    np.save(tmp_path / "x.npy", rng.integers(0, 256, (40, 4, 4, 1)).astype(np.uint8))
    for stream in ("on", "off"):
        assert main([*argv, "--train.steps", "9", "--data.stream", stream]) == 2
        assert "differs in data_" in capsys.readouterr().err


# ---- from config to objects ---------------------------------------------------------------------


def test_measured_std_agrees_with_numpy():
    from lowdim_diffusion import data

    digits = data.load("digits")
    assert build.measured_std(digits) == pytest.approx(digits.floats().std(), rel=1e-3)
    vectors = data.molrg(num_samples=500)
    assert build.measured_std(vectors) == pytest.approx(vectors.images.std(), rel=1e-3)
    # sqrt(d / n) for a mixture of rank-d Gaussians, papers' normalisation
    assert build.measured_std(vectors) == pytest.approx((6 / 48) ** 0.5, rel=0.05)
    flat = data.from_arrays(np.zeros((5, 3)))
    with pytest.raises(ValueError, match="all values of the data are equal"):
        build.measured_std(flat)


@pytest.mark.parametrize("name", ["ve", "vp-linear", "vp-cosine", "rectified-flow"])
@pytest.mark.parametrize("grid", ["karras", "log-snr", "uniform"])
def test_grids_fit_every_schedule(name, grid):
    from lowdim_diffusion.solvers._base import check_grid

    config = parse_run(
        ["--schedule.name", name, "--sample.grid", grid], prog="", description="", examples=""
    ).run
    schedule = build.schedule(config.schedule)
    ts = np.asarray(build.grid(config.sample, schedule))
    check_grid("test", schedule, ts)
    assert len(ts) == config.sample.num_steps + 1 and ts[-1] == 0


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_networks_that_can_be_made(name):
    from lowdim_diffusion import data

    config = preset(name)
    if config.model.name in ("unet", "dit"):
        shape = (
            (2, config.data.size or 32, 32, 3)
            if "cifar" in name or config.data.size
            else (2, 28, 28, 1)
        )
        made = data.from_arrays(np.zeros(shape, np.uint8), [0, 1])
    else:
        made = data.molrg(num_samples=8)
    assert build.network(config.model, made).num_params > 0


def test_labels_are_refused_where_there_are_none():
    from lowdim_diffusion import data

    config = preset("digits").model
    conditional = type(config)(name="mlp", conditional=True)
    with pytest.raises(ValueError, match="needs labels"):
        build.network(conditional, data.from_arrays(np.ones((4, 3))))
    labelled = data.molrg(num_samples=8)
    assert build.network(conditional, labelled).num_classes == 2
    with pytest.raises(ValueError, match="takes no labels"):
        build.network(type(config)(name="lowrank", conditional=True), labelled)


# ---- samples ------------------------------------------------------------------------------------


def test_samples_come_from_the_average_and_do_not_depend_on_batches(trained, tmp_path, capsys):
    base = ["sample", "--run", str(trained), "--steps", "6", "--num-samples", "10"]
    files = []
    for i, more in enumerate((["--batch-size", "10"], ["--batch-size", "4", "--devices", "2"])):
        files.append(tmp_path / f"{i}.npz")
        assert main([*base, "--out", str(files[i]), *more]) == 0
    first, second = (np.load(f) for f in files)
    assert first["x"].shape == (10, 48) and first["x"].dtype == np.float32
    assert int(first["step"]) == 20
    np.testing.assert_allclose(first["x"], second["x"], rtol=1e-4, atol=1e-5)
    assert main([*base, "--no-average", "--out", str(tmp_path / "last")]) == 0
    assert np.abs(np.load(tmp_path / "last.npz")["x"] - first["x"]).max() > 1e-4
    assert main([*base, "--checkpoint", "8", "--out", str(tmp_path / "early")]) == 0
    assert int(np.load(tmp_path / "early.npz")["step"]) == 8
    capsys.readouterr()
    assert main([*base, "--checkpoint", "9"]) == 2
    assert "only of 8, 16, 20" in capsys.readouterr().err
    assert main([*base, "--label", "1"]) == 2
    assert "trained without labels" in capsys.readouterr().err
    assert main([*base, "--guidance", "2"]) == 2
    assert "--loss.label-dropout" in capsys.readouterr().err


@pytest.mark.slow
def test_guidance_moves_samples_off_the_unconditional_ones(tmp_path, capsys):
    """The samples of one Euler step are linear in the scale; outside the interval it is 1."""
    labels = "--model.name mlp --model.width 16 --model.depth 1 --model.conditional".split()
    edm = "--model.rank None --model.num-components None --loss.parametrization edm".split()
    out = tmp_path / "r"
    argv = [*labels, *edm, "--loss.label-dropout", "0.3", "--optim.lr", "0.02"]
    assert train(out, *argv, "--train.steps", "60") == 0

    def draw(*argv):
        file = tmp_path / "x.npz"
        base = ["sample", "--run", str(out), "--num-samples", "8", "--out", str(file)]
        assert main([*base, "--solver", "euler", "--steps", "1", *argv]) == 0
        return np.load(file)["x"]

    plain, none, wide = draw(), draw("--guidance", "0"), draw("--guidance", "3")
    assert np.abs(plain - none).max() > 1e-3
    np.testing.assert_allclose(wide, none + 3 * (plain - none), atol=1e-5)
    outside = draw("--guidance", "3", "--guidance-interval", "0.1", "5")
    np.testing.assert_allclose(outside, plain, atol=1e-6)  # the one step starts at 80
    capsys.readouterr()
    assert main(["sample", "--run", str(out), "--guidance-interval", "0.1", "5"]) == 2
    assert "needs guidance" in capsys.readouterr().err


@pytest.mark.slow
def test_a_multistage_network_trains_alike_on_two_devices_and_samples(tmp_path, capsys):
    """Each device sorts its own examples by stage; the sums over both are those of one."""
    edm = "--model.rank None --model.num-components None --loss.parametrization edm".split()
    mine = "--model.name multistage_mlp --model.width 16 --model.depth 1".split()
    mine += "--model.bounds 0.3 1 --model.decoder-widths 16 8 4 --train.steps 6".split()
    sums = []
    for devices in ("1", "2"):
        out = tmp_path / devices
        assert train(out, *edm, *mine, "--devices", devices) == 0
        sums.append(digest(out, capsys)["sum"])
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert main(["sample", "--run", str(out), "--num-samples", "8", "--steps", "4"]) == 0


# ---- analysis -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_analysis_measures_and_reports(trained, capsys):
    from lowdim_diffusion import data

    argv = ["--num-samples", "12", "--num-spectra", "2", "--seed", "3"]
    assert main(["analyze", "--run", str(trained), *argv]) == 0
    said = capsys.readouterr().out
    assert str(trained / "report.html") in said
    found = dict(np.load(trained / "analysis.npz"))
    dataset = data.molrg(num_samples=256)
    # Nearest neighbours, by brute force.
    apart = np.linalg.norm(found["samples"][:, None] - dataset.images[None], axis=-1)
    np.testing.assert_allclose(found["nearest_distance"], apart.min(1), rtol=1e-4)
    np.testing.assert_array_equal(found["nearest_index"], apart.argmin(1))
    fresh, _ = dataset.truth.sample(jax.random.key(3), 12)
    far = np.linalg.norm(np.asarray(fresh)[:, None] - dataset.images[None], axis=-1).min(1)
    np.testing.assert_allclose(
        found["distance_ratio_score"], apart.min(1).mean() / far.mean(), 1e-4
    )
    assert "distance ratio: " in said and "generalization_score" not in found  # too few examples
    # 18 steps; two frames of rank 6 in dimension 48 can never show more than 12 directions.
    assert found["singular_values"].shape == (18, 2, 48)
    assert (found["rank_ratio"] <= 12 / 48 + 1e-6).all()
    # The exact denoiser's Jacobian against its closed form.
    truth, schedule = dataset.truth, build.schedule(preset("molrg").schedule)
    for level in (0, 9, 17):
        t = found["ts"][level]
        x = jax.numpy.asarray(found["trajectory"][level])
        jacobian = truth.posterior_jacobian(x, schedule.alpha(t), schedule.sigma(t))
        expected = np.linalg.svd(np.asarray(jacobian, np.float64), compute_uv=False)
        np.testing.assert_allclose(
            found["exact_singular_values"][level], expected, atol=2e-4 * expected.max()
        )
    names = [name for name in found if name.startswith("angles: ")]
    assert any("other data" in name for name in names)
    assert any("true subspace" in name for name in names)
    for name in names:
        assert (found[name] >= 0).all() and (found[name] <= np.pi / 2 + 1e-6).all()
    report = (trained / "report.html").read_text(encoding="utf-8")
    assert report.lower().startswith("<!doctype html>")
    for text in ("Configuration", "Subspaces", "lowdim sample --run"):
        assert text in report


@pytest.mark.slow
def test_training_images_are_no_new_samples_and_held_out_ones_are():
    from lowdim_diffusion import data
    from lowdim_diffusion.cli import analysis

    train, held_out = data.load("digits").split(1500)
    novel, threshold = analysis._novelty(train.floats()[:297], train.floats(), 0)
    assert novel == 0 and 0.9 < threshold < 1
    novel, _ = analysis._novelty(held_out.floats(), train.floats(), 0)
    assert novel == pytest.approx(0.99, abs=0.015)
    bad = held_out.floats() * np.nan
    assert analysis._novelty(bad, train.floats(), 0) == (None, None)


@pytest.mark.slow
def test_analysis_says_when_the_data_have_changed(trained, tmp_path, capsys):
    from lowdim_diffusion import data

    other = tmp_path / "other.npz"
    np.savez(other, x=data.molrg(num_samples=300, seed=9).images)
    argv = ["--num-samples", "4", "--num-spectra", "1", "--data", str(other)]
    assert main(["analyze", "--run", str(trained), *argv]) == 0
    assert "is not the data of this run" in capsys.readouterr().out
    assert "not those that the run was trained on" in (trained / "report.html").read_text()


@pytest.mark.slow
def test_kept_samples_are_those_whose_predictions_moved_least(trained, tmp_path, capsys):
    def draw(*argv):
        base = ["sample", "--run", str(trained), "--num-samples", "25", "--seed", "5", *argv]
        assert main([*base, "--out", str(tmp_path / "x")]) == 0
        return dict(np.load(tmp_path / "x.npz"))

    every, kept = draw(), draw("--keep", "0.7", "--keep-sigma", "0.3")
    assert "kept of 25, by the variance of predictions up to σ 0.3" in capsys.readouterr().out
    scores, rows = kept["variance"], kept["index"]
    assert len(rows) == 18 and scores[rows].max() <= np.delete(scores, rows).min()
    np.testing.assert_allclose(kept["x"], every["x"][rows], atol=1e-5)
    argv = ["sample", "--run", str(trained), "--keep", "0.7", "--keep-sigma", "0.001"]
    assert main(argv) == 2
    assert "take more steps, or raise max_sigma" in capsys.readouterr().err
    assert main(["sample", "--run", str(trained), "--keep", "1.5"]) == 2


@pytest.mark.slow
def test_memorization_names_the_examples_that_a_run_holds(tmp_path, capsys):
    """Eight vectors, one of them three times, for which a network is large enough."""
    data = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    np.savez(tmp_path / "few.npz", x=np.concatenate([data, data[2:3], data[2:3]]))
    out = tmp_path / "r"
    argv = ["--data.path", str(tmp_path / "few.npz"), "--devices", "1", "--train.steps", "1500"]
    network = "--model.name mlp --model.width 128 --model.depth 2 --optim.lr 0.002".split()
    assert main(["train", "--out", str(out), *network, *argv]) == 0
    argv = ["--num-samples", "200", "--num-spectra", "1", "--memorization"]
    assert main(["analyze", "--run", str(out), *argv]) == 0
    said = capsys.readouterr().out
    found = dict(np.load(out / "analysis.npz"))
    apart = np.linalg.norm(found["samples"][:, None] - data[None], axis=-1)
    ranked = np.sort(apart, axis=1)
    np.testing.assert_array_equal(found["is_copy"], ranked[:, 0] < ranked[:, 1] / 3)
    assert found["is_copy"].mean() > 0.5 and found["copied_rows"][0] == 2
    assert found["duplicate_of"].tolist() == [*range(8), 2, 2]
    assert f"copies: {found['is_copy'].sum()} of 200" in said
    assert f"training examples found: {len(found['copied_rows'])} of 8" in said
    assert "duplicated training examples: 1 (occur up to 3 times; 1 of them" in said
    text = (out / "report.html").read_text()
    assert "Memorized training examples" in text and "8, 9</td>" in text
    assert "is_copy" in found and found["extractable"].shape == (3,)


@pytest.mark.slow
def test_demo_goes_from_nothing_to_a_report(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--steps", "3", "--out", str(out), "--devices", "1"]) == 0
    said = capsys.readouterr().out
    assert (out / "report.html").as_uri() in said and "What to try next" in said
    assert (out / "samples" / "step3-heun-18-seed0.png").read_bytes()[:4] == b"\x89PNG"


# ---- processes ----------------------------------------------------------------------------------


def start(out, *argv, **more):
    command = [sys.executable, "-u", "-m", "lowdim_diffusion", "train", *SMALL, "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")}
    return subprocess.Popen(
        [*command, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **more,
    )


def wait_for_start(process):
    for line in process.stdout:
        if line.startswith("START"):
            return
    pytest.fail(f"training never started: {process.stderr.read()}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_ends_with_75(number, tmp_path, capsys):
    process = start(tmp_path / "r", "--train.steps", "1000000", "--checkpoint.every", "1000000")
    wait_for_start(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "Traceback" not in err and "the same command continues" in out
    step = digest(tmp_path / "r", capsys)["step"]
    assert [r["step"] for r in read_metrics(tmp_path / "r" / "metrics.jsonl")] == list(
        range(1, step + 1)
    )


@pytest.mark.fault("F27")
@pytest.mark.slow
def test_training_goes_on_when_its_reader_goes_away(tmp_path, capsys):
    process = start(tmp_path / "r", "--train.steps", "40")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert digest(tmp_path / "r", capsys)["step"] == 40


# ---- doctor -------------------------------------------------------------------------------------


def test_doctor_knows_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = lambda text: re.split(r"[>=<,\[]+", text)[:2]
    required = {name + versions for name, (versions, _) in doctor.REQUIRED.items()}
    assert required == set(project["dependencies"])
    for extra, packages in doctor.EXTRAS.items():
        listed = dict(oldest(e) for e in project["optional-dependencies"][extra])
        listed.pop(project["name"], None)
        assert packages == listed
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor._PYTHON))


def test_doctor_is_content_here(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"{jax.device_count()} x " in out
    for word in ("python", "memory", "orbax-checkpoint", "writable here", "Everything required"):
        assert word in out
    as_found = ("python ", "free disk here", "XLA_FLAGS", "JAX_")  # paths, the environment
    lines = [line for line in out.splitlines() if not line.strip().startswith(as_found)]
    assert max(map(len, lines)) <= 80


def test_doctor_says_what_is_missing(monkeypatch, capsys):
    version = doctor._version
    monkeypatch.setattr(
        doctor,
        "_version",
        lambda name: {
            "optax": None,
            "chex": "0.0.1",
            "orbax-checkpoint": "0.13.0",
            "scipy": None,
        }.get(name, version(name)),
    )
    assert main(["doctor"]) == 2
    out = capsys.readouterr().out
    assert 'optax is missing: pip install "optax>=' in out
    assert "chex 0.0.1 is too old" in out
    assert 'orbax-checkpoint 0.13.0 is too new: pip install "orbax-checkpoint>=' in out
    assert 'pip install "lowdim-diffusion[data]"' in out
