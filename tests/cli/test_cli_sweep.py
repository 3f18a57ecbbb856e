"""Sweeps: cells are checked before any starts, run side by side, are continued, not repeated."""

import csv
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from lowdim_diffusion.cli import executors, main, sweep
from lowdim_diffusion.cli.config import RunConfig
from lowdim_diffusion.cli.executors import Job
from lowdim_diffusion.cli.summary import summarize
from lowdim_diffusion.cli.toml import dumps
from lowdim_diffusion.training.rundir import RunDirectory

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = "--preset molrg --data.num-examples 64 --train.batch-size 32 --devices 1".split()


# ---- cells --------------------------------------------------------------------------------------


def grid(tmp_path, **axes):
    one = lambda value: value if isinstance(value, tuple) else (value,)
    words = {name.replace("__", "."): [one(v) for v in vs] for name, vs in axes.items()}
    return sweep.cells(words, ["--model.name", "unet"], tmp_path)


def test_cells_are_all_combinations_with_readable_names(tmp_path):
    found = grid(
        tmp_path, optim__lr=["1e-3", "3e-4"], model__channel_mult=[("1", "2"), ("1", "2", "2")]
    )
    assert [cell.name for cell in found] == [
        "lr=1e-3,channel_mult=1-2",
        "lr=1e-3,channel_mult=1-2-2",
        "lr=3e-4,channel_mult=1-2",
        "lr=3e-4,channel_mult=1-2-2",
    ]
    last = found[-1]
    assert last.values == {"optim.lr": 3e-4, "model.channel_mult": (1, 2, 2)}
    assert last.config.optim.lr == 3e-4 and last.config.model.channel_mult == (1, 2, 2)
    assert last.path == tmp_path / last.name and last.log == tmp_path / f"{last.name}.log"
    assert last.argv[-2:] == ("--out", str(last.path))


def test_names_are_safe_and_tell_equal_last_words_apart(tmp_path):
    odd = "../a b$(x);é"
    found = grid(tmp_path, data__path=[odd], data__seed=["1"], seed=["0"], data__flip=["false"])
    (cell,) = found
    assert cell.name == "path=..-a-b--x---,data.seed=1,seed=0,flip=false"
    assert cell.path.parent == tmp_path and "--data.no-flip" in cell.argv
    long = grid(tmp_path, data__path=["x" * 300, "x" * 301])
    assert len({c.name for c in long}) == 2 and all(len(c.name) < 160 for c in long)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--grid", "optim.lrr=1"], "unknown option 'optim.lrr'; did you mean optim.lr?"),
        (["--grid", "optim.lr=1,x"], "expected a number, got 'x'"),
        (["--grid", "optim.lr=1,-1"], "--optim.lr must be above 0"),
        (["--grid", "optim.lr=1,,2"], "a value is empty"),
        (["--grid", "optim.lr"], "expected NAME=VALUE"),
        (["--grid", "optim.lr=0.1,1e-1"], "two cells are the same: 0.1 and 0.1"),
        (["--grid", "optim.lr=1", "--grid=optim.lr=2"], "optim.lr is given twice"),
        (["--grid", "data.flip=maybe"], "expected true or false, got 'maybe'"),
        (["--grid", "out=a,b"], "every cell has a directory"),
        (["--grid", "seed=1", "--seeds", "2"], "exclude each other"),
        (["--grid", "seed=1", "--", "--out", "x"], "--out does not go to the cells"),
        (["--grid", "model.rank=2", "--", "--model.name", "mlp"], "belongs to --model.name"),
        (["--grid", "seed=1", "--jobs", "0"], "--jobs must be at least 1"),
        (["--grid", "seed=1", "--slurm", "time=5"], "--slurm needs --executor slurm"),
        (["--grid", "seed=1", "--executor", "slurm", "--slurm", "a=b\nc"], "expected NAME=VALUE"),
        (["--grid", "seed=1", "--executor", "slurm", "--slurm", "a;b=1"], "expected NAME=VALUE"),
        (["--grid", "seed=1", "--executor", "slurm", "--slurm", "time=1:00"], "in minutes"),
        (["--grid", "seed=1", "--executor", "slrum"], "did you mean slurm?"),
        ([], "nothing to sweep over"),
        (["--file", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--out", "s", *argv]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_run_is_no_folder_for_a_sweep(tmp_path, capsys):
    (tmp_path / "config.toml").write_text(dumps(RunConfig()))
    assert main(["sweep", "--out", str(tmp_path), "--seeds", "2"]) == 2
    assert "is a run" in capsys.readouterr().err
    assert main(["sweep", "--seeds", "2"]) == 2


def test_dry_run_lists_the_cells_of_a_file(tmp_path, capsys):
    file = tmp_path / "s.toml"
    file.write_text(
        'train = ["--model.name", "mlp"]\n[grid]\n"optim.lr" = [1e-3, 3e-4]\n'
        "[grid.data]\nflip = [true, false]\nclasses = [['3', '5'], '7']\n"
    )
    argv = ["sweep", "--out", str(tmp_path / "s"), "--file", str(file), "--dry-run"]
    assert main([*argv, "--seeds", "2", "--", "--model.width", "32"]) == 0
    out = capsys.readouterr().out
    assert "16 cells; the first one: lowdim train --model.name mlp --model.width 32" in out
    assert "lr=0.001,flip=true,classes=3-5,seed=0" in out and not (tmp_path / "s").exists()
    for text, words in (
        ("[gird]\n", "unknown key 'gird'"),
        ("[grid]\nseed = 3\n", "grid.seed: expected a list"),
        ("train = 'x'\n", "expected a list of texts"),
        ("[grid]\nsede = [1]\n", "did you mean seed"),
        ("[", "not valid TOML"),
    ):
        file.write_text(text)
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


def test_what_a_sweep_is_of_is_read_back_as_written(tmp_path):
    wanted = sweep._Sweep(
        {"optim.lr": [("1",), ("2",)], "data.classes": [("3", "5")]}, ["--a", "b"]
    )
    (tmp_path / "sweep.toml").write_text(sweep._dumps(wanted))
    assert sweep._load(tmp_path / "sweep.toml") == wanted
    assert sweep._wanted(sweep.SweepArguments(), [], tmp_path) == wanted


def test_a_cell_is_done_only_if_it_is_the_one_that_is_wanted(tmp_path):
    before = lambda steps: sweep._before(grid(tmp_path, train__steps=[steps])[0])
    assert before("20") == "new"
    cell = grid(tmp_path, train__steps=["20"])[0]
    (cell.path / "checkpoints" / "20").mkdir(parents=True)
    (cell.path / "versions.json").write_text("{}")
    (cell.path / "config.toml").write_text(dumps(cell.config))
    assert before("20") == "done"
    text = dumps(cell.config).replace("seed = 0\n", "seed = 1\n", 1)
    (cell.path / "config.toml").write_text(text)
    assert sweep._before(cell) == "changed"
    (cell.path / "checkpoints" / "20").rename(cell.path / "checkpoints" / "10")
    assert sweep._before(cell) == "stopped"
    with RunDirectory(cell.path):
        assert sweep._before(cell) == "running"


def test_loss_over_seeds_by_hand():
    row = lambda lr, seed, loss, status="done": {
        "optim.lr": lr,
        "seed": seed,
        "loss": loss,
        "status": status,
    }
    rows = [row(1, 0, 2.0), row(1, 1, 4.0), row(2, 0, 5.0), row(2, 1, 9.0, "failed")]
    first, second = sweep._over_seeds(rows, ["optim.lr"])
    assert first == {"optim.lr": 1, "seeds": 2, "mean loss": 3.0, "std": pytest.approx(2**0.5)}
    assert second == {"optim.lr": 2, "seeds": 1, "mean loss": 5.0, "std": None}
    assert sweep._over_seeds(rows[2:], ["optim.lr"]) == []


# ---- launching ----------------------------------------------------------------------------------


def job(tmp_path, name, code, *argv):
    return Job(name, (sys.executable, "-c", code, *argv), tmp_path / f"{name}.log")


def never():
    return False


def test_jobs_run_side_by_side_and_return_their_codes(tmp_path):
    code = (
        "import sys, time; begin = time.time(); time.sleep(0.3); print(begin, time.time());"
        "sys.exit(int(sys.argv[1]))"
    )
    jobs = [job(tmp_path, f"j{i}", code, str(i)) for i in range(4)]
    ended = dict(executors.local(jobs, at_once=2, stop=never))
    assert {job.name: code for job, code in ended.items()} == {"j0": 0, "j1": 1, "j2": 2, "j3": 3}
    spans = [list(map(float, j.log.read_text().splitlines()[1].split())) for j in jobs]
    most = max(sum(a <= begin < b for a, b in spans) for begin, _ in spans)
    assert most == 2


def test_no_shell_reads_what_users_write(tmp_path):
    evil = f"$(touch {tmp_path}/pwned); `touch {tmp_path}/pwned` && *"
    (ended,) = executors.local(
        [job(tmp_path, "a", "import sys; print(sys.argv[1])", evil)], at_once=1, stop=never
    )
    assert ended[1] == 0 and ended[0].log.read_text().splitlines()[1] == evil
    assert not (tmp_path / "pwned").exists()


PATIENT = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit(75));"
    "print('ready', flush=True); time.sleep(60)"
)


def until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stop_lets_running_jobs_save_and_starts_no_more(tmp_path):
    jobs = [job(tmp_path, f"j{i}", PATIENT) for i in range(3)]
    ready = lambda: all(j.log.exists() and "\nready" in j.log.read_text() for j in jobs[:2])
    ended = list(executors.local(jobs, at_once=2, stop=ready))
    assert {(j.name, code) for j, code in ended} == {("j0", 75), ("j1", 75)}
    assert not jobs[2].log.exists()


def test_leaving_early_kills_what_runs(tmp_path):
    code = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()));" + PATIENT
    jobs = [job(tmp_path, "a", code), job(tmp_path, "b", "")]
    ended = executors.local(jobs, at_once=2, stop=never)
    assert next(ended)[0].name == "b"
    until(lambda: jobs[0].log.exists() and "\nready" in jobs[0].log.read_text())
    ended.close()
    pid = int((tmp_path / "pid").read_text())
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize(
    ("gpus", "slots", "shares"),
    [
        ("0,1,2,3", 1, [None]),
        ("0,1,2,3", 2, ["0,1", "2,3"]),
        ("4,5,7", 2, ["4", "5"]),
        ("4,5", 3, ["4", "5", "4"]),
        ("", 2, [None, None]),
    ],
)
def test_jobs_share_the_gpus(gpus, slots, shares, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    found = [executors.gpu_share(slot, slots) for slot in range(slots)]
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in found] == shares
    fraction = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert [share.get(fraction) for share in found] == [
        "0.450" if slots > len(gpus.split(",")) > 1 else None for _ in found
    ]


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_submitit_runs_jobs_and_queues_again_what_is_out_of_time(
    cluster, tmp_path, request, monkeypatch
):
    """On a real SLURM, and in submitit's imitation of it; the signal is that ahead of the limit."""
    pytest.importorskip("submitit")
    if cluster == "slurm":
        monkeypatch.setenv("SLURM_CONF", request.getfixturevalue("slurm")["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    again = tmp_path / "again"
    code = (
        f"import os, signal, sys, time; again = {str(again)!r}\n"
        "if os.path.exists(again): sys.exit(0)\n"
        "def save(*a): open(again, 'w').close(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(60)"
    )
    jobs = [job(tmp_path, "a", "import sys; sys.exit(4)"), job(tmp_path, "b", code)]
    more = {"options": {}, "folder": tmp_path / "files", "cluster": cluster}
    ended = executors.slurm(jobs, at_once=2, stop=never, **more)
    first, code = next(ended)
    assert (first.name, code) == ("a", 4)
    until(lambda: jobs[1].log.exists() and "\nready" in jobs[1].log.read_text())
    if cluster == "slurm":
        listed = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True)
        subprocess.run(["scancel", "--signal=USR2", listed.stdout.split()[0]], check=True)
    else:
        (running,) = (
            int(p.name)
            for p in pathlib.Path("/proc").iterdir()
            if p.name.isdecimal() and f"submitit.core._submit\0{tmp_path}" in _command_line(p)
        )
        os.kill(running, signal.SIGUSR2)
    assert [(j.name, code) for j, code in ended] == [("b", 0)] and again.exists()


def _command_line(process):
    try:
        return (process / "cmdline").read_text(errors="replace")
    except OSError:
        return ""


@pytest.mark.slow
def test_a_stop_cancels_jobs_of_slurm_and_those_that_run_save(slurm, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("SLURM_CONF", slurm["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    jobs = [job(tmp_path, f"j{i}", PATIENT) for i in range(3)]
    ready = lambda: any(j.log.exists() and "\nready" in j.log.read_text() for j in jobs)
    more = {"options": {}, "folder": tmp_path / "files"}
    monkeypatch.setattr(executors, "_LOOK_S", 2.0)
    ended = list(executors.slurm(jobs, at_once=1, stop=ready, **more))
    assert [(j.name, code) for j, code in ended] == [("j0", 75)]
    assert not jobs[1].log.exists() and not jobs[2].log.exists()


# ---- the whole ----------------------------------------------------------------------------------


def results(out):
    with open(out / "results.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.fault("F43")
def test_a_sweep_runs_skips_what_is_done_and_repeats_what_failed(tmp_path, capsys):
    out = tmp_path / "s s"
    argv = ["sweep", "--out", str(out), "--grid", "optim.lr=1e-2,1e30", "--jobs", "2", "--"]
    argv += [*SMALL, "--model.name", "mlp", "--model.width", "8", "--optim.clip", "0"]
    assert main([*argv, "--train.steps", "20"]) == 4
    said = capsys.readouterr().out
    assert "2 cells" in said and "failed with exit code 4: step" in said
    good, bad = results(out)
    assert good["optim.lr"] == "0.01" and good["status"] == "done" and good["exit_code"] == "0"
    assert float(good["loss"]) > 0 and bad["status"] == "failed" and bad["exit_code"] == "4"
    log = out / "lr=1e-2.log"
    before = log.read_bytes()
    assert main(["sweep", "--out", str(out)]) == 4
    said = capsys.readouterr().out
    assert "1 done, 1 to run" in said and log.read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_saves_all_cells(tmp_path):
    out = tmp_path / "s"
    argv = ["sweep", "--out", str(out), "--seeds", "3", "--jobs", "2", "--"]
    argv += [*SMALL, "--train.steps", "1000000", "--checkpoint.every", "1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lowdim_diffusion", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started = lambda i: (
        (out / f"seed={i}.log").exists() and "START" in (out / f"seed={i}.log").read_text()
    )
    until(lambda: started(0) and started(1), 120)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "3 cells left" in said and not err
    assert [row["status"] for row in results(out)] == ["stopped", "stopped", "not started"]
    assert [row["exit_code"] for row in results(out)] == ["75", "75", ""]
    assert summarize(out / "seed=0").step > 0
