"""``lowdim train``: train a model, or continue the run that is there."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from lowdim_diffusion.cli import toml
from lowdim_diffusion.cli.config import DistributedConfig, RunConfig
from lowdim_diffusion.cli.distributed import joined
from lowdim_diffusion.cli.errors import CommandError, ExitCode, is_out_of_memory
from lowdim_diffusion.cli.parse import parse_run

__all__ = ["main", "run"]

_DESCRIPTION = """\
Train a diffusion model. The same command again continues where the run
stopped, bit for bit; ctrl-C and SIGTERM save first (exit code 75). A larger
--train.steps continues a finished run."""
_EXAMPLES = """\
lowdim train                                         # the built-in digits
lowdim train --preset mnist --data.path ~/mnist --out runs/mnist
lowdim train --out runs/mnist                        # continue it
lowdim train --out runs/mnist --train.steps 20000    # train on
lowdim train --config runs/a/config.toml --init-from runs/a --out runs/b
lowdim train --data.path photos/ --data.size 32 --model.channel-mult 1 2 2
lowdim train --preset cifar10-paper --data.path ~/cifar-10.tar.gz --dry-run
srun lowdim train --distributed --preset cifar10 --data.path ~/cifar-10.tar.gz
lowdim train --config runs/mnist/config.toml --seed 1 --out runs/mnist-seed1"""


def main(argv: Sequence[str]) -> int:
    """Parse the arguments and train; return the exit code."""
    prog = "lowdim train"
    given = parse_run(argv, prog=prog, description=_DESCRIPTION, examples=_EXAMPLES)
    if given.distributed and not given.dry_run:
        with joined(given.run.distributed, prog):
            return run(given.run, reset_optimizer=given.reset_optimizer)
    return run(given.run, dry_run=given.dry_run, reset_optimizer=given.reset_optimizer)


def run(
    config: RunConfig,
    *,
    dry_run: bool = False,
    reset_optimizer: bool = False,
    hints: bool = True,
) -> int:
    """Train as the config says; return ``DONE`` or ``PREEMPTED``, everything written and synced.

    Args:
        config: the run.
        dry_run: only say what would be done.
        reset_optimizer: continue with the weights alone, the optimizer starts anew.
        hints: end with what to do next.
    """
    from lowdim_diffusion import sharding
    from lowdim_diffusion.cli import build, loading, plan
    from lowdim_diffusion.training import checkpoint

    processes = config.distributed.num_processes or 1
    # Which process this is belongs to the command, not to the run.
    config = dataclasses.replace(config, distributed=DistributedConfig())
    mesh: Any = _planned(config, processes) if dry_run else sharding.data_mesh(config.devices)
    _check_sizes(config, mesh.size)
    parts = build.parts(loading.continued(config))
    start = None
    if config.init_from is not None and not checkpoint.all_steps(f"{config.out}/checkpoints"):
        start = loading.start(config, parts)
    if dry_run:
        print(plan.describe(parts, mesh, processes))
        return ExitCode.DONE
    stdout: Any = _Patient(sys.stdout) if sharding.is_writer() else open(os.devnull, "w")
    with contextlib.redirect_stdout(stdout):
        try:
            return _train(config, parts, start, mesh, hints, reset_optimizer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise CommandError(plan.too_large(parts, mesh, error), ExitCode.INTERNAL) from error


def _planned(config: RunConfig, processes: int) -> Any:
    """Return the mesh that a run would have; other processes are taken to be like this one."""
    import jax
    from jax.sharding import AbstractMesh

    from lowdim_diffusion import sharding

    here = jax.local_device_count()
    count = config.devices or here * processes
    if processes == 1:
        sharding.data_mesh(count)
    elif count % processes or count > here * processes:
        raise CommandError(
            f"--devices {count}: {processes} processes with {here} devices each share "
            f"{processes} to {here * processes} equally"
        )
    return AbstractMesh((count,), (sharding.AXIS,))


def _check_sizes(config: RunConfig, num_devices: int) -> None:
    from lowdim_diffusion import sharding

    sharding.check_batch(config.train.batch_size, num_devices)
    local = config.train.batch_size // num_devices
    if local % config.optim.accumulate:
        raise CommandError(
            f"--optim.accumulate {config.optim.accumulate} does not divide the {local} examples "
            f"of each device (--train.batch-size {config.train.batch_size} on {num_devices} "
            "devices)"
        )


def _train(
    given: RunConfig, parts: Any, start: Any, mesh: Any, hints: bool, reset_optimizer: bool
) -> int:
    import jax

    from lowdim_diffusion import sharding, training
    from lowdim_diffusion.cli import build, drawing, plan
    from lowdim_diffusion.training.progress import ConsoleMonitor, usage
    from lowdim_diffusion.training.rundir import RunDirectory
    from lowdim_diffusion.training.trainer import train

    config, net = parts.model.config, parts.model.net
    writer = sharding.is_writer()
    sinks = _sinks(config) if writer else []
    monitor = ConsoleMonitor(unit="images" if parts.dataset.is_image else "examples")
    with RunDirectory(config.out, writer=writer) as directory:
        for line in [] if start is None else start.notes:
            monitor.note(line)
        monitor.note(parts.dataset.describe())
        if stream := plan.reading(parts, jax.process_count()):
            monitor.note(f"stream: {stream}")
        monitor.note(f"{net.name} with {net.num_params:,} parameters")
        for name, text in plan.devices(parts, mesh, jax.process_count()).items():
            monitor.note(f"{name}: {text}")

        labels = drawing.default_labels(parts.model, config.sample.num_samples)
        # The others go on to the next step, and wait there for the one that draws.
        several = jax.process_count() > 1
        sampler = drawing.sampler(
            parts.model, mesh=sharding.data_mesh(local=True) if several else mesh
        )

        def draw(step: int, state: training.TrainState) -> None:
            params = sharding.on_every_host(state.averaged)
            if writer:
                made = sampler(params, config.seed, labels)
                drawing.save(directory.samples_path / f"step-{step:08d}", made)

        def score(state: training.TrainState) -> float:
            return float(parts.held_out_loss(sharding.on_every_host(state.averaged)))

        outcome = train(
            directory,
            parts.init if start is None else start.init,
            parts.train_step,
            parts.batcher.examples,
            parts.batcher if stream else parts.batcher.arrays,
            batch_size=config.train.batch_size,
            num_steps=config.train.steps,
            key=parts.key,
            mesh=mesh,
            split_state=config.fsdp,
            # As given: what the data decide is measured anew from other data.
            config_text=toml.dumps(given),
            fixed=build.fixed(parts),
            assumed=build.assumed(),
            meta={
                "config": toml.dumps(config),
                "data": parts.dataset.describe(),
                **({} if start is None else {"init": start.about}),
            },
            checkpoint_every=config.checkpoint.every,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            keep_best=config.checkpoint.keep_best,
            score_fn=score if parts.held_out_loss else None,
            reset_optimizer=parts.optimizer.init if reset_optimizer else None,
            on_nonfinite=config.train.on_nonfinite,
            max_skips=config.train.max_skips or 10,
            max_spike=config.train.max_spike,
            sample_every=config.train.sample_every,
            sample_fn=draw if config.train.sample_every else None,
            monitor=monitor,
            sinks=sinks,
            profile=config.train.profile,
        )
    if outcome.status == "already done":
        monitor.note(
            f"{config.out} is done already: step {outcome.first_step} of {config.train.steps}; "
            "a larger --train.steps trains on"
        )
        return ExitCode.DONE
    used = [f"{outcome.images_per_s:,.0f}/s", *usage(outcome.mfu, outcome.peak_memory)]
    rate = ", ".join([*used, f"compiled in {outcome.compile_s:.1f} s"])
    if outcome.status == "stopped":
        monitor.note(f"stopped and saved ({rate}); the same command continues")
        return ExitCode.PREEMPTED
    steps = config.train.steps - outcome.first_step
    monitor.note(f"done: {steps} steps in {outcome.time_s:.1f} s ({rate})")
    monitor.note(f"run directory: {config.out}")
    if hints:
        monitor.note(f"next: lowdim sample --run {config.out}, lowdim analyze --run {config.out}")
    return ExitCode.DONE


def _sinks(config: RunConfig) -> list[Any]:
    """Return where metrics go besides ``metrics.jsonl``."""
    from lowdim_diffusion.training import sinks

    made, wanted = [], config.train
    try:
        package = "tensorboardX"
        if wanted.tensorboard:
            made.append(sinks.TensorBoard(os.path.join(config.out, "tensorboard")))
        package = "wandb"
        if wanted.wandb is not None:
            made.append(sinks.WandB(config.out, wanted.wandb, dataclasses.asdict(config)))
    except ImportError:
        option = package.removesuffix("X")
        raise CommandError(
            f'--train.{option} needs {package}: pip install "lowdim-diffusion[{option}]"'
        ) from None
    return made


class _Patient:
    """A text stream that forgets what it is told once its reader has gone away.

    Training goes on when ``lowdim train | head`` has seen enough.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._forget()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._forget()

    def _forget(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
