"""Runs that the faults happen to; made once per session, which also warms the compilation cache."""

import shutil

import fault_processes as fp
import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run of 20 steps that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    fp.succeeds(fp.train(run))
    return run


@pytest.fixture(scope="session")
def _half(tmp_path_factory, whole):
    run = tmp_path_factory.mktemp("half") / "run"
    fp.succeeds(fp.train(run, steps=15))
    return run


@pytest.fixture
def half(_half, tmp_path):
    """A private copy of a run that ended at step 15 of 20, with checkpoints 5, 10 and 15."""
    return shutil.copytree(_half, tmp_path / "run")
