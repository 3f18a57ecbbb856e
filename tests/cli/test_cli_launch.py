"""Several processes: their arguments, and real ones that agree, fail and stop together."""

import io
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image

from lowdim_diffusion import sharding
from lowdim_diffusion.cli import build, main, plan
from lowdim_diffusion.cli import launch as launcher
from lowdim_diffusion.cli.errors import CommandError
from lowdim_diffusion.cli.launch import environments
from lowdim_diffusion.cli.parse import parse_run
from lowdim_diffusion.training import checkpoint
from lowdim_diffusion.training.rundir import RunDirectory, read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNT = "--xla_force_host_platform_device_count"
SMALL = """--data.path molrg --data.num-examples 256 --train.batch-size 32 --model.name mlp
--model.width 64 --model.depth 1""".split()


# ---- arguments ----------------------------------------------------------------------------------


def test_processes_on_a_cpu_get_emulated_devices():
    base = {"XLA_FLAGS": f"--xla_a=1 {COUNT}=8", "JAX_NUM_CPU_DEVICES": "8", "HOME": "/"}
    base["CUDA_VISIBLE_DEVICES"] = ""
    found = environments(base, 2, 4)
    assert found[0] == found[1]
    assert found[0]["XLA_FLAGS"] == f"--xla_a=1 {COUNT}=4" and "JAX_NUM_CPU_DEVICES" not in found[0]
    assert environments(base, 3, None)[2]["XLA_FLAGS"] == f"--xla_a=1 {COUNT}=1"


def test_processes_share_the_gpus():
    base = {"CUDA_VISIBLE_DEVICES": "1,3,5,7,9"}
    seen = lambda *a: [env["CUDA_VISIBLE_DEVICES"] for env in environments(base, *a)]
    assert seen(2, None) == ["1,3", "5,7"]
    assert seen(3, 1) == ["1", "3", "5"]
    with pytest.raises(CommandError, match=r"2 processes with 3 GPUs each need 6, there are 5"):
        seen(2, 3)
    assert COUNT in environments({**base, "JAX_PLATFORMS": "cpu"}, 1, 1)[0]["XLA_FLAGS"]


def test_an_error_is_shown_once_whoever_comes_to_say_it(capsys):
    own = "lowdim train: error: the disk is full\n"
    repeated = "lowdim train: error: process 1: the disk is full\n"
    errors = launcher._Errors()
    launcher._pass_on(io.StringIO("warning: slow\n" + repeated), "", False, errors)
    launcher._pass_on(io.StringIO(own), "[1] ", False, errors)
    errors.end()
    assert capsys.readouterr().err == "warning: slow\n[1] " + own
    errors = launcher._Errors()  # process 1 is ended before it says anything
    launcher._pass_on(io.StringIO("warning: slow\n" + repeated), "", False, errors)
    errors.end()
    assert capsys.readouterr().err == "warning: slow\n" + repeated


@pytest.mark.parametrize(
    "argv, words",
    [
        (["launch", "--processes", "2"], "expected the command 'train'"),
        (["launch", "--", "sample"], "got 'sample'"),
        (["launch", "--procesess", "2", "train"], "did you mean --processes?"),
        (["launch", "--processes", "0", "--", "train"], "--processes must be at least 1"),
        (["launch", "train", "--optim.lrr", "1"], "did you mean --optim.lr?"),
        (["launch", "--", "train", "--distributed"], "leave them out"),
        (["train", "--distributed.process-id", "0"], "coordinator and --distributed.num-processes"),
    ],
)
def test_a_mistake_is_told_once_and_nothing_starts(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "place, words",
    [
        ("nowhere 2 0", "HOST:PORT, got 'nowhere'"),
        ("a:99999 2 0", "HOST:PORT"),
        ("a:9 2 2", "below --distributed.num-processes 2, got 2"),
    ],
)
def test_the_place_among_processes_is_checked(place, words, capsys):
    names = ("coordinator", "num-processes", "process-id")
    argv = [f"--distributed.{n}={v}" for n, v in zip(names, place.split(), strict=True)]
    assert main(["train", *argv]) == 2
    assert words in capsys.readouterr().err


def test_dry_run_counts_the_devices_of_all_processes(tmp_path, capsys):
    place = "--distributed.coordinator h:1 --distributed.num-processes 4 --distributed.process-id 3"
    argv = ["train", *SMALL, "--out", str(tmp_path / "r"), "--dry-run", *place.split()]
    assert main([*argv, "--fsdp"]) == 0
    said = capsys.readouterr().out
    assert "4 processes with 8 x cpu each, mesh (data=32), batch 32 = 1 per device" in said
    # Four times the parameters and three counters, in all; each device holds little more than 1/32.
    held, whole = re.search(
        r"state +([\d.]+) kB on every device.*, ([\d.]+) kB split", said
    ).groups()
    assert float(whole) / 32 < float(held) < float(whole) / 4
    assert "[distributed]" not in said
    assert main([*argv, "--devices", "6"]) == 2
    assert "share 4 to 32 equally" in capsys.readouterr().err


@pytest.mark.slow
def test_the_memory_estimate_is_near_what_the_compiler_says():
    parts = build.parts(
        parse_run(["--model.channels", "16"], prog="", description="", examples="").run
    )
    mesh = sharding.data_mesh(1)
    axis = P(sharding.AXIS)
    specs = dict(in_specs=(P(), axis, P()), out_specs=P(), check_vma=False)
    step = jax.jit(jax.shard_map(parts.train_step, mesh=mesh, **specs), donate_argnums=0)
    batch = jax.eval_shape(lambda: parts.batcher.batch(parts.key, 0))
    found = step.lower(jax.eval_shape(parts.init), batch, parts.key).compile().memory_analysis()
    need = plan.memory(parts, mesh)
    assert need.step == pytest.approx(found.temp_size_in_bytes, rel=0.4)
    assert need.state == pytest.approx(found.output_size_in_bytes, rel=0.01)


# ---- processes ----------------------------------------------------------------------------------


def command(*argv, out):
    return [sys.executable, "-m", "lowdim_diffusion", *argv, *SMALL, "--out", str(out)]


def environment(num_devices=1):
    flags = [f for f in os.environ["XLA_FLAGS"].split() if not f.startswith(COUNT)]
    flags = " ".join([*flags, f"{COUNT}={num_devices}"])
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def start(argv, num_devices=1):
    return subprocess.Popen(
        argv,
        env=environment(num_devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0, timeout=120):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
    return out, err


def launch(*argv, out, processes=2, devices=4):
    words = f"launch --processes {processes} --devices-per-process {devices} -- train".split()
    return start(command(*words, out=out) + list(argv))


def one(*argv, out, devices=1):
    return start(command("train", out=out) + list(argv), devices)


def state(out):
    found = checkpoint.load(out / "checkpoints")
    return {"step": found.step, **checkpoint._leaves.flatten(found.state)}


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-7, err_msg=name)


def wait_for_step(process, out):
    """Return once a checkpoint is there."""
    deadline = time.monotonic() + 100
    while not checkpoint.all_steps(out / "checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)


def children(process):
    """Return the processes that a launcher started, in their order."""
    listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    named = {}
    for pid in map(int, listed.split()):
        words = pathlib.Path(f"/proc/{pid}/cmdline").read_text()
        named[int(re.search(r"process-id=(\d+)", words)[1])] = pid
    return [named[i] for i in sorted(named)]


@pytest.mark.fault("F29")
@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_equal_eight_devices_equal_one(tmp_path):
    steps = "--train.steps 40 --checkpoint.every 20 --train.sample-every 40 --sample.num-steps 3"
    more = [*steps.split(), "--sample.num-samples", "8"]
    runs = {
        "one": one(*more, out=tmp_path / "one"),
        "eight": one(*more, out=tmp_path / "eight", devices=8),
        "two": launch(*more, out=tmp_path / "two"),
    }
    said = {name: finish(process)[0] for name, process in runs.items()}
    assert "2 processes with 4 x cpu each, mesh (data=8)" in said["two"]
    assert said["two"].count("START") == 1 and "[Gloo]" not in said["two"]
    states = {name: state(tmp_path / name) for name in runs}
    assert states["one"]["step"] == 40
    assert_close(states["one"], states["eight"])
    assert_close(states["one"], states["two"])
    rows = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    drawn = [np.load(tmp_path / n / "samples" / "step-00000040.npz")["x"] for n in ("one", "two")]
    np.testing.assert_allclose(*drawn, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_a_stream_and_stop_at_its_flaw(tmp_path):
    (tmp_path / "pictures").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (256, 4, 4)).astype(np.uint8)
    files = [tmp_path / "pictures" / f"{i}.png" for i in range(256)]
    for file, picture in zip(files, pixels, strict=True):
        Image.fromarray(picture).save(file)
    more = ["--data.path", str(tmp_path / "pictures"), "--data.stream", "on", "--train.steps", "12"]
    runs = {
        "one": one(*more, "--data.stream", "off", "--loss.data-std", "0.6", out=tmp_path / "one"),
        "two": launch(*more, "--loss.data-std", "0.6", out=tmp_path / "two", devices=2),
    }
    said = {name: finish(process)[0] for name, process in runs.items()}
    assert "kB per process: two on the devices" in said["two"]
    assert_close(*(state(tmp_path / name) for name in runs))
    sound = files[100].read_bytes()
    files[100].write_bytes(b"")
    more += ["--loss.data-std", "0.6", "--train.steps", "30"]
    said, _ = finish(launch(*more, out=tmp_path / "two", devices=2), 2)
    assert "saving step" in said
    assert 12 <= checkpoint.all_steps(tmp_path / "two" / "checkpoints")[-1] < 12 + 2 * 8
    files[100].write_bytes(sound)
    finish(launch(*more, out=tmp_path / "two", devices=2))
    finish(one(*more, "--data.stream", "off", out=tmp_path / "one"))
    assert_close(*(state(tmp_path / name) for name in runs))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_split_state_has_the_same_bits_and_moves_to_any_topology(tmp_path):
    """Eight devices; then split over 2 x 4, whole on one device, split over four."""
    # Clipping alone looks at all of the gradient at once, and adds it up in another order.
    steps = lambda n: ["--optim.clip", "0", "--train.steps", str(n)]
    started = [
        one(*steps(10), out=tmp_path / "whole", devices=8),
        one(*steps(10), "--fsdp", out=tmp_path / "moved", devices=8),
    ]
    for process in started:
        finish(process)
    whole, split = state(tmp_path / "whole"), state(tmp_path / "moved")
    assert all(np.array_equal(whole[name], split[name]) for name in whole)
    finish(launch(*steps(15), "--fsdp", out=tmp_path / "moved"))
    finish(one(*steps(20), "--no-fsdp", out=tmp_path / "moved"))
    finish(one(*steps(25), "--fsdp", out=tmp_path / "moved", devices=4))
    finish(one(*steps(25), out=tmp_path / "whole", devices=8))
    assert_close(state(tmp_path / "whole"), state(tmp_path / "moved"))


@pytest.mark.fault("F30")
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_one_alone_resumes(tmp_path, victim):
    out = tmp_path / "r"
    argv = ["--train.steps", "1000000", "--checkpoint.every", "20"]
    process = launch(*argv, out=out, devices=2)
    wait_for_step(process, out)
    pids = children(process)
    begin = time.monotonic()
    os.kill(pids[victim], signal.SIGKILL)
    _, err = finish(process, 76)
    assert time.monotonic() - begin < 15
    assert err.count("\n") == 1 and f"process {victim} died by SIGKILL" in err
    assert not pathlib.Path(f"/proc/{pids[1 - victim]}").exists()
    step = checkpoint.all_steps(out / "checkpoints")[-1]
    said, _ = finish(one("--train.steps", str(step + 5), out=out))
    assert f"START at step {step} of {step + 5}" in said


@pytest.mark.slow
@pytest.mark.distributed
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    out = tmp_path / "r"
    argv = ["--train.steps", "1000000", "--checkpoint.every", "20"]
    process = launch(*argv, out=out, devices=2)
    wait_for_step(process, out)
    os.kill(children(process)[1], signal.SIGTERM)
    said, err = finish(process, 75)
    assert "another process stops: saving step" in said and not err
    # To the launcher, which passes it on.
    process = launch(*argv, out=out, devices=2)
    wait_for_step(process, out)
    while "START" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    said, err = finish(process, 75)
    assert "saving step" in said and not err
    assert all(report.ok for report in checkpoint.verify(out / "checkpoints"))


@pytest.mark.slow
@pytest.mark.distributed
def test_an_error_of_one_process_is_that_of_all(tmp_path):
    # Only process 0 looks at the lock.
    with RunDirectory(tmp_path / "held"):
        _, err = finish(launch(out=tmp_path / "held", devices=1), 5)
    assert err.count("\n") == 1 and "in use by another process" in err
    # Only process 1 misses its data.
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{holder.getsockname()[1]}"
        place = ["--distributed.coordinator", where, "--distributed.num-processes", "2"]
        argv = [*place, "--distributed.process-id"]
        zero = one(*argv, "0", out=tmp_path / "r")
        other = one(*argv, "1", "--data.path", str(tmp_path / "none"), out=tmp_path / "r")
        _, err = finish(other, 2)
        assert "none" in err and err.count("\n") == 1
        _, told = finish(zero, 2)
    assert told.startswith("lowdim train: error: process 1: ") and err[21:] in told


@pytest.mark.fault("F31")
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_alone_gives_up(tmp_path, index):
    """No coordinator for process 1, no peers for process 0."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        place = f"""--distributed.coordinator 127.0.0.1:{holder.getsockname()[1]}
        --distributed.num-processes 2 --distributed.process-id {index}
        --distributed.initialization-timeout 3"""
        _, err = finish(one(*place.split(), out=tmp_path / "r"), 76, timeout=40)
    assert "not all processes came together" in err and err.count("\n") == 1
    assert not (tmp_path / "r").exists()
