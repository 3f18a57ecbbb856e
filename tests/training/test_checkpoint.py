"""Faults on real checkpoint directories: nothing damaged, foreign or half written is loaded."""

import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lowdim_diffusion import training
from lowdim_diffusion.training import checkpoint as cp

FORMAT_1 = pathlib.Path(__file__).with_name("format-1")


def make_state(seed=0, width=8, optimizer=None, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "encoder": {
            "kernel": jax.random.normal(keys[0], (4, width), dtype),
            "bias": jnp.full((width,), -0.0),
        },
        "scale": jax.random.normal(keys[1], ()),
    }
    optimizer = optimizer or optax.adamw(1e-3)
    return {
        "params": params,
        "ema": jax.tree.map(lambda x: (x * 0.9).astype(jnp.bfloat16), params),
        "opt_state": optimizer.init(params),
        "step": jnp.int32(seed),
        "key": keys[2],
    }


def plain(state):
    return jax.tree.map(
        lambda x: np.asarray(jax.random.key_data(x) if cp._leaves.is_key(x) else x), state
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(plain(a)), jax.tree.leaves(plain(b)), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def write_run(root, steps=(1, 2, 3), **options):
    with cp.Checkpointer(root, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"seed": step})


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    write_run(root, (1, 2))
    return root


@pytest.fixture
def root(golden, tmp_path):
    """A private copy of two sound steps, in a directory whose name is not friendly."""
    return shutil.copytree(golden, tmp_path / "Läufe mit Leerzeichen" / "checkpoints")


def restore(root, target=None):
    """As the trainer does: through a checkpointer, damaged steps moved aside."""
    with cp.Checkpointer(root) as checkpointer:
        return checkpointer.restore_latest(make_state(99) if target is None else target)


def files_of(root, step):
    return sorted(path for path in (root / str(step)).rglob("*") if path.is_file())


# --- round trips ---------------------------------------------------------------------------------


def test_round_trip_is_bitwise_and_keeps_types(tmp_path):
    state = make_state(3) | {
        "odd": [jnp.array([jnp.inf, 1.0])[1:], np.float32(2.5), np.arange(3), 7, 0.1, True],
        "best": jnp.inf,
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 2),
        "small": jnp.array([1, -2], jnp.int4),
        "complex": jnp.array([1 + 2j]),
        "nothing": None,
    }
    with cp.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(state) is None
        checkpointer.save(3, state, {"when": (1, np.int64(2)), "where": tmp_path})
        found = checkpointer.restore_latest(state)
    assert found.step == 3
    assert_same(found.state, state)
    assert [type(x) for x in jax.tree.leaves(found.state)] == [
        type(x) for x in jax.tree.leaves(state)
    ]
    assert found.meta == {
        "when": [1, 2],
        "where": str(tmp_path),
        "step": 3,
        "score": None,
        "format_version": cp.FORMAT_VERSION,
    }


def test_target_may_be_abstract(root):
    found = restore(root, jax.eval_shape(lambda: make_state(99)))
    assert_same(found.state, make_state(2))


def test_load_needs_no_structure(root):
    step, state, meta = cp.load(root)
    assert (step, meta["seed"]) == (2, 2)
    np.testing.assert_array_equal(
        state["params"]["encoder"]["kernel"], make_state(2)["params"]["encoder"]["kernel"]
    )
    assert jnp.array_equal(
        jax.random.key_data(state["key"]), jax.random.key_data(make_state(2)["key"])
    )
    assert cp.load(root, 1).meta["seed"] == 1
    with pytest.raises(cp.NoUsableCheckpointError, match="no checkpoint of step 7"):
        cp.load(root, 7)


def test_state_may_be_donated_and_overwritten_during_the_save(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"params": {"w": jnp.arange(300_000.0)}}
    on_host = np.arange(300_000.0)
    with cp.Checkpointer(tmp_path, keep=10) as checkpointer:
        for step in range(10):
            checkpointer.save(step, state | {"host": on_host}, {})
            state = advance(state)
            on_host += 1
    for step in range(10):
        saved = cp.load(tmp_path, step).state
        np.testing.assert_array_equal(saved["params"]["w"], np.arange(300_000.0) + step)
        np.testing.assert_array_equal(saved["host"], np.arange(300_000.0) + step)


def test_devices_may_change_between_save_and_restore(tmp_path):
    states = {}
    with cp.Checkpointer(tmp_path) as checkpointer:
        for step, (count, spec) in enumerate(
            [(1, ()), (8, ()), (2, ("data",)), (8, ("data",)), (1, ())]
        ):
            mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
            whole = NamedSharding(mesh, PartitionSpec())
            split = NamedSharding(mesh, PartitionSpec(*spec))

            def put(state, whole=whole, split=split):
                state = jax.device_put(state, whole)
                bias = jax.device_put(state["params"]["encoder"]["bias"], split)
                state["params"]["encoder"]["bias"] = bias
                return state

            target = put(make_state(99))
            if step:
                found = checkpointer.restore_latest(target)
                assert_same(found.state, states[step - 1])
                same = jax.tree.map(lambda a, b: a.sharding == b.sharding, found.state, target)
                assert all(jax.tree.leaves(same))
            states[step] = put(make_state(step))
            checkpointer.save(step, states[step], {})
    digests = {cp.digest(tmp_path)["digest"], cp.digest(make_state(4))["digest"]}
    assert len(digests) == 1


def test_digest_is_the_documented_one():
    w, b = np.array([[1.0, -2.0]], np.float32), np.array(3, np.int32)
    hashed = [hashlib.sha256(x.tobytes()).hexdigest() for x in (b, w)]
    text = f"params/b int32[] {hashed[0]}\nparams/w float32[1,2] {hashed[1]}\n"
    found = cp.digest({"params": {"w": jnp.asarray(w), "b": jnp.asarray(b)}}, step=4)
    assert found == {"step": 4, "digest": hashlib.sha256(text.encode()).hexdigest(), "sum": 6.0}


def test_digest_of_a_directory_is_that_of_the_state(root):
    assert cp.digest(root) == cp.digest(make_state(2), step=2)
    assert cp.digest(root, step=1) == cp.digest(make_state(1), step=1)
    assert cp.digest(make_state(1))["digest"] != cp.digest(make_state(2))["digest"]


# --- rotation and order --------------------------------------------------------------------------


def test_rotation_keeps_the_latest_and_the_milestones(tmp_path):
    write_run(tmp_path, range(1, 12), keep=2, keep_every=5)
    assert cp.all_steps(tmp_path) == [5, 10, 11]
    assert list((tmp_path / "trash").iterdir()) == []
    assert list(tmp_path.glob("*tmp*")) == []


def test_rotation_keeps_the_best(tmp_path):
    given = {1: 0.5, 2: 0.2, 3: 0.4, 4: None, 5: float("nan"), 6: 0.2, 7: 0.9, 8: 0.8}
    for steps in (range(1, 4), range(4, 9)):  # a second start knows the scores of the first
        with cp.Checkpointer(tmp_path, keep=1, keep_best=2) as checkpointer:
            for step in steps:
                checkpointer.save(step, make_state(step), {}, score=given[step])
                checkpointer.wait()
                so_far = sorted(
                    (given[s], s) for s in range(1, step + 1) if given[s] and given[s] == given[s]
                )
                expected = {step, *(s for _, s in so_far[:2])}
                assert cp.all_steps(tmp_path) == sorted(expected)
    assert cp.scores(tmp_path) == {2: 0.2, 6: 0.2, 8: 0.8} and cp.best(tmp_path) == 2
    flip(0.5)(tmp_path / "2" / "meta" / "metadata")
    assert cp.best(tmp_path) == 6 and cp.best(tmp_path / "nowhere") is None


def test_steps_are_ordered_by_number_not_by_time(root):
    with cp.Checkpointer(root) as checkpointer:
        checkpointer.save(10, make_state(10), {})
        checkpointer.wait()
        os.utime(root / "10", (0, 0))
        for file in files_of(root, 10):
            os.utime(file, (0, 0))
        assert checkpointer.restore_latest(make_state(99)).step == 10


def test_a_step_is_never_written_twice(root):
    with cp.Checkpointer(root) as checkpointer:
        for step in (2, 1):
            with pytest.raises(
                cp.CheckpointError, match=rf"step {step} was not saved.*holds step 2"
            ):
                checkpointer.save(step, make_state(7), {})
        checkpointer.save(2, make_state(7), {}, force=True)
        with pytest.raises(cp.CheckpointError, match="step 1 was not saved"):
            checkpointer.save(1, make_state(7), {}, force=True)
    assert_same(restore(root).state, make_state(2))


def test_save_outside_the_block_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="with Checkpointer"):
        cp.Checkpointer(tmp_path).save(1, make_state(), {})


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep_every": 0}, {"keep_best": -1}])
def test_rotation_settings_are_checked(tmp_path, options):
    with pytest.raises(ValueError, match=r"at least 1|keep_best"):
        cp.Checkpointer(tmp_path, **options)


# --- states that cannot be stored ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (jnp.zeros((0, 3)), ValueError, r"leaf bad is empty, shape \(0, 3\)"),
        ("text", TypeError, "leaf bad is a str"),
        (np.array(["a"]), TypeError, "leaf bad has dtype <U1"),
        (np.array([None]), TypeError, "leaf bad has dtype object"),
        (jnp.array([1.0, jnp.nan]), cp.NonFiniteError, "bad holds NaN or infinity"),
        (jnp.array([1.0, -jnp.inf], jnp.bfloat16), cp.NonFiniteError, "bad holds NaN"),
        (jnp.nan, cp.NonFiniteError, "bad holds NaN"),
        (np.array([np.inf, 0.0]), cp.NonFiniteError, "bad holds NaN"),
    ],
)
def test_state_that_cannot_be_stored_is_refused(root, leaf, error, message):
    with pytest.raises(error, match=message), cp.Checkpointer(root) as checkpointer:
        checkpointer.save(3, make_state(3) | {"bad": leaf}, {})
    assert cp.all_steps(root) == [1, 2]


def test_numbers_whose_squares_overflow_are_finite(tmp_path):
    with cp.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": np.array([1e30, -3e38], np.float32)}, {})
    assert cp.all_steps(tmp_path) == [1]


def test_names_must_be_unique(tmp_path):
    with cp.Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="two leaves"):
        checkpointer.save(1, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {})


def test_meta_must_be_json(tmp_path):
    with (
        cp.Checkpointer(tmp_path) as checkpointer,
        pytest.raises(TypeError, match="meta holds a set"),
    ):
        checkpointer.save(1, make_state(), {"a": {1, 2}})


# --- damage --------------------------------------------------------------------------------------


def damage_every_file(golden, root, damage):
    """Apply one damage to each file of the newest step in turn; return what each led to."""
    outcomes = {}
    for file in files_of(golden, 2):
        shutil.rmtree(root)
        shutil.copytree(golden, root)
        name = file.relative_to(golden / "2").as_posix()
        damage(root / "2" / name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = restore(root)
        told = [str(w.message) for w in caught if "damaged" in str(w.message)]
        # Whatever happened to the bytes, what is handed out is one of the two written states.
        assert_same(found.state, make_state(found.step))
        assert found.meta["seed"] == found.step
        if found.step == 1:
            assert len(told) == 1 and "checkpoint of step 2 is damaged" in told[0]
            assert (root / "damaged-2").is_dir() and cp.all_steps(root) == [1]
        else:
            assert not told and cp.all_steps(root) == [1, 2]
        outcomes[name] = found.step
    return outcomes


def flip(offset):
    def damage(path):
        data = bytearray(path.read_bytes())
        if data:
            data[int(offset * (len(data) - 1))] ^= 0x10
        path.write_bytes(data)

    return damage


@pytest.mark.fault("F09")
@pytest.mark.parametrize("offset", [0.0, 0.3, 0.77, 1.0])
def test_bit_flip_in_any_file_is_noticed_or_harmless(golden, root, offset):
    outcomes = damage_every_file(golden, root, flip(offset))
    assert outcomes["leaves/metadata"] == outcomes["meta/metadata"] == 1
    assert outcomes["state/manifest.ocdbt"] == 1


@pytest.mark.fault("F10")
@pytest.mark.fault("F11")
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), id="half"),
        pytest.param(lambda p: p.write_bytes(b""), id="empty"),
        pytest.param(lambda p: p.unlink(), id="deleted"),
    ],
)
def test_truncated_and_deleted_files_are_noticed_or_harmless(golden, root, damage):
    outcomes = damage_every_file(golden, root, damage)
    assert outcomes["leaves/metadata"] == outcomes["meta/metadata"] == 1


@pytest.mark.slow
def test_random_bit_flips_are_noticed_or_harmless(golden, root):
    draw = random.Random(0)
    for _ in range(10):
        damage_every_file(golden, root, flip(draw.random()))


def test_data_of_another_step_is_noticed(golden, root):
    """All checks inside the array store pass: the bytes are sound, but not those of this step."""
    shutil.rmtree(root / "2" / "state")
    shutil.copytree(golden / "1" / "state", root / "2" / "state")
    with pytest.warns(UserWarning, match=r"step 2 is damaged .the bytes of leaf"):
        assert restore(root).step == 1


def test_renamed_step_is_noticed(golden, root):
    shutil.copytree(golden / "1", root / "7")
    with pytest.warns(UserWarning, match=r"step 7 is damaged .*belongs to step 1"):
        assert restore(root).step == 2


@pytest.mark.parametrize("gutted", ["state", "leaves", "meta", "."])
def test_half_deleted_newest_step(root, gutted):
    shutil.rmtree(root / "2" / gutted)
    (root / "2").mkdir(exist_ok=True)
    with pytest.warns(UserWarning, match="step 2 is damaged"):
        assert restore(root).step == 1
    write_run(root, (2, 3, 4, 5))
    assert cp.all_steps(root) == [3, 4, 5]


def test_half_deleted_old_step_is_no_obstacle(root):
    shutil.rmtree(root / "1" / "state")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restore(root).step == 2
    write_run(root, (3, 4, 5, 6))
    assert cp.all_steps(root) == [4, 5, 6]


def test_nothing_usable_is_an_error_now_and_later(root):
    for step in (1, 2):
        flip(0.5)(root / str(step) / "leaves" / "metadata")
    before = sorted(path.name for path in root.iterdir())
    for _ in range(2):
        with pytest.raises(cp.NoUsableCheckpointError, match=r"step 2: .*step 1: "):
            restore(root)
    assert sorted(path.name for path in root.iterdir()) == before
    with pytest.raises(cp.NoUsableCheckpointError):
        cp.load(root)


def test_only_steps_moved_aside_is_not_a_fresh_start(root):
    flip(0.5)(root / "2" / "leaves" / "metadata")
    with pytest.warns(UserWarning, match="moved to damaged-2"):
        restore(root)
    shutil.rmtree(root / "1")
    with pytest.raises(cp.NoUsableCheckpointError, match="damaged-2"):
        restore(root)


def test_damaged_steps_are_never_lost(root):
    for _ in range(2):
        write_run(root, (3,))
        flip(0.5)(root / "3" / "leaves" / "metadata")
        with pytest.warns(UserWarning, match="step 3 is damaged"):
            assert restore(root).step == 2
    assert {path.name for path in root.glob("damaged*")} == {"damaged-3", "damaged-3-2"}


def test_readers_change_nothing(root):
    flip(0.5)(root / "2" / "leaves" / "metadata")
    (root / "3.orbax-checkpoint-tmp").mkdir()
    before = sorted(path.name for path in root.rglob("*"))
    with pytest.warns(UserWarning, match="left in place, using step 1"):
        assert cp.load(root).step == 1
    with pytest.warns(UserWarning, match="left in place"):
        assert cp.restore_latest(root, make_state(99)).step == 1
    assert [(report.step, report.ok) for report in cp.verify(root)] == [(1, True), (2, False)]
    assert "not what was written" in cp.verify(root)[1].problem
    assert sorted(path.name for path in root.rglob("*")) == before


def test_junk_among_the_steps_is_ignored(root, tmp_path):
    (root / ".DS_Store").write_text("x")
    (root / "notes.txt").write_text("x")
    (root / "12").write_text("a file with the name of a step")
    (root / "007").mkdir()
    (root / "9.orbax-checkpoint-tmp").mkdir()
    (root / "8.orbax-checkpoint-tmp-1234").mkdir()
    (root / "13").symlink_to(root / "1")
    (root / "14").symlink_to(tmp_path / "nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restore(root).step == 2
        write_run(root, (3, 4, 5, 6))
    assert cp.all_steps(root)[-2:] == [5, 6]
    assert (root / "notes.txt").exists() and not list(root.glob("*tmp*"))


# --- another model -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            dict(width=9),
            r"ema/encoder/bias is bfloat16\[8\] in the checkpoint and bfloat16\[9\] in",
        ),
        (
            dict(dtype=jnp.float16),
            r"opt_state/0/mu/encoder/kernel is float32\[4,8\].*float16\[4,8\]",
        ),
        (
            dict(optimizer=optax.sgd(0.1)),
            r"opt_state/0/count is int32\[\] in the checkpoint and absent",
        ),
        (dict(optimizer=optax.sgd(0.1, 0.9)), "opt_state/0/count"),
        (dict(optimizer=optax.adamax(0.1)), None),
    ],
)
def test_another_model_is_refused_and_nothing_touched(root, target, message):
    before = cp.digest(root)
    if message is None:
        # The same leaves with another meaning: configuration decides, not the checkpoint.
        assert restore(root, make_state(99, **target)).step == 2
        return
    with pytest.raises(cp.IncompatibleStateError, match=message):
        restore(root, make_state(99, **target))
    assert cp.all_steps(root) == [1, 2] and cp.digest(root) == before


def test_another_key_type_is_refused(root):
    target = make_state(99) | {"key": jax.random.key(0, impl="unsafe_rbg")}
    with pytest.raises(cp.IncompatibleStateError, match=r"key is key<threefry2x32>\[2\]"):
        restore(root, target)


def test_missing_and_extra_leaves_are_named(root):
    with pytest.raises(cp.IncompatibleStateError, match="extra is absent in the checkpoint"):
        restore(root, make_state(99) | {"extra": jnp.ones(2)})
    target = make_state(99)
    del target["ema"]
    with pytest.raises(cp.IncompatibleStateError, match=r"ema/encoder/bias.*\(2 more leaves"):
        restore(root, target)


def test_newer_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cp, "FORMAT_VERSION", cp.FORMAT_VERSION + 1)
        write_run(tmp_path, (1,))
    with pytest.raises(cp.IncompatibleStateError, match=r"has format 3.*upgrade"):
        restore(tmp_path)
    assert "upgrade" in cp.verify(tmp_path)[0].problem


def test_format_1_is_migrated(tmp_path):
    """A step that the first version of this package wrote; a state had no guards then."""
    root = shutil.copytree(FORMAT_1, tmp_path / "checkpoints")
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.array([0.5, -1.0, 2.0])}
    target = training.init_state(params, optax.adam(1e-3), ema=training.ema.classic(0.9))
    found = restore(root, jax.eval_shape(lambda: target))
    assert found.step == 5 and found.meta["seed"] == 3
    assert_same(found.state, target._replace(step=jnp.int32(5)))
    assert cp.digest(root) == cp.digest(found.state, step=5)
    assert [report.ok for report in cp.verify(root)] == [True] and cp.scores(root) == {5: None}
    with cp.Checkpointer(root) as checkpointer:
        checkpointer.save(6, found.state, found.meta)
    assert cp.load(root).meta["format_version"] == cp.FORMAT_VERSION


def test_only_what_is_asked_for_is_read(root):
    found = cp.load(root, only=("params",))
    assert_same(found.state, {"params": make_state(2)["params"]})
    target = {k: v for k, v in make_state(99).items() if k != "opt_state"}
    with cp.Checkpointer(root) as checkpointer:
        assert checkpointer.restore_latest(target, without=("opt_state",)).step == 2
        with pytest.raises(cp.IncompatibleStateError, match="opt_state/0/count"):
            checkpointer.restore_latest(target)
    # Damage elsewhere does not matter, damage here does.
    for file in files_of(root, 2):
        if file.name == "metadata" and file.parent.name == "leaves":
            flip(0.5)(file)
    with pytest.warns(UserWarning, match="step 2 is damaged"):
        assert cp.load(root, only=("params",)).step == 1


# --- errors of the disk --------------------------------------------------------------------------


def test_disk_too_full_is_refused_before_writing(root, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with cp.Checkpointer(root) as checkpointer, pytest.raises(OSError, match=r"0\.0 MB free"):
        checkpointer.save(3, make_state(3), {})
    assert cp.all_steps(root) == [1, 2]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("RESOURCE_EXHAUSTED: Error writing"), "disk is full; older steps are intact"),
        (OSError(28, "No space left on device"), "disk is full"),
        (RuntimeError("boom\n at line 3"), "RuntimeError: boom at line 3"),
    ],
)
def test_background_error_surfaces_once_and_saving_goes_on(root, monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    with cp.Checkpointer(root) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(cp.ocp.CheckpointManager, "save", fail)
            checkpointer.save(3, make_state(3), {})
            deadline = time.monotonic() + 10
            with pytest.raises(cp.CheckpointError, match=rf"step 3 was not saved.*{message}"):
                while time.monotonic() < deadline:
                    checkpointer.check()
                    time.sleep(0.01)
            checkpointer.check()
            checkpointer.save(4, make_state(4), {})
            with pytest.raises(cp.CheckpointError, match="step 4 was not saved"):
                checkpointer.save(5, make_state(5), {})
        checkpointer.save(5, make_state(5), {})
    assert cp.all_steps(root) == [1, 2, 5]


def test_background_error_surfaces_on_leaving(root, monkeypatch):
    monkeypatch.setattr(cp.ocp.CheckpointManager, "save", lambda *_, **__: False)
    with pytest.raises(cp.CheckpointError, match="Orbax refused"), cp.Checkpointer(root) as one:
        one.save(3, make_state(3), {})
    with pytest.raises(KeyError, match="mine"), pytest.warns(UserWarning, match="not written"):
        with cp.Checkpointer(root) as one:
            one.save(3, make_state(3), {})
            raise KeyError("mine")


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_really_full_disk(tiny_disk, monkeypatch, capfd):
    monkeypatch.setattr(cp.Checkpointer, "_check_space", lambda *_: None)
    draw = np.random.default_rng(0)
    small, big = {"w": draw.normal(size=20_000)}, {"w": draw.normal(size=200_000)}
    with cp.Checkpointer(tiny_disk) as checkpointer:
        checkpointer.save(1, small, {})
        checkpointer.save(2, big, {})
        with pytest.raises(cp.CheckpointError, match=r"step 2 was not saved.*disk is full"):
            checkpointer.wait()
        assert [tuple(report) for report in cp.verify(tiny_disk)] == [(1, True, "")]
        assert not list(tiny_disk.glob("*tmp*"))
        checkpointer.save(2, small, {})
    assert cp.all_steps(tiny_disk) == [1, 2]
    assert "Traceback" not in capfd.readouterr().err


def test_unwritable_root_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(cp.CheckpointError, match=r"cannot use .*file/checkpoints"):
        cp.Checkpointer(tmp_path / "file" / "checkpoints").__enter__()


def test_permission_is_not_damage(root, monkeypatch):
    def refuse(*_):
        raise ValueError("PERMISSION_DENIED: Error opening file")

    monkeypatch.setattr(cp, "_read_arrays", refuse)
    with pytest.raises(cp.CheckpointError, match=r"cannot read .*PERMISSION_DENIED"):
        restore(root)
    assert cp.all_steps(root) == [1, 2]


def test_more_than_the_memory_is_refused_before_allocation(root, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(cp.CheckpointError, match=r"cannot read .* GB, this machine has 0\.0 GB"):
        cp.load(root)
    assert cp.all_steps(root) == [1, 2]


def test_json_of_the_step_is_readable_by_people(root):
    sealed = json.loads((root / "2" / "leaves" / "metadata").read_text())
    assert sealed["content"]["leaves"]["params/encoder/kernel"]["shape"] == [4, 8]


# --- ends of processes ---------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, time
import numpy as np
from lowdim_diffusion.training import checkpoint as cp

root, mode = sys.argv[1:]

def state(step):
    return {"w": np.random.default_rng(step).normal(size=400_000), "step": step}

with cp.Checkpointer(root) as checkpointer:
    found = checkpointer.restore_latest(state(0))
    if found is not None:
        assert found.state["w"].tobytes() == state(found.state["step"])["w"].tobytes()
    start = 0 if found is None else found.step
    print("START", start, flush=True)
    for step in range(start + 1, start + (1000 if mode == "kill" else 4)):
        checkpointer.save(step, state(step), {})
    if mode == "exit":
        sys.exit(0)
    if mode == "error":
        raise ValueError("mine")
    if mode == "interrupt":
        signal.raise_signal(signal.SIGINT)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return path


def start(program, root, mode):
    env = dict(os.environ, PYTHONPATH=str(pathlib.Path(cp.__file__).parents[2]))
    env["XLA_FLAGS"] = ""
    return subprocess.Popen(
        [sys.executable, str(program), str(root), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "code"), [("end", 0), ("exit", 0), ("error", 1), ("interrupt", -signal.SIGINT)]
)
def test_the_save_in_flight_survives_every_end(program, tmp_path, mode, code):
    process = start(program, tmp_path / "run", mode)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert [tuple(report) for report in cp.verify(tmp_path / "run")] == [
        (step, True, "") for step in (1, 2, 3)
    ]
    assert not list((tmp_path / "run").glob("*tmp*"))


@pytest.mark.slow
def test_kill_at_random_instants(program, tmp_path):
    """Each kill hits a stream of saves; each start finds the newest step sound and goes on."""
    draw = random.Random(0)
    root = tmp_path / "run"
    newest = 0
    for _ in range(12):
        process = start(program, root, "kill")
        line = process.stdout.readline()
        if not line:
            pytest.fail(process.communicate()[1])
        assert int(line.split()[1]) == newest
        deadline = time.monotonic() + 60
        while cp.all_steps(root)[-1:] in ([], [newest]) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.5))
        process.kill()
        _, err = process.communicate()
        assert "damaged" not in err
        reports = cp.verify(root)
        assert all(report.ok for report in reports), reports
        assert max(report.step for report in reports) > newest
        newest = max(report.step for report in reports)


TWO = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from jax.sharding import NamedSharding, PartitionSpec
from lowdim_diffusion.training import checkpoint as cp

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

def state(step):
    return jax.jit(
        lambda: {"params": {"w": jnp.arange(8.0) + step, "b": jnp.ones(3, jnp.bfloat16) * step},
                 "step": jnp.int32(step), "key": jax.random.key(step)},
        out_shardings={"params": {"w": split, "b": whole}, "step": whole, "key": whole})()

# A root of its own for each process: nothing may depend on a shared file system.
with cp.Checkpointer(f"{sys.argv[1]}/{sys.argv[3]}") as checkpointer:
    found = checkpointer.restore_latest(state(0))
    start = 0 if found is None else found.step
    if found is not None:
        assert found.meta["seed"] == 7
        same = jax.jit(lambda a, b: (a["params"]["w"] == b["params"]["w"]).all()
                       & (a["params"]["b"] == b["params"]["b"]).all() & (a["step"] == b["step"])
                       & (jax.random.key_data(a["key"]) == jax.random.key_data(b["key"])).all())
        assert same(found.state, state(start)), found.state
        assert found.state["params"]["w"].sharding == split
    for step in range(start + 1, start + 3):
        checkpointer.save(step, state(step), {"seed": 7})
    try:
        checkpointer.restore_latest(state(0) | {"extra": jnp.zeros(2)})
    except (cp.IncompatibleStateError, cp.CheckpointError) as error:
        said = f"{type(error).__name__} {start}"
with open(f"{sys.argv[1]}/said-{sys.argv[3]}", "w") as file:
    file.write(said)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_and_back_to_one(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    env = dict(os.environ, PYTHONPATH=str(pathlib.Path(cp.__file__).parents[2]), XLA_FLAGS="")
    for start in (0, 2):
        with socket.socket() as holder:
            # Held while they run: who shares the port may listen on it, and nobody else takes it.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{holder.getsockname()[1]}"
            processes = [
                subprocess.Popen(
                    [sys.executable, str(tmp_path / "two.py"), str(tmp_path), address, str(index)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=env,
                )
                for index in range(2)
            ]
            results = [process.communicate(timeout=240) for process in processes]
        names = ("IncompatibleStateError", "CheckpointError")
        for index, name in enumerate(names):
            assert processes[index].returncode == 0, results[index][1][-3000:]
            # Not by way of stdout, where Gloo writes too.
            assert (tmp_path / f"said-{index}").read_text() == f"{name} {start}"
    assert not (tmp_path / "1").exists()
    target = {
        "params": {"w": jnp.zeros(8), "b": jnp.zeros(3, jnp.bfloat16)},
        "step": jnp.int32(0),
        "key": jax.random.key(0),
    }
    found = restore(tmp_path / "0", target)
    assert found.step == 4
    np.testing.assert_array_equal(found.state["params"]["w"], np.arange(8.0) + 4)
