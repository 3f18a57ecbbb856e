"""Runs are told apart by what their directories hold, whatever state they are in."""

import csv
import fcntl
import io
import json
import os
import threading

import pytest

from lowdim_diffusion.cli import main, summary, tables
from lowdim_diffusion.cli.summary import differing, find, last_loss, summarize
from lowdim_diffusion.training.rundir import RunDirectory, RunLockedError


def make(path, *, steps=200, trained=200, saved=200, lr=1e-3, end="", **more):
    """A run directory without its arrays."""
    path.mkdir(parents=True)
    lines = ["seed = 0", "[optim]", f"lr = {lr}", "[train]", f"steps = {steps}"]
    (path / "config.toml").write_text("\n".join([*more.pop("top", []), *lines]) + "\n")
    rows = [{"step": i, "images": 8 * i, "loss": 1 + 1 / i} for i in range(1, trained + 1)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(text + end)
    stats = [{"step": 50 * i, "images_per_s": 100.0 * i} for i in (1, 2, 9)]
    (path / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stats))
    if saved:
        leaves = path / "checkpoints" / str(saved) / "leaves"
        leaves.mkdir(parents=True)
        table = {"params/w": {"shape": [3, 5]}, "params/b": {"shape": []}, "step": {"shape": []}}
        (leaves / "metadata").write_text(json.dumps({"content": {"leaves": table}}))
        (path / "checkpoints" / f"{saved + 50}.orbax-checkpoint-tmp").mkdir()
        (path / "checkpoints" / f"damaged-{saved + 50}").mkdir()
    return path


def test_what_a_finished_run_says(tmp_path):
    found = summarize(make(tmp_path / "a"))
    assert (found.status, found.step, found.num_steps, found.note) == ("done", 200, 200, "")
    assert found.loss == pytest.approx(sum(1 + 1 / i for i in range(191, 201)) / 10)
    assert found.images_per_s == 200 and found.num_params == 16
    assert found.config["optim.lr"] == 1e-3 and found.config["optim.warmup"] == 100  # the default


@pytest.mark.parametrize(
    ("options", "status", "note"),
    [
        ({"trained": 150, "saved": 150}, "stopped", ""),
        ({"trained": 170, "saved": 150}, "failed", "newest checkpoint is of step 150"),
        ({"trained": 170, "saved": None}, "failed", "no checkpoint"),
        ({"trained": 160, "saved": 150, "end": '{"step": 161, "loss": null}\n'}, "failed", "161"),
        ({"trained": 150, "saved": 150, "end": '{"step": 151, "lo'}, "stopped", ""),
        ({"steps": 400}, "stopped", ""),
        ({"top": ["not toml ["]}, "stopped", "not valid TOML"),
        ({"top": ["\x00"]}, "stopped", "not valid TOML"),
        ({"trained": 0, "end": "\x00\x01 no rows"}, "done", "no rows"),
    ],
)
def test_states_of_runs(tmp_path, options, status, note):
    found = summarize(make(tmp_path / "a", **options))
    assert found.status == status and note in found.note and bool(note) == bool(found.note)
    assert (found.loss is None) == (note in ("161", "no rows"))  # a loss that blew up has no mean


def test_odd_contents_are_no_error(tmp_path):
    path = make(tmp_path / "a", end='[1]\n{"step": "x", "loss": true}\n{"loss": 1e999}\n')
    (path / "checkpoints" / "200" / "leaves" / "metadata").write_text('{"content": []}')
    (path / "stats.jsonl").write_text('{"images_per_s": "fast"}\n')
    found = summarize(path)
    assert found.status == "done" and found.num_params is found.images_per_s is None
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".lock").write_text("")
    (tmp_path / "b" / "metrics.jsonl").mkdir()
    assert summarize(tmp_path / "b").status == "failed"


def test_a_training_is_seen_and_not_disturbed(tmp_path):
    """Asking who holds the lock never refuses a training its start."""
    path = tmp_path / "a"
    with RunDirectory(path):
        assert summarize(path).status == "running"
        with pytest.raises(RunLockedError):
            RunDirectory(path).__enter__()
    assert summarize(path).status == "failed"
    asking = os.open(path / ".lock", os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    threading.Timer(0.02, os.close, [asking]).start()
    with RunDirectory(path):
        pass


def test_runs_are_found_and_the_rest_is_named(tmp_path):
    for name in ("s/lr=1", "s/lr=2", "alone"):
        make(tmp_path / name)
    (tmp_path / "s" / "logs").mkdir()
    (tmp_path / "s" / "alias").symlink_to(tmp_path)
    paths = [str(tmp_path / name) for name in ("s", "alone", "nowhere", "s")]
    runs, problems = find(paths)
    assert [p.name for p in runs] == ["lr=1", "lr=2", "alone"]
    assert len(problems) == 3 and "logs" in problems[0] and "nowhere is not there" in problems[1]


def test_the_command_shows_what_differs(tmp_path, capsys):
    make(tmp_path / "a", lr=1e-3)
    make(tmp_path / "b", lr=3e-4, trained=150, saved=100)
    assert main(["runs", str(tmp_path), "--sort", "loss"]) == 0
    out, err = capsys.readouterr()
    head, *rows = out.splitlines()
    assert head.split() == "run status step loss images/s parameters written optim.lr".split()
    assert [row.split()[0] for row in rows] == ["a", "b"] and rows[1].split()[-1] == "0.0003"
    assert "b: ended without saving" in err
    assert main(["runs", str(tmp_path), "--format", "csv"]) == 0
    first, second = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert first["optim.lr"] == "0.001" and second["step"] == "150" and second["num_steps"] == "200"
    assert float(first["loss"]) == pytest.approx(1.0051, abs=1e-4) and "saving" in second["note"]
    argv = ["runs", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "json"]
    assert main([*argv, "--keys", "train.steps"]) == 0
    assert [r["train.steps"] for r in json.loads(capsys.readouterr().out)] == [200, 200]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], "nowhere is not there"),
        (["--curves", "a.gif"], "expected a file .png"),
        (["--sort", "los"], "did you mean loss"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    assert main(["runs", *argv]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_curves(tmp_path, capsys, suffix):
    make(tmp_path / "a")
    make(tmp_path / "b", trained=0, saved=None)
    file = tmp_path / f"c.{suffix}"
    assert main(["runs", str(tmp_path), "--curves", str(file), "--x", "images"]) == 0
    content = file.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "html": b"<!doctype html>"}[suffix])
    assert summary.losses(tmp_path / "a", "images")[0][-1] == 1600


def test_table_on_a_terminal_takes_the_columns_that_fit(capsys):
    rows = [{"run": "a", "x": 1, "y": "w" * 30, "z": True}]
    assert tables.fitting(rows, ["x", "y", "z"], 20) == ["x", "z"]
    tables.write(rows, "table")
    assert "true" in capsys.readouterr().out
    assert tables.cell("/" + "a" * 50) == "…" + "a" * 39
    assert tables.render([{"a": [1, 2]}, {"a": False}], "csv") == "a\n1 2\nfalse\n"
    assert differing([{"a": 1, "out": "x"}, {"a": 1, "out": "y"}]) == []


def test_last_loss_is_of_the_end_of_training():
    falling = [(step, 3001.0 - step) for step in range(1, 3001)]
    assert last_loss(falling[:100]) == (2903.0, "mean of the last 5 steps")
    assert last_loss(falling) == (50.5, "mean of the last 100 steps")
    assert last_loss([]) is None
