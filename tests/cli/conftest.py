"""A real SLURM for the tests of commands that use one."""

import os
import pathlib
import subprocess

import pytest


@pytest.fixture
def slurm(tmp_path_factory):
    """A SLURM of this machine alone; returns the environment for its commands."""
    script = pathlib.Path(__file__).with_name("single_node_slurm.sh")
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([script, "start", folder], capture_output=True, text=True)
    try:
        if started.returncode:
            pytest.skip(f"no SLURM here: {started.stdout.strip() or started.stderr.strip()}")
        yield {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run([script, "stop", folder])
