"""TensorBoard's own reader reads what is written; W&B is told; a broken sink stops nothing."""

import os
import sys
import types
import warnings

import pytest

from lowdim_diffusion.training.sinks import Sink, Sinks, TensorBoard, WandB

ROWS = [{"step": i, "images": 8 * i, "loss": 1.0 / i} for i in range(1, 301)]


class Recorder:
    def __init__(self, error=None):
        self.rows, self.closed, self.error = [], 0, error

    def write(self, row):
        if self.error:
            raise self.error
        self.rows.append(row)

    def close(self):
        self.closed += 1


def test_long_stretches_are_thinned_and_names_grouped():
    sink = Recorder()
    assert isinstance(sink, Sink) and isinstance(TensorBoard, type)
    sinks = Sinks([sink], most=100)
    sinks.write(ROWS)
    steps = [row["step"] for row in sink.rows]
    assert len(steps) == 100 and steps[0] == 1 and steps[-1] == 300 and steps == sorted(steps)
    sink.rows.clear()
    sinks.write(ROWS[:3])
    assert sink.rows == ROWS[:3]
    sinks.write([{"step": 4, "mfu": 0.5}], group="speed")
    assert sink.rows[-1] == {"step": 4, "speed/mfu": 0.5}
    sinks.write([])
    sinks.close()
    assert sink.closed == 1 and len(sink.rows) == 4


@pytest.mark.fault("F44")
def test_a_sink_that_fails_costs_one_warning_and_no_other_sink():
    good, bad = Recorder(), Recorder(OSError(28, "No space left on device"))
    sinks = Sinks([bad, good])
    with pytest.warns(UserWarning, match="Recorder cannot be written.*No space.*goes on") as seen:
        sinks.write(ROWS[:2])
        sinks.write(ROWS[2:4])
    assert len(seen) == 1 and len(good.rows) == 4


# ---- TensorBoard --------------------------------------------------------------------------------


def read_events(path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(path), size_guidance={"scalars": 0})
    return events.Reload()


def test_tensorboards_reader_reads_them_back(tmp_path):
    sink = TensorBoard(tmp_path / "t")
    for row in ROWS[:20]:
        sink.write(row)
    sink.close()
    events = read_events(tmp_path / "t")
    assert sorted(events.Tags()["scalars"]) == ["images", "loss"]
    read = events.Scalars("loss")
    assert [e.step for e in read] == list(range(1, 21))
    assert [e.value for e in read] == pytest.approx([row["loss"] for row in ROWS[:20]])


def test_a_run_that_continues_takes_back_the_steps_beyond(tmp_path):
    """Killed after step 20, continued from the checkpoint of step 12."""
    for first, last in ((0, 20), (12, 15)):
        sink = TensorBoard(tmp_path)
        for row in ROWS[first:last]:
            sink.write({**row, "loss": float(last)})
        sink.close()
        (written,) = tmp_path.glob(f"*.{os.getpid()}")
        written.rename(tmp_path / f"events.out.tfevents.{first}")  # as at another second
    read = read_events(tmp_path).Scalars("loss")
    assert [e.step for e in read] == list(range(1, 16))
    assert [e.value for e in read] == [20.0] * 12 + [15.0] * 3


@pytest.mark.fault("F44")
def test_a_directory_that_cannot_be_made_is_no_end_of_training(tmp_path):
    (tmp_path / "file").write_text("")
    sinks = Sinks([TensorBoard(tmp_path / "file" / "t")])
    with pytest.warns(UserWarning, match="TensorBoard cannot be written"):
        sinks.write(ROWS[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinks.write(ROWS[2:4])
        sinks.close()


# ---- Weights & Biases ---------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    """A module that remembers what it is told."""
    seen = types.SimpleNamespace(inits=[], rows=[], metrics=[], finished=0)

    def finish():
        seen.finished += 1

    run = types.SimpleNamespace(
        define_metric=lambda *a, **k: seen.metrics.append((a, k)),
        log=seen.rows.append,
        finish=finish,
    )
    module = types.ModuleType("wandb")
    module.init = lambda **options: seen.inits.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


def test_wandb_is_told_and_a_continued_run_is_the_same_one(tmp_path, fake):
    for rows in (ROWS[:3], ROWS[1:4]):
        sink = WandB(tmp_path / "r", "digits", {"seed": 1})
        assert len(fake.inits) == fake.finished  # begun at the first row
        for row in rows:
            sink.write(row)
        sink.close()
    first, second = fake.inits
    assert first == second and first["resume"] == "allow" and len(first["id"]) == 12
    assert (first["project"], first["name"], first["config"]) == ("digits", "r", {"seed": 1})
    assert first["dir"] == str(tmp_path / "r") and fake.finished == 2
    assert fake.rows == [*ROWS[:3], *ROWS[1:4]]
    assert (("*",), {"step_metric": "step"}) in fake.metrics


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = WandB(tmp_path / "r", "digits", {"seed": 1})
    for row in ROWS[:5]:
        sink.write(row)
    sink.close()
    (log,) = (tmp_path / "r" / "wandb").glob("offline-run-*/*.wandb")
    identity = (tmp_path / "r" / "wandb" / "id").read_text()
    assert identity in log.name and b"digits" in log.read_bytes()
