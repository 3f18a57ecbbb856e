"""Which checkpoints stay, the held-out loss, another optimizer, guards: from the command line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowdim_diffusion import training
from lowdim_diffusion.cli import build, main, toml
from lowdim_diffusion.training import checkpoint
from lowdim_diffusion.training.rundir import read_metrics

SMALL = "--preset molrg --data.num-examples 160 --train.batch-size 32 --devices 1".split()
HELD = "--data.held-out 50 --checkpoint.every 5 --checkpoint.keep 1".split()


def train(out, *argv):
    return main(["train", *SMALL, *HELD, "--out", str(out), *argv])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "r"
    policy = "--checkpoint.keep-every 10 --checkpoint.keep-best 2".split()
    # A learning rate this large makes the held-out loss go up and down.
    assert train(out, *policy, "--train.steps", "35", "--optim.lr", "0.3") == 0
    return out


@pytest.mark.slow
def test_newest_best_and_milestones_stay(trained, capsys):
    rows = read_metrics(trained / "metrics.jsonl")
    losses = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    assert list(losses) == [5, 10, 15, 20, 25, 30, 35]
    best = sorted(losses, key=losses.get)[:2]
    assert checkpoint.all_steps(trained / "checkpoints") == sorted({10, 20, 30, 35, *best})
    assert checkpoint.best(trained / "checkpoints") == best[0]
    assert main(["checkpoint", "list", str(trained)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.endswith("best"))
    assert line.startswith(f"step {best[0]} ") and f"{losses[best[0]]:.6g}" in line
    assert lines[-1].startswith("step 35 ") and "newest" in lines[-1]


@pytest.mark.slow
def test_held_out_examples_are_apart_and_their_loss_is_without_chance(trained):
    config = toml.load(trained / "config.toml")
    parts = build.parts(config)
    seen, held_out = build._datasets(config.data)
    assert (seen.num_examples, held_out.num_examples) == (110, 50)
    together = np.concatenate([seen.images, held_out.images])
    whole = build._load(config.data).images
    np.testing.assert_array_equal(np.unique(together, axis=0), np.unique(whole, axis=0))
    # The batches of training hold none of them.
    index = jnp.arange(32)
    drawn = [parts.batcher.examples(parts.batcher.arrays, parts.key, i, index) for i in range(4)]
    rows = {row.tobytes() for batch in drawn for row in np.asarray(batch["x"])}
    assert not rows & {row.tobytes() for row in held_out.images}
    # In two parts of 32, the second filled up, or in one: the same mean over the 50.
    step = checkpoint.load(trained / "checkpoints")
    averaged = jax.tree.map(jnp.asarray, step.state["ema"]["0"])
    row = read_metrics(trained / "metrics.jsonl")[-1]
    found = float(parts.held_out_loss(averaged))
    assert found == row["held_out_loss"] == checkpoint.scores(trained / "checkpoints")[35]
    model = parts.model
    stratified = toml.loads("[loss]\nstratified = true\n", base=model.config).loss
    loss_fn = build.loss(stratified, model.net, model.schedule, 50)
    losses = jax.jit(loss_fn)(averaged, {"x": jnp.asarray(held_out.images)}, jax.random.key(0))
    assert found == pytest.approx(float(losses.mean()), rel=1e-5)


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--data.held-out 0 --checkpoint.keep-best 1", "--data.held-out, 500"),
        ("--data.held-out 160", "leaves nothing to train on"),
        ("--checkpoint.keep-every 7", "a multiple of --checkpoint.every 5"),
        ("--train.max-skips 3", "belongs to --train.on-nonfinite skip"),
    ],
)
def test_policies_that_cannot_be_are_refused(tmp_path, argv, words, capsys):
    assert train(tmp_path / "r", *argv.split()) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "r").exists()


@pytest.mark.slow
@pytest.mark.fault("F36")
def test_another_optimizer_starts_anew_only_when_asked_to(trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "r")
    more = ["train", "--out", str(out), "--train.steps", "40"]
    sgd = "--optim.name sgd --optim.lr 1e-30 --optim.warmup 0".split()
    assert main([*more, *sgd]) == 2
    err = capsys.readouterr().err
    assert "opt_state/1/0/count" in err and "--reset-optimizer" in err and err.count("\n") == 1
    assert main([*more, "--optim.lr", "0.1"]) == 2
    assert "optim.lr: 0.3 -> 0.1" in (err := capsys.readouterr().err) and "--reset-opt" in err
    assert main([*more, "--seed", "1", "--reset-optimizer"]) == 2
    assert "seed: 0 -> 1" in (err := capsys.readouterr().err) and "--reset-opt" not in err
    assert main([*more, *sgd, "--reset-optimizer"]) == 0
    assert "the optimizer and its learning rate start anew" in capsys.readouterr().out
    before, after = (checkpoint.load(r / "checkpoints").state for r in (trained, out))
    # A learning rate of nothing: the weights are those of the checkpoint still.
    np.testing.assert_array_equal(before["params"]["bases"], after["params"]["bases"])
    assert int(after["step"]) == 40 and "mu" not in str(after["opt_state"])
    assert main([*more, "--train.steps", "41"]) == 0  # without the flag: a run like any other


def test_a_run_from_before_an_option_existed_continues(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "r")
    root = out / "checkpoints"
    found = checkpoint.load(root)
    del found.meta["fixed"]["data"]["flip"], found.meta["fixed"]["optim"]["accumulate"]
    with checkpoint.Checkpointer(root) as checkpointer:
        checkpointer.save(36, {**found.state, "step": np.int32(36)}, found.meta)
    assert main(["train", "--out", str(out), "--train.steps", "37"]) == 0
    assert main(["train", "--out", str(out), "--train.steps", "38", "--data.flip"]) == 2


@pytest.mark.slow
def test_skips_from_the_command_line(tmp_path, capsys):
    wild = "--model.name mlp --model.width 8 --optim.lr 1e30 --optim.clip 0 --train.steps 50"
    skip = "--train.on-nonfinite skip --train.max-skips 4".split()
    assert train(tmp_path / "r", *wild.split(), *skip) == 4
    err = capsys.readouterr().err
    assert "stopped after 4 skipped updates in a row" in err and err.count("\n") == 1
    rows = read_metrics(tmp_path / "r" / "metrics.jsonl")
    assert [row["skipped"] for row in rows[-5:]] == [1, 2, 3, 4, 5]
    about = json.loads((tmp_path / "r" / "bad_batch.json").read_text())
    assert about["step"] == rows[-1]["step"] and len(about["rows"]) == 32


# ---- fine-tuning --------------------------------------------------------------------------------


def weights_of(run, name="params"):
    state = checkpoint.load(run / "checkpoints").state
    return state["params"] if name == "params" else state["ema"]["0"]


@pytest.mark.slow
def test_a_new_run_starts_with_the_weights_of_another(trained, tmp_path, capsys):
    nothing = "--train.steps 1 --optim.lr 1e-30 --optim.warmup 0 --seed 5".split()
    for source, argv, step, name in (
        (f"{trained}@10", ["--init-weights", "params"], 10, "params"),
        (f"{trained}@best", [], checkpoint.best(trained / "checkpoints"), "ema"),
    ):
        out = tmp_path / name
        assert train(out, "--init-from", source, *argv, *nothing) == 0
        assert f"weights of {source}, step {step} ({name})" in capsys.readouterr().out
        state = checkpoint.load(trained / "checkpoints", step).state
        expected = state["params"] if name == "params" else state["ema"]["0"]
        np.testing.assert_array_equal(weights_of(out)["bases"], expected["bases"])
        meta = checkpoint.load(out / "checkpoints").meta
        assert meta["init"] == {
            "from": str(trained),
            "step": step,
            "weights": name,
            "digest": checkpoint.digest(expected)["digest"],
        }
    # It continues without its source, remembers it, and no other can take its place.
    assert main(["train", "--out", str(out), "--train.steps", "2"]) == 0
    assert checkpoint.load(out / "checkpoints").meta["init"] == meta["init"]
    assert main(["train", "--out", str(out), "--train.steps", "3", "--init-from", "x"]) == 2
    assert "init_from: " in capsys.readouterr().err


def test_weights_that_do_not_fit_are_named_and_left_only_when_asked_to(trained, tmp_path, capsys):
    other = ["--init-from", str(trained), "--model.num-components", "3", "--train.steps", "1"]
    assert train(tmp_path / "a", *other) == 2
    err = capsys.readouterr().err
    assert "bases is float32[2,48,6] there, float32[3,48,6] here" in err and err.count("\n") == 1
    assert train(tmp_path / "a", *other, "--init-partial") == 2
    assert "no leaf of the weights fits" in capsys.readouterr().err
    assert train(tmp_path / "a", "--init-from", str(tmp_path / "nowhere")) == 2
    assert train(tmp_path / "a", "--init-from", f"{trained}@11") == 2
    assert "only of 10, 20" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_transfer_takes_what_fits():
    old = {"a": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "c": jnp.ones(2)}
    new = {"a": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3, jnp.bfloat16)}, "d": jnp.zeros(2)}
    with pytest.raises(checkpoint.IncompatibleStateError, match=r"a/b is float32\[3\] there, bfl"):
        training.transfer(old, new)
    params, left = training.transfer(old, new, partial=True)
    assert list(left) == ["a/b", "c", "d"] and left["d"] == "absent there, float32[2] here"
    assert params["a"]["w"].sum() == 6 and params["a"]["b"].sum() == 0 and "c" not in params


# ---- memory -------------------------------------------------------------------------------------


def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(training.trainer, "compile_loop", full)
    assert train(tmp_path / "r", "--optim.accumulate", "4") == 1
    err = capsys.readouterr().err
    assert "out of memory on cpu: the state takes" in err and err.count("\n") == 1
    assert "8 examples are worked through at once (--train.batch-size 32 on 1 devices" in err
    assert "--optim.accumulate 4" in err and "--sample.batch-size 64" in err
