"""A process that dies, or is told to stop, loses no committed checkpoint and no bit."""

import functools
import os
import random
import signal
import time

import fault_processes as fp
import pytest
import sabotage

from lowdim_diffusion.training import checkpoint

pytestmark = pytest.mark.slow

EVERY_STEP = ["--checkpoint.every", "1", "--checkpoint.keep", "2"]
STEPS = 60
SAVE_AND_DELETE = 80  # file operations of a step that is saved while an older one is deleted


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, whole):
    """Uninterrupted, with a save and (from the third on) a deletion at every step."""
    run = tmp_path_factory.mktemp("long") / "run"
    fp.succeeds(fp.train(run, *EVERY_STEP, steps=STEPS))
    return run


def killed(run, how, sabotage=()):
    """Train until ``how`` has killed the process; return the steps that it left, all sound."""
    process = fp.begin(run, *EVERY_STEP, steps=STEPS, sabotage=sabotage)
    how(process)
    done = process.finish()
    assert done.code == -signal.SIGKILL, done
    assert done.err == ""
    return fp.steps_of(run)


def wait_for_step(process, run, step):
    """Return once that step is on disk, however slow the machine."""
    while max(checkpoint.all_steps(run / "checkpoints"), default=0) < step:
        assert process.running
        time.sleep(0.005)


def nothing_lost(steps, before):
    """No way back behind the newest step of before, and the step under it is kept too."""
    newest = max(steps, default=0)
    assert newest >= before
    assert set(steps) >= {step for step in (newest - 1, newest) if step > 0}
    return newest


@pytest.mark.fault("F03")
@pytest.mark.parametrize("seed", [0, 1])
def test_kill_at_random_instants(long_run, tmp_path, seed):
    """Ten times each, while steps are saved and deleted all the time."""
    draw, newest = random.Random(seed), 0
    for _ in range(10):

        def how(process, before=newest):
            process.wait_for("START")
            wait_for_step(process, tmp_path / "run", before + draw.randrange(3))
            time.sleep(draw.uniform(0, 0.15))
            process.send(signal.SIGKILL)

        newest = nothing_lost(killed(tmp_path / "run", how), newest)
    assert 0 < newest < STEPS
    fp.succeeds(fp.train(tmp_path / "run", *EVERY_STEP, steps=STEPS))
    fp.same_run(tmp_path / "run", long_run)


@pytest.mark.fault("F03")
@pytest.mark.fault("F13")
@pytest.mark.parametrize("part", [0, 1, 2])
def test_kill_between_two_file_operations(long_run, tmp_path, part):
    """Ten times each, spread over the operations of two saves and their deletions."""
    newest, hit = 0, set()
    for number in range(part, 30, 3):
        how = functools.partial(sabotage.kill_at_file_operation, 2 * SAVE_AND_DELETE * number // 30)
        newest = nothing_lost(killed(tmp_path / "run", lambda _: None, [how]), newest)
        folder = tmp_path / "run" / "checkpoints"
        hit |= {"save" for _ in folder.glob("*tmp*")} | {"deletion" for _ in folder.glob("trash/*")}
    assert hit and 0 < newest < STEPS  # which of the two a part meets, differs with the machine
    fp.succeeds(fp.train(tmp_path / "run", *EVERY_STEP, steps=STEPS))
    fp.same_run(tmp_path / "run", long_run)


@pytest.mark.fault("F03")
def test_kill_while_a_run_is_set_up(whole, tmp_path):
    """Directory, lock, versions, config: eleven operations come before the first step."""
    for number in range(0, 11, 2):
        how = functools.partial(sabotage.kill_at_file_operation, number, "setup")
        done = fp.train(tmp_path / "run", sabotage=[how])
        assert done.code == -signal.SIGKILL and done.err == "", done
    fp.succeeds(fp.train(tmp_path / "run"))
    fp.same_run(tmp_path / "run", whole)
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.distributed
@pytest.mark.fault("F30")
def test_a_killed_peer_costs_no_number(long_run, tmp_path):
    """Two processes, one of them killed between two saves; one alone ends where none was killed."""
    run = tmp_path / "run"
    train = ["train", *fp.TINY, *EVERY_STEP, "--train.steps", str(STEPS), "--out", str(run)]
    words = ["launch", "--processes", "2", "--devices-per-process", "1", "--", *train]
    process = fp.command(*words, "--devices", "2")
    process.wait_for("START")
    peers = [pid for pid in fp.children(process) if b"process-id=1" in fp.words_of(pid)]
    wait_for_step(process, run, 2)
    os.kill(peers[0], signal.SIGKILL)
    fp.fails_clearly(process.finish(), 76, "process 1 died by SIGKILL")
    assert 0 < max(fp.steps_of(run)) < STEPS
    assert fp.train(run, *EVERY_STEP, steps=STEPS).code == 0
    fp.close_run(run, long_run)


SLOW = [functools.partial(sabotage.slow_steps, 0.2)]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.fault("F04")),
        pytest.param(signal.SIGINT, marks=pytest.mark.fault("F05")),
    ],
)
def test_a_signal_saves_and_the_run_continues_bit_for_bit(whole, tmp_path, number):
    process = fp.begin(tmp_path / "run", "--checkpoint.every", "1000", sabotage=SLOW)
    process.wait_for("START")
    time.sleep(0.1)
    process.send(number)
    done = process.finish()
    assert done.code == 75 and done.err == "", done
    assert f"{signal.Signals(number).name} received: saving step" in done.out
    (step,) = fp.steps_of(tmp_path / "run")
    assert 0 < step < 20
    fp.succeeds(fp.train(tmp_path / "run"))
    fp.same_run(tmp_path / "run", whole)


@pytest.mark.fault("F04")
@pytest.mark.parametrize("first", [0, 15])
def test_a_signal_before_the_first_step(whole, half, tmp_path, first):
    run = half if first else tmp_path / "new"
    early = functools.partial(sabotage.signal_before_the_first_step, signal.SIGTERM)
    done = fp.train(run, sabotage=[early])
    assert done.code == 75 and done.err == "", done
    fp.succeeds(fp.train(run))
    fp.same_run(run, whole)


@pytest.mark.fault("F06")
def test_a_second_ctrl_c_stops_at_once(whole, half):
    process = fp.begin(half, sabotage=[functools.partial(sabotage.slow_steps, 60)])
    process.wait_for("START")
    time.sleep(0.3)
    for _ in range(2):
        process.send(signal.SIGINT)
        time.sleep(0.2)
    done = process.finish()
    assert done.code == 130 and "Traceback" not in done.err, done
    fp.succeeds(fp.train(half))
    fp.same_run(half, whole)


@pytest.mark.fault("F07")
def test_exit_0_means_that_the_last_step_is_on_disk(whole, tmp_path):
    """Whole interpreters, each with a save at its last step, whose ends have been seen to hang."""
    for number in range(6):
        run = tmp_path / str(number)
        fp.succeeds(fp.train(run, start=fp.command))
        fp.same_run(run, whole)


@pytest.mark.fault("F23")
def test_a_second_writer_is_refused_and_a_dead_one_leaves_no_lock(whole, half):
    first = fp.begin(half, sabotage=[functools.partial(sabotage.slow_steps, 60)])
    first.wait_for("START")
    before = fp.snapshot(half)
    fp.fails_clearly(fp.train(half), 5, "in use by another process", "pid")
    assert fp.snapshot(half) == before
    first.kill()
    fp.succeeds(fp.train(half))
    fp.same_run(half, whole)
