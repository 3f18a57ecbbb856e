"""The run directory under kills, torn files, foreign files and full disks."""

import errno
import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion.training import rundir
from lowdim_diffusion.training.rundir import MetricsLog, NotARunError, RunDirectory, RunLockedError

ROOT = pathlib.Path(rundir.__file__).parents[2]


def steps_of(path):
    return [row["step"] for row in rundir.read_metrics(path)]


# --- lock and ownership --------------------------------------------------------------------------


def holder(path):
    """Another process that holds the run directory until it is told, or made, to end."""
    program = (
        "import sys\n"
        "from lowdim_diffusion.training.rundir import RunDirectory\n"
        "with RunDirectory(sys.argv[1]):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_second_process_is_refused_and_kill_leaves_no_lock(tmp_path):
    path = tmp_path / "run"
    process = holder(path)
    try:
        with pytest.raises(
            RunLockedError, match=rf"in use by another process .*pid {process.pid} on"
        ):
            RunDirectory(path).__enter__()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with RunDirectory(path):
        pass


def test_lock_is_held_once_within_a_process_too(tmp_path):
    with RunDirectory(tmp_path), pytest.raises(RunLockedError):
        RunDirectory(tmp_path).__enter__()
    with RunDirectory(tmp_path):
        pass


def test_no_locks_on_this_file_system_is_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(rundir.fcntl, "flock", refuse)
    with (
        pytest.warns(UserWarning, match="cannot be locked .No locks available"),
        RunDirectory(tmp_path),
    ):
        pass


def test_foreign_directory_is_refused_and_left_alone(tmp_path):
    for name in ("thesis.tex", "b.txt", "a.txt", "c.txt"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(
        NotARunError, match=r"not empty and not a run.*holds a.txt, b.txt, c.txt, \.\.\."
    ):
        RunDirectory(tmp_path).__enter__()
    assert len(list(tmp_path.iterdir())) == 4


def test_directories_that_are_ours_or_empty_are_taken(tmp_path):
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / "config.toml.tmp").write_text("left by a kill")
    with RunDirectory(tmp_path) as run:
        assert run.is_new
        run.write_config("a = 1")
    with RunDirectory(tmp_path) as run:
        assert not run.is_new
        run.record_versions({})
    # Copied without its hidden files.
    (tmp_path / ".lock").unlink()
    with RunDirectory(tmp_path):
        pass


def test_path_with_spaces_and_umlauts(tmp_path):
    path = tmp_path / "ein Lauf" / "größe σ=2"
    with RunDirectory(str(path)) as run, run.open_metrics(after_step=0) as log:
        log.write({"step": 1})
    assert steps_of(path / "metrics.jsonl") == [1]


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        FileExistsError, match=r"cannot write to the output directory .*file: File exists"
    ):
        RunDirectory(tmp_path / "file").__enter__()
    with pytest.raises(NotADirectoryError, match="choose another one"):
        RunDirectory(tmp_path / "file" / "run").__enter__()


def test_read_only_output(tmp_path):
    """In a process without privileges: root may write anywhere."""
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
    program = (
        "import os, sys\n"
        "from lowdim_diffusion.training.rundir import RunDirectory\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "os.chdir(sys.argv[1])\n"
        "try: RunDirectory('run').__enter__()\n"
        "except PermissionError as error: print(error)\n"
    )
    for parent in [locked, *locked.parents][:4]:
        if not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    done = subprocess.run(
        [sys.executable, "-c", program, str(locked)],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    if not done.stdout and "Permission" in done.stderr:
        pytest.skip("this Python cannot run without privileges")
    assert "cannot write to the output directory" in done.stdout, done.stderr
    assert "Permission denied; choose another one" in done.stdout


def test_other_processes_write_nothing(tmp_path):
    path = tmp_path / "run"
    with RunDirectory(path, writer=False) as run, run.open_metrics(after_step=0) as log:
        log.write({"step": 1})
        run.write_config("a = 1")
        assert run.record_versions({"jax": "1"}) == []
    assert not path.exists()


# --- small files ---------------------------------------------------------------------------------


def test_small_files_are_old_or_new(tmp_path, monkeypatch):
    with RunDirectory(tmp_path) as run:
        run.write_config("a = 'ä'\n")

        def fail(*_):
            raise OSError("power cut")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(OSError, match="power cut"):
                run.write_config("a = 2\n")
        assert not list(tmp_path.glob("*.tmp"))
        assert run.config_path.read_bytes() == "a = 'ä'\n".encode()
        run.write_config("a = 2\n")
    assert run.config_path.read_text() == "a = 2\n"
    assert not list(tmp_path.glob("*.tmp"))


def test_versions_tell_what_changed(tmp_path):
    with RunDirectory(tmp_path) as run:
        assert run.record_versions() == []
        assert run.record_versions() == []
        versions = rundir.current_versions()
        assert versions["device_count"] == 8 and versions["jax"].startswith("0.")
        assert run.record_versions(versions | {"jax": "9.9"}) == [f"jax: {versions['jax']} -> 9.9"]
        assert run.record_versions(versions | {"jax": "9.9"}) == []
        run.versions_path.write_text("{torn")
        assert run.record_versions(versions) == ["versions.json could not be read"]


def test_differences_name_every_changed_entry():
    old = {"model": {"width": 8, "mult": (1, 2)}, "seed": 0, "gone": None}
    new = {"model": {"width": 9, "mult": [1, 2]}, "seed": 0, "fresh": False}
    assert rundir.differences(old, new) == [
        "fresh: absent -> False",
        "gone: None -> absent",
        "model.width: 8 -> 9",
    ]


# --- metrics -------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, after_step=0) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": 1 / step})
    return path


def test_rows_are_plain_json(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsLog(path, after_step=0) as log:
        log.write(
            {
                "step": np.int64(1),
                "loss": jnp.float32(0.5),
                "bad": float("nan"),
                "list": np.array([1.0, np.inf]),
                "nested": {"a": np.float32(2)},
                "name": "x",
            }
        )
    row = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert row == {
        "step": 1,
        "loss": 0.5,
        "bad": None,
        "list": [1.0, None],
        "nested": {"a": 2.0},
        "name": "x",
    }


def test_resume_drops_later_rows(path):
    with MetricsLog(path, after_step=3) as log:
        log.write({"step": 4, "loss": 9.0})
    rows = rundir.read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] == 9.0


def test_from_the_start_drops_all_rows(path):
    MetricsLog(path, after_step=0)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("cut", range(1, 26))
def test_torn_last_line_is_repaired(path, cut):
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = steps_of(path)
    # A line that only lost its newline is complete.
    assert kept == ([1, 2, 3, 4, 5] if cut == 1 else [1, 2, 3, 4])
    with MetricsLog(path, after_step=10) as log:
        log.write({"step": 6})
    assert steps_of(path) == [*kept, 6]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_bytes_that_are_not_text_are_dropped(path):
    path.write_bytes(path.read_bytes() + b"\0" * 100 + b"\n\xff\xfe{]\n[1, 2]\n7\n")
    MetricsLog(path, after_step=10)
    assert steps_of(path) == [1, 2, 3, 4, 5]
    assert len(path.read_text().splitlines()) == 5


def test_sound_file_is_not_rewritten(path):
    before = path.stat()
    MetricsLog(path, after_step=5)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_rows_are_on_disk_after_flush_and_soon_without(tmp_path):
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path, after_step=0, interval_s=1000)
    log.write({"step": 1})
    assert steps_of(path) == []
    log.flush()
    assert steps_of(path) == [1]
    eager = MetricsLog(path, after_step=1, interval_s=0)
    eager.write({"step": 2})
    assert steps_of(path) == [1, 2]


def test_durable_flush_reaches_the_disk_even_if_rows_were_handed_over_before(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = MetricsLog(tmp_path / "m.jsonl", after_step=0, interval_s=0)
    log.write({"step": 1})
    assert not synced
    log.flush()
    assert len(synced) == 1
    log.flush()
    assert len(synced) == 1


def test_unwritable_metrics_warn_once_and_lose_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    with pytest.warns(UserWarning, match="cannot be written to .*Is a directory; training goes on"):
        log = MetricsLog(path, after_step=0, interval_s=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.write({"step": 1})
        log.write({"step": 2})
        log.flush()
        path.rmdir()
        log.write({"step": 3})
    assert steps_of(path) == [1, 2, 3]


class HalfWritten:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: self.room])
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_no_torn_line_behind(path, monkeypatch):
    with MetricsLog(path, after_step=5, interval_s=1000) as log:
        log.write({"step": 6})
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="No space left"):
            patch.setattr(rundir, "open", lambda *a: HalfWritten(open(*a), 7), raising=False)
            log.flush()
            log.flush()
        log.write({"step": 7})
    assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_no_file_no_rows(tmp_path):
    assert rundir.read_metrics(tmp_path / "none.jsonl") == []
