"""The command line: parsing, one-line errors, exit codes, help, and no jax before it is needed."""

import os
import re
import subprocess
import sys
import time

import pytest

from lowdim_diffusion.cli import errors, main, toml
from lowdim_diffusion.cli._app import COMMANDS
from lowdim_diffusion.cli.config import RunConfig, flag, options_of
from lowdim_diffusion.cli.errors import CommandError, ExitCode, explain
from lowdim_diffusion.cli.parse import parse_run
from lowdim_diffusion.cli.presets import PRESETS, preset


def parsed(*argv):
    return parse_run(argv, prog="lowdim train", description="", examples="").run


def plain_environment():
    """The environment without what the test set-up put there."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}


# ---- values -------------------------------------------------------------------------------------


def test_no_arguments_give_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed() == RunConfig() == preset("digits")


@pytest.mark.parametrize(
    "argv, name, value",
    [
        ("--seed 7", "seed", 7),
        ("--out here/x", "out", "here/x"),
        ("--devices 2", "devices", 2),
        ("--devices None", "devices", None),
        ("--data.path a.npz", "data.path", "a.npz"),
        ("--data.flip", "data.flip", True),
        ("--data.flip --data.no-flip", "data.flip", False),
        ("--data.channels 3", "data.channels", 3),
        ("--data.classes 3 5 cat", "data.classes", ("3", "5", "cat")),
        ("--model.name mlp --model.width 64", "model.width", 64),
        ("--model.channels 64 --model.channel-mult 1 2 2", "model.channel_mult", (1, 2, 2)),
        ("--model.channel-mult 1 2 2 --seed 3", "model.channel_mult", (1, 2, 2)),
        ("--model.channel_mult 4", "model.channel_mult", (4,)),
        ("--model.attention", "model.attention", ()),
        ("--preset mnist --model.attention None", "model.attention", None),
        ("--model.name lowrank --model.joint true", "model.joint", True),
        ("--train.steps=12", "train.steps", 12),
        ("--train.batch-size 16", "train.batch_size", 16),
        ("--optim.lr 3e-4", "optim.lr", 3e-4),
        ("--optim.lr 1", "optim.lr", 1.0),
        ("--optim.lr 1 --optim.lr 2", "optim.lr", 2.0),
        ("--checkpoint.every 5", "checkpoint.every", 5),
        ("--preset cifar10-paper", "train.batch_size", 512),
        ("--train.steps 5 --preset cifar10-paper", "train.steps", 5),
    ],
)
def test_options_reach_their_field(argv, name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {n: v for n, _, v in options_of(parsed(*argv.split()))}
    assert found[name] == value and type(found[name]) is type(value)


def test_order_is_defaults_preset_file_command_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[optim]\nlr = 0.5\n[train]\nsteps = 11\n")
    run = parsed("--optim.lr", "0.25", "--config", str(path), "--preset", "mnist")
    assert run.optim.lr == 0.25
    assert run.train.steps == 11
    assert run.model.channel_mult == preset("mnist").model.channel_mult
    assert run.optim.clip == RunConfig().optim.clip


def test_a_saved_run_is_continued_with_its_own_config(tmp_path):
    saved = parsed("--preset", "molrg", "--optim.lr", "0.5", "--out", "elsewhere")
    (tmp_path / "config.toml").write_text(toml.dumps(saved))
    again = parsed("--out", str(tmp_path), "--train.steps", "77")
    assert again.model == saved.model and again.optim == saved.optim
    assert again.train.steps == 77 and again.out == str(tmp_path)
    # What belonged to the run's old choice goes with it.
    assert parsed("--preset", "demo", "--train.ema-std", "0.1").train.ema is None
    # A preset or a file says that another run is meant.
    assert parsed("--out", str(tmp_path), "--preset", "digits").model == RunConfig().model


# ---- mistakes -----------------------------------------------------------------------------------

MISTAKES = [
    ("--model.chanels 3", "unknown option --model.chanels; did you mean --model.channels?"),
    ("--lr 3", "unknown option --lr; did you mean --optim.lr?"),
    ("--batch-size 3", "did you mean --train.batch-size or --sample.batch-size?"),
    ("--train.stepz=3", "unknown option --train.stepz; did you mean --train.steps?"),
    ("--zzz", "unknown option --zzz; lowdim train --help lists all"),
    ("resume", "unexpected argument 'resume'"),
    ("--data.flip true", "a switch is --data.flip or --data.no-flip"),
    ("--seed", "--seed needs a value"),
    ("--seed x", "--seed: expected a whole number, got 'x'"),
    ("--seed 1.5", "--seed: expected a whole number, got '1.5'"),
    ("--train.steps 1e3", "--train.steps: expected a whole number, got '1e3'"),
    ("--train.steps 0", "--train.steps must be at least 1, got 0"),
    ("--optim.lr -1", "--optim.lr must be above 0, got -1.0"),
    ("--optim.lr nan", "--optim.lr must be finite, got nan"),
    ("--optim.lr big", "--optim.lr: expected a number, got 'big'"),
    ("--model.channel-mult 1 x", "--model.channel-mult: expected a whole number, got 'x'"),
    ("--model.name dti", "got 'dti'; did you mean dit?"),
    ("--model.joint maybe --model.name lowrank", "expected true or false, got 'maybe'"),
    ("--model.width 3", "belongs to --model.name mlp or dit or multistage_mlp, but name is 'unet'"),
    ("--sample.churn 3 --sample.solver euler", "--sample.churn belongs to --sample.solver heun"),
    ("--sample.rho 3 --sample.grid uniform", "--sample.rho belongs to --sample.grid karras"),
    ("--optim.final 0.1", "--optim.final belongs to --optim.decay cosine or linear"),
    ("--optim.name muon --optim.beta1 0.5", "--optim.beta1 belongs to --optim.name adam"),
    ("--train.ema 0.9 --train.ema-std 0.1", "--train.ema belongs to --train.ema-std none"),
    ("--train.ema-std-second 0.1", "a second average: set --train.ema-std as well"),
    ("--sample.sigma-max 200", "noise levels go from 0.002 to 80"),
    ("--preset mnits", "unknown preset 'mnits'; did you mean mnist?"),
    ("--preset zzz", "there are digits, demo, mnist"),
    ("--preset", "--preset needs a value"),
    ("--config", "--config needs a value"),
    ("--config nowhere.toml", "nowhere.toml: No such file or directory"),
]


@pytest.mark.fault("F20")
@pytest.mark.fault("F21")
@pytest.mark.parametrize("argv, words", MISTAKES)
def test_mistakes_end_with_code_2_and_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *argv.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lowdim train: error: ") and err.count("\n") == 1
    assert words in err
    assert os.listdir(tmp_path) == []


def test_mistakes_in_a_file_name_it(capsys, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[model]\nwidht = 3\n")
    assert main(["train", "--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert f"{path}: unknown key 'model.widht'; did you mean model.width?" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "argv, words",
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["--versoin"], "unknown option '--versoin'"),
        (["doctor", "now"], "unexpected argument 'now'"),
        (["sample"], "--run is needed"),
        (["sample", "--run", "nowhere"], "no run directory nowhere"),
        (["sample", "--rnu", "x"], "unknown option --rnu; did you mean --run?"),
        (["sample", "--run", "x", "--steps", "0"], "--steps must be at least 1"),
        (["checkpoint"], "expected 'list', 'verify' or 'digest'"),
        (["checkpoint", "verify"], "takes one run directory"),
        (["checkpoint", "verify", "nowhere"], "no run directory nowhere"),
        (["checkpoint", "digest", "x", "--step", "new"], "--step: expected a whole number"),
    ],
)
def test_other_commands_speak_the_same_way(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and err.startswith("lowdim")


def test_debug_shows_the_traceback(capsys):
    assert main(["train", "--seed", "x", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "lowdim train: error: --seed" in err


# ---- exit codes ---------------------------------------------------------------------------------


def raised(error):
    try:
        raise error
    except BaseException as caught:
        return explain(caught)


def test_exit_codes_of_the_packages_errors():
    from lowdim_diffusion.data import DataError
    from lowdim_diffusion.training import checkpoint, rundir, trainer

    expected = {
        checkpoint.NoUsableCheckpointError: 3,
        checkpoint.CheckpointError: 74,
        checkpoint.NonFiniteError: 4,
        checkpoint.IncompatibleStateError: 2,
        trainer.NonFiniteLossError: 4,
        trainer.LossSpikeError: 4,
        rundir.RunLockedError: 5,
        rundir.NotARunError: 2,
        DataError: 2,
    }
    for kind, code in expected.items():
        # Raised here, outside of the package: the type alone decides where it has a code.
        found, line = raised(kind("what happened"))
        if code != 2:
            assert (found, line) == (code, "what happened"), kind


def test_exit_codes_of_python_errors():
    assert raised(CommandError("no", ExitCode.LOCKED)) == (5, "no")
    assert raised(FileNotFoundError(2, "No such file", "x.npz")) == (2, "x.npz: No such file")
    assert raised(OSError(28, "No space left on device", "a/b"))[0] == 74
    assert raised(PermissionError(13, "Permission denied", "/out"))[0] == 74
    code, line = raised(MemoryError())
    assert code == 1 and "out of memory" in line and "batch-size" in line


def test_unexpected_errors_say_what_and_where():
    code, line = raised(KeyError("loss"))
    assert code == 1
    assert "unexpected KeyError: 'loss'" in line and "test_cli_parse.py:" in line
    # A ValueError from deep inside a library is not taken for a message to the user.
    try:
        int("x")
    except ValueError as error:
        assert explain(error)[0] == 1


def test_value_errors_of_the_package_are_about_the_input():
    from lowdim_diffusion import schedules

    with pytest.raises(ValueError) as caught:
        schedules.VE(sigma_min=-1.0)
    code, line = explain(caught.value)
    assert code == 2 and "sigma_min out of range" in line


def test_interrupt_ends_quietly(monkeypatch, capsys):
    from lowdim_diffusion.cli import doctor

    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "main", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == ""


# ---- help ---------------------------------------------------------------------------------------


def test_top_help_lists_the_commands(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert out.startswith("usage: lowdim COMMAND")
        assert all(re.search(rf"^  {name} ", out, re.M) for name in COMMANDS)
        assert "\nexamples\n" in out
        assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_train_help_has_every_option_once_and_fits(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: lowdim train ")
    for name, _, _ in options_of(RunConfig()):
        assert len(re.findall(rf"^  {flag(name)}( |$)", out, re.M)) == 1, name
    for word in ("--preset", "--config", "--dry-run", "--debug", *PRESETS):
        assert word in out
    body = out[: out.index("\nexamples\n")]
    assert max(map(len, body.splitlines())) <= max(min(columns, 100), 64) + 30


def test_help_shows_the_presets_values(capsys):
    assert main(["train", "--preset", "cifar10-paper", "--help"]) == 0
    assert "[2 2 2]" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS])
def test_every_command_has_help_with_examples(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: lowdim {command}") and "\nexamples\n" in out
    assert max(map(len, out.splitlines())) <= 80
    # Texts of several lines in the code flow as one, and an empty default is none.
    texts = [line[33:] for line in out.splitlines() if re.match(r"  -| {33}\S", line)]
    assert not any("  " in text for text in texts)
    assert "[]" not in out and "[True]" not in out


# ---- start-up -----------------------------------------------------------------------------------

_PROBE = """
import sys
from lowdim_diffusion.cli import main
code = main(sys.argv[1:])
heavy = [m for m in ("jax", "flax", "optax", "orbax", "matplotlib", "numpy") if m in sys.modules]
print("HEAVY", heavy, code)
"""


@pytest.mark.parametrize(
    "argv, code",
    [
        ([], 0),
        (["--help"], 0),
        (["--version"], 0),
        (["trian"], 2),
        *[([command, "--help"], 0) for command in COMMANDS],
        *[([command, "--seedd", "3"], 2) for command in COMMANDS],
        (["train", "--seed", "x"], 2),
        (["train", "--preset", "nope"], 2),
        (["train", "--config", "nowhere.toml"], 2),
        (["sample", "--run", ""], 2),
    ],
)
def test_nothing_heavy_is_imported_before_the_arguments_have_parsed(argv, code):
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *argv],
        capture_output=True,
        text=True,
        env=plain_environment(),
    )
    assert done.stdout.splitlines()[-1] == f"HEAVY [] {code}", done.stderr
    assert done.stderr.count("\n") == (1 if code else 0)


def test_help_is_quick():
    # 0.07 s on an idle machine; the least of several, as others may be running.
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lowdim_diffusion", "--help"], capture_output=True)
        times.append(time.perf_counter() - begin)
    assert min(times) < 1.0


def test_a_closed_pipe_is_quiet():
    done = subprocess.run(
        f"{sys.executable} -m lowdim_diffusion train --help | head -n 1; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        env=plain_environment(),
    )
    assert done.stderr == ""
    first, code = done.stdout.splitlines()
    assert first.startswith("usage: lowdim train") and code in ("0", "141")


def test_error_module_knows_the_codes_by_name():
    # The names in the table are those of real classes: a renamed class must not lose its code.
    from lowdim_diffusion.training import checkpoint, rundir, trainer

    for name in errors._CODES:
        assert any(hasattr(module, name) for module in (checkpoint, rundir, trainer)), name
