"""Damaged, missing, foreign and full: what is on the disk is not what was written there."""

import functools
import os
import shutil
import subprocess

import fault_processes as fp
import pytest
import sabotage

from lowdim_diffusion.training import checkpoint

pytestmark = pytest.mark.slow


def newest(run):
    return run / "checkpoints" / "15"


def wipe(path):
    shutil.rmtree(path)
    path.mkdir()


# ---- damaged checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: sabotage.flip(sabotage.largest_file(path)), id="flipped"),
        pytest.param(lambda path: sabotage.halve(sabotage.largest_file(path)), id="truncated"),
        pytest.param(lambda path: sabotage.largest_file(path).unlink(), id="file deleted"),
        pytest.param(lambda path: shutil.rmtree(path / "state"), id="item deleted"),
        pytest.param(wipe, id="empty"),
    ],
)
@pytest.mark.fault("F08")
@pytest.mark.fault("F10")
@pytest.mark.fault("F11")
@pytest.mark.fault("F12")
def test_the_step_before_a_damaged_one_is_used(whole, half, damage):
    damage(newest(half))
    done = fp.train(half)
    fp.succeeds(done, ["checkpoint of step 15 is damaged"])
    assert "moved to damaged-15, using step 10" in done.err
    assert (half / "checkpoints" / "damaged-15").is_dir()
    assert "START at step 10 of 20" in done.out
    fp.same_run(half, whole)


@pytest.mark.fault("F13")
def test_an_old_step_that_is_half_deleted_is_no_obstacle(whole, half):
    shutil.rmtree(half / "checkpoints" / "5" / "state")
    fp.succeeds(fp.train(half))
    fp.same_run(half, whole)


@pytest.mark.fault("F14")
def test_never_from_zero_in_silence(half):
    for step in (5, 10, 15):
        sabotage.flip(sabotage.largest_file(half / "checkpoints" / str(step)))
    before = fp.snapshot(half)
    for _ in range(2):
        fp.fails_clearly(fp.train(half), 3, "step 15: ", "step 10: ", "step 5: ", "another output")
        assert fp.snapshot(half) == before


@pytest.mark.fault("F15")
@pytest.mark.fault("F24")
def test_junk_and_a_torn_line_are_swept_aside(whole, half):
    folder = half / "checkpoints"
    (folder / ".DS_Store").write_text("x")
    (folder / "notes.txt").write_text("x")
    (folder / "30").write_text("a file with the name of a step")
    (folder / "31").symlink_to(folder / "5")
    (folder / "17.orbax-checkpoint-tmp").mkdir()
    with open(half / "metrics.jsonl", "a") as file:
        file.write('{"step": 16, "loss": 0.1}\n{"step": 17, "lo')
    fp.succeeds(fp.train(half))
    assert (folder / "notes.txt").exists() and (folder / "31").is_symlink()
    fp.same_run(half, whole)


@pytest.mark.fault("F41")
def test_steps_are_ordered_by_number_whatever_the_clock_says(whole, half):
    for step in (5, 10, 15):
        os.utime(half / "checkpoints" / str(step), (2_000_000_000 - step,) * 2)
    back = functools.partial(sabotage.clock_set_back, 400 * 86400.0)
    fp.succeeds(fp.train(half, steps=17, sabotage=[back]))
    done = fp.train(half)
    fp.succeeds(done)
    assert "START at step 17 of 20" in done.out
    assert checkpoint.all_steps(half / "checkpoints") == [15, 17, 20]
    fp.same_run(half, whole)


# ---- full, read-only, failing -------------------------------------------------------------------


class Disk:
    """A small file system in memory."""

    def __init__(self, path):
        self.path = path

    def remount(self, options):
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.fault("F16")
@pytest.mark.parametrize("kind", ["bytes", "names"])
def test_a_full_disk_keeps_what_there_is_and_goes_on_later(whole, _half, disk, kind):
    """Bytes run out before a save begins, which is foreseen; names run out in the middle of it."""
    run = shutil.copytree(_half, disk.path / "run")
    if kind == "bytes":
        free = shutil.disk_usage(disk.path).free
        (disk.path / "ballast").write_bytes(bytes(free - 50_000))
    else:
        used = os.statvfs(disk.path)
        disk.remount(f"nr_inodes={used.f_files - used.f_ffree + 12}")
    before = fp.steps_of(run)
    words = ("step 20 was not saved", "free some space" if kind == "bytes" else "disk is full")
    fp.fails_clearly(fp.train(run), 74, *words)
    assert fp.steps_of(run) == before == [5, 10, 15]
    if kind == "bytes":
        (disk.path / "ballast").unlink()
    else:
        disk.remount("nr_inodes=10000")
    fp.succeeds(fp.train(run))
    fp.same_run(run, whole)


@pytest.mark.fault("F17")
def test_a_read_only_disk_is_told_before_training(whole, _half, disk):
    run = shutil.copytree(_half, disk.path / "run")
    disk.remount("ro")
    for out in (run, disk.path / "new"):
        done = fp.train(out)
        fp.fails_clearly(done, 74, str(out), "Read-only file system", "choose another")
        assert "START" not in done.out
    disk.remount("rw")
    fp.succeeds(fp.train(run))
    fp.same_run(run, whole)


@pytest.mark.fault("F16")
def test_a_disk_that_is_full_from_the_start(disk):
    (disk.path / "ballast").write_bytes(bytes(shutil.disk_usage(disk.path).free))
    done = fp.train(disk.path / "run")
    fp.fails_clearly(done, 74, str(disk.path / "run"), "No space left on device")
    assert "START" not in done.out
    (disk.path / "ballast").unlink()
    fp.succeeds(fp.train(disk.path / "run"))


@pytest.mark.fault("F44")
def test_samples_that_cannot_be_written_are_told_at_their_step(whole, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "versions.json").write_text("{}")
    (run / "samples").write_text("a file, where a directory should be")
    done = fp.train(run, "--train.sample-every", "10", "--sample.num-steps", "2")
    fp.fails_clearly(done, 74, str(run / "samples"))
    assert fp.steps_of(run) == [5, 10]
    (run / "samples").unlink()
    fp.succeeds(fp.train(run))
    fp.same_run(run, whole)


@pytest.mark.fault("F39")
def test_a_failing_save_stops_the_training_soon(whole, half):
    """Not at the end: a long training must not go on without any hope of being saved."""
    fail = functools.partial(sabotage.fail_saves, 20)
    slow = functools.partial(sabotage.slow_steps, 0.3)
    done = fp.train(half, steps=100, sabotage=[fail, slow])
    fp.fails_clearly(done, 74, "step 20 was not saved", "Input/output error")
    assert fp.steps_of(half) == [5, 10, 15]
    rows = (half / "metrics.jsonl").read_text().count("\n")
    assert 20 <= rows <= 30
    fp.succeeds(fp.train(half))
    fp.same_run(half, whole)


@pytest.mark.fault("F44")
def test_metrics_that_cannot_be_written_cost_a_warning_not_the_run(whole, tmp_path):
    run = tmp_path / "run"
    (run / "metrics.jsonl").mkdir(parents=True)
    (run / "tensorboard").write_text("a file, where a directory should be")
    (run / "versions.json").write_text("{}")
    done = fp.train(run, "--train.tensorboard")
    told = ["metrics cannot be written", "TensorBoard"]
    fp.succeeds(done, [*told])
    assert checkpoint.digest(run / "checkpoints") == checkpoint.digest(whole / "checkpoints")


@pytest.mark.fault("F16")
@pytest.mark.parametrize("how", ["removed", "moved"])
def test_a_directory_that_goes_away_is_told_at_the_next_save(whole, half, how):
    slow = functools.partial(sabotage.slow_steps, 0.5)
    process = fp.begin(half, sabotage=[slow])
    process.wait_for("START")
    away = half.with_name("away")
    half.rename(away)
    if how == "removed":
        shutil.rmtree(away)
    done = process.finish()
    fp.fails_clearly(done, 74, "step 20 was not saved", warnings=done.err.count(": warning: "))
    assert "Traceback" not in done.err
    if how == "moved":
        fp.succeeds(fp.train(away))
        fp.same_run(away, whole)


def test_a_config_that_is_no_longer_one_is_named(whole, half):
    (half / "config.toml").write_bytes(b"[train]\nsteps = 20\n[opt")
    before = fp.snapshot(half)
    fp.fails_clearly(fp.train(half), 2, str(half / "config.toml"), "not valid TOML")
    assert fp.snapshot(half) == before
    (half / "config.toml").unlink()
    fp.succeeds(fp.train(half))
    fp.same_run(half, whole)


# ---- data ---------------------------------------------------------------------------------------


@pytest.fixture
def own_data(tmp_path):
    import numpy as np

    path = tmp_path / "data.npz"
    np.savez(path, x=np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8))
    return path


def test_data_damaged_in_the_middle_of_an_epoch(own_data, tmp_path):
    """It was read before training began; continuing says what is wrong with it."""
    more = ["--data.path", str(own_data)]
    fp.succeeds(fp.train(tmp_path / "whole", *more))
    slow = [functools.partial(sabotage.slow_steps, 0.1)]
    process = fp.begin(tmp_path / "run", *more, sabotage=slow)
    process.wait_for("START")
    sound = own_data.read_bytes()
    sabotage.flip(own_data)
    fp.succeeds(process.finish())
    fp.same_run(tmp_path / "run", tmp_path / "whole")
    before = fp.snapshot(tmp_path / "run")
    fp.fails_clearly(fp.train(tmp_path / "run", *more, steps=30), 2, str(own_data), "damaged")
    assert fp.snapshot(tmp_path / "run") == before
    own_data.write_bytes(sound)
    fp.succeeds(fp.train(tmp_path / "run", *more, steps=30))


@pytest.mark.fault("F37")
def test_other_data_under_the_same_name_are_refused(own_data, tmp_path):
    import numpy as np

    more = ["--data.path", str(own_data), "--loss.data-std", "0.5"]
    fp.succeeds(fp.train(tmp_path / "run", *more))
    np.savez(own_data, x=np.random.default_rng(1).integers(0, 256, (64, 8, 8, 1), np.uint8))
    before = fp.snapshot(tmp_path / "run")
    fp.fails_clearly(fp.train(tmp_path / "run", *more, steps=30), 2, "data_sha256", "another --out")
    assert fp.snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("damage", [sabotage.flip, sabotage.halve])
def test_a_picture_that_goes_bad_in_mid_epoch(tmp_path, damage):
    pictures = folder_of_pictures(tmp_path / "pictures")
    more = ["--data.path", str(pictures), "--data.stream", "on", "--loss.data-std", "0.5"]
    fp.succeeds(fp.train(tmp_path / "whole", *more))
    fp.succeeds(fp.train(tmp_path / "run", *more, steps=6))
    victim = pictures / "17.png"  # one of the next 64 that are drawn, after half an epoch
    sound = victim.read_bytes()
    damage(victim)
    fp.fails_clearly(fp.train(tmp_path / "run", *more), 2, "17.png", "example 17")
    assert 6 <= fp.steps_of(tmp_path / "run")[-1] < 12
    shutil.copytree(tmp_path / "run", tmp_path / "skip")
    victim.write_bytes(sound)
    fp.succeeds(fp.train(tmp_path / "run", *more))
    fp.same_run(tmp_path / "run", tmp_path / "whole")
    damage(victim)
    for steps in (20, 30):
        done = fp.train(tmp_path / "skip", *more, "--data.on-error", "skip", steps=steps)
        fp.succeeds(done, ["left out"])
        assert "17.png" in done.err


def folder_of_pictures(path):
    import numpy as np
    from PIL import Image

    path.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8)).astype(np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(path / f"{i}.png")
    return path


# ---- compilation cache --------------------------------------------------------------------------


@pytest.mark.fault("F40")
def test_a_damaged_compilation_cache_is_compiled_anew(whole, half, tmp_path):
    cache = tmp_path / "cache"
    env = fp.environment(JAX_COMPILATION_CACHE_DIR=str(cache))
    start = functools.partial(fp.command, env=env)
    fp.succeeds(fp.train(half, steps=17, start=start))
    entries = sorted(path for path in cache.rglob("*") if path.is_file())
    acts = (sabotage.flip, sabotage.halve, lambda path: path.write_bytes(b""))
    for number, path in enumerate(entries):
        acts[number % 3](path)
    done = fp.train(half, start=start)
    assert done.code == 0 and "Traceback" not in done.err
    # One line for each entry that was wanted: the damage was met.
    assert len(done.err.splitlines()) >= 5
    assert all("compilation cache" in line for line in done.err.splitlines()), done.err
    fp.same_run(half, whole)
