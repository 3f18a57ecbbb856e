"""The recipes of docs/launching.md: each is dry-run, that for SLURM runs on a real SLURM."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import numpy as np
import pytest

from lowdim_diffusion.cli import launch, main
from lowdim_diffusion.training import checkpoint
from lowdim_diffusion.training.rundir import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.S)


def recipes():
    """Return every ``lowdim`` command of the page as a list of arguments, with what came before."""
    submitted = re.search(r"sbatch train\.sbatch (.*)", PAGE)[1]
    found = []
    for kind, block in BLOCKS:
        if kind == "text":
            continue
        block = block.replace("\\\n", " ").replace('"$@"', submitted)
        if kind == "yaml":
            block = re.sub(r"command: \[(.*?)\]", lambda m: m[1].replace(",", ""), block)
        for line in block.splitlines():
            before, name, rest = line.partition("lowdim ")
            if name and rest.startswith(("train", "launch")):
                found.append((before.strip(), shlex.split(rest.removesuffix('"'))))
    return found


def test_the_page_has_a_recipe_for_every_place():
    before = " | ".join(before for before, _ in recipes())
    for place in ("srun", "gcloud compute tpus", "docker run"):
        assert place in before
    assert len(recipes()) == 6


@pytest.mark.parametrize("number", range(6))
def test_recipes_are_commands(number, tmp_path, capsys, monkeypatch):
    _, argv = recipes()[number]
    np.savez(tmp_path / "x.npz", x=np.arange(4 * 32 * 32 * 3).reshape(4, 32, 32, 3).astype("uint8"))
    assert argv[argv.index("--data.path") + 1].endswith("cifar-10.tar.gz")
    small = f"--data.path {tmp_path}/x.npz --model.name mlp --model.width 8 --dry-run"
    if argv[0] == "launch":
        started = []
        monkeypatch.setattr(launch, "_run", lambda *args, **kwargs: started.append(args) or 0)
        assert main(argv) == 0
        ((argv, environments, _),) = started
        assert len(environments) == 2
    assert main([*argv, *small.split()]) == 0
    said = capsys.readouterr().out
    assert "mesh (data=" in said and "runs/cifar10" in said


@pytest.mark.slow
@pytest.mark.distributed
def test_the_slurm_recipe_on_a_real_slurm(slurm, tmp_path):
    """Two tasks; told to stop they save and end with 75, and the job comes back and continues."""
    (script,) = (block for kind, block in BLOCKS if kind == "bash")
    script = re.sub(r"#SBATCH --(nodes|ntasks|gpus|cpus|time).*\n", "", script)
    (tmp_path / "train.sbatch").write_text(script)
    program = tmp_path / "lowdim"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lowdim_diffusion "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = {**slurm, "PATH": path, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    out, log = tmp_path / "run", tmp_path / "log"
    run = lambda *argv: subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True)
    argv = "--data.path molrg --model.name mlp --model.width 32 --model.depth 1 --data.num-examples"
    argv += f" 256 --train.batch-size 32 --checkpoint.every 50 --train.steps 1000000 --out {out}"
    submit = ["sbatch", "--ntasks=2", f"--output={log}", "--parsable", "train.sbatch"]
    submitted = run(*submit, *argv.split())
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()

    def wait(condition, what):
        deadline = time.monotonic() + 100
        while not condition():
            assert time.monotonic() < deadline, (what, log.exists() and log.read_text())
            time.sleep(0.2)

    steps = lambda: checkpoint.all_steps(out / "checkpoints")
    wait(steps, "a first checkpoint")
    said = log.read_text()
    assert "2 processes with 1 x cpu each, mesh (data=2), batch 32 = 16 per device" in said
    assert said.count("START") == 1
    run("scancel", "--signal=TERM", job)
    wait(lambda: log.read_text().count("START") == 2, "the job to come back")
    stopped = int(re.search(r"SIGTERM received: saving step (\d+)", log.read_text())[1])
    assert f"START at step {stopped} of 1000000" in log.read_text()
    assert "Restarts=1" in run("scontrol", "show", "job", job).stdout
    wait(lambda: steps()[-1] > stopped, "a checkpoint of the second start")
    run("scancel", job)
    assert main(["checkpoint", "verify", str(out)]) == 0
    seen = [row["step"] for row in read_metrics(out / "metrics.jsonl")]
    assert seen == list(range(1, len(seen) + 1)) and seen[-1] >= steps()[-1]
