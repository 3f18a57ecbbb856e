"""``lowdim demo``: from nothing to a report on built-in real data, in minutes on two cores."""

import dataclasses
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lowdim_diffusion.cli.config import option
from lowdim_diffusion.cli.errors import ExitCode
from lowdim_diffusion.cli.parse import check_options, parse, show_help, wants_help
from lowdim_diffusion.cli.presets import preset

__all__ = ["DemoArguments", "main"]


@dataclass(frozen=True)
class DemoArguments:
    """What ``lowdim demo`` is given."""

    out: str = "runs/demo"
    """Run directory; a demo that was interrupted continues there."""
    seed: int = option(0, ge=0, lt=2**32)
    """Seed of everything random."""
    steps: int | None = option(ge=1)
    """Training steps; unset takes those of the preset 'demo'."""
    devices: int | None = option(ge=1)
    """How many devices; unset takes all."""


_EXAMPLES = """\
lowdim demo
lowdim demo --steps 200 --out /tmp/quick"""


def main(argv: Sequence[str]) -> int:
    """Train, sample, measure and report; return the exit code."""
    prog = "lowdim demo"
    if wants_help(argv):
        show_help(
            f"{prog} [--OPTION VALUE ...]",
            "Train a small U-Net on 1,797 real images of digits (built in), draw new ones,\n"
            "measure the low-dimensional structure of the denoiser, and write a report to\n"
            "open in a browser.",
            [],
            DemoArguments(),
            "",
            _EXAMPLES,
        )
    given = parse(DemoArguments, argv, default=DemoArguments(), prog=prog)
    check_options(given)
    return run(given)


def run(given: DemoArguments) -> int:
    """Train, sample, measure and report; return the exit code."""
    import jax

    from lowdim_diffusion.cli import analyze, sample, train
    from lowdim_diffusion.linalg import largest_divisor

    begin = time.monotonic()
    config = preset("demo")
    # However many devices there are: as many as divide the batch.
    devices = given.devices or largest_divisor(config.train.batch_size, jax.device_count())
    config = dataclasses.replace(config, out=given.out, seed=given.seed, devices=devices)
    if given.steps is not None:
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, steps=given.steps)
        )
    code = train.run(config, hints=False)
    if code != ExitCode.DONE:
        return code
    sample.run(sample.SampleArguments(run=given.out, seed=given.seed, devices=given.devices))
    analyze.run(analyze.AnalyzeArguments(run=given.out, seed=given.seed))
    report = (pathlib.Path(given.out) / "report.html").resolve()
    print(
        f"\nThe demo took {time.monotonic() - begin:.0f} s. Open the report in a browser:\n"
        f"  {report.as_uri()}\n"
        f"\nWhat to try next{_where()}:\n"
        f"  lowdim sample --run {given.out} --num-samples 256 --solver dpmpp-2m --steps 12\n"
        f"  lowdim train --out {given.out} --train.steps {2 * config.train.steps}    (train on)\n"
        "  lowdim train --data.path photos/ --data.size 32 --out runs/photos    (your own images)\n"
        "  lowdim train --help"
    )
    return ExitCode.DONE


def _where() -> str:
    """Return a word on where the command is, if it is not on the path."""
    command = pathlib.Path(sys.argv[0])
    if shutil.which("lowdim") or command.name != "lowdim":
        return ""
    return f" (lowdim is {command}; 'source {command.parent}/activate' puts it on the path)"
