"""``lowdim checkpoint list|verify|digest RUN``."""

import json
import pathlib
from collections.abc import Sequence

from lowdim_diffusion.cli.errors import CommandError, ExitCode

__all__ = ["main"]

_USAGE = """\
usage: lowdim checkpoint list RUN
       lowdim checkpoint verify RUN
       lowdim checkpoint digest RUN [--step N]

List the checkpoints of a run with their size and held-out loss, check every
one against the digests inside it, or print the identity of one as a line of
JSON: step, digest (sha256 over all arrays of the state) and sum (of |params|).
Nothing is changed.

Exit code 0 if sound, 3 if no checkpoint is there or (verify) one is damaged.

options
  --step N       the checkpoint to print; the newest sound one without it
  --debug        show the traceback of an error
  -h, --help     show this text

examples
  lowdim checkpoint list runs/digits
  lowdim checkpoint verify runs/digits
  lowdim checkpoint digest runs/digits
"""


def main(argv: Sequence[str]) -> int:
    """Verify or print; return the exit code."""
    if "-h" in argv or "--help" in argv:
        print(_USAGE, end="")
        return ExitCode.DONE
    action, root, step = _parse(argv)
    if not root.is_dir():
        raise CommandError(f"no run directory {root}")
    inside = root / "checkpoints"
    run = {"list": _list, "verify": _verify, "digest": _digest}[action]
    return run(inside if inside.is_dir() else root, step)


def _parse(argv: Sequence[str]) -> tuple[str, pathlib.Path, int | None]:
    rest, step = list(argv), None
    for i, argument in enumerate(rest):
        name, _, value = argument.partition("=")
        if name == "--step":
            value = value or "".join(rest[i + 1 : i + 2])
            if not value.isdecimal():
                raise CommandError(f"--step: expected a whole number, got {value!r}")
            step = int(value)
            del rest[i : i + 1 + ("=" not in argument)]
            break
    for argument in rest:
        if argument.startswith("-"):
            raise CommandError(f"unknown option {argument}; lowdim checkpoint --help lists all")
    if not rest or rest[0] not in ("list", "verify", "digest"):
        got = repr(rest[0]) if rest else "nothing"
        raise CommandError(f"expected 'list', 'verify' or 'digest' and a run directory, got {got}")
    if len(rest) != 2:
        got = "none" if len(rest) < 2 else ", ".join(map(repr, rest[1:]))
        raise CommandError(f"{rest[0]} takes one run directory, got {got}")
    if step is not None and rest[0] != "digest":
        raise CommandError(f"--step is for digest; {rest[0]} takes every step")
    return rest[0], pathlib.Path(rest[1]), step


def _list(root: pathlib.Path, step: int | None) -> int:
    del step
    from lowdim_diffusion.cli.plan import bytes_text
    from lowdim_diffusion.training import checkpoint

    scores = checkpoint.scores(root)
    if not scores:
        raise CommandError(f"no checkpoint in {root}", ExitCode.NO_CHECKPOINT)
    best, newest = checkpoint.best(root), max(scores)
    for number, score in scores.items():
        files = (path for path in (root / str(number)).rglob("*") if path.is_file())
        size = bytes_text(sum(path.stat().st_size for path in files))
        loss = "" if score is None else f"held-out loss {score:.6g}"
        marks = "  ".join(["newest"] * (number == newest) + ["best"] * (number == best))
        print(f"step {number:<9} {size:>8}  {loss:<27}{marks}".rstrip())
    return ExitCode.DONE


def _verify(root: pathlib.Path, step: int | None) -> int:
    del step
    from lowdim_diffusion.training import checkpoint

    reports = checkpoint.verify(root)
    if not reports:
        raise CommandError(f"no checkpoint in {root}", ExitCode.NO_CHECKPOINT)
    for report in reports:
        print(f"step {report.step}  {'ok' if report.ok else f'DAMAGED: {report.problem}'}")
    bad = [report.step for report in reports if not report.ok]
    if bad:
        raise CommandError(
            f"{len(bad)} of {len(reports)} checkpoints damaged (step {', '.join(map(str, bad))}); "
            "training and sampling use the newest sound one",
            ExitCode.NO_CHECKPOINT,
        )
    return ExitCode.DONE


def _digest(root: pathlib.Path, step: int | None) -> int:
    from lowdim_diffusion.training import checkpoint

    print(json.dumps(checkpoint.digest(root, step=step)))
    return ExitCode.DONE
