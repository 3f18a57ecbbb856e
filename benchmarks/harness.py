"""How a case is timed: compile, warm up, then all variants in turn, several rounds over.

Variants of a case do the same work in different ways. They are interleaved, so a machine whose
speed drifts slows all of them alike, and what is quoted is the ratio to the first one.
"""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lowdim_diffusion import _files

SIZES = ("smoke", "small", "medium", "large")
SHORT_S = 5e-3
"""A call that takes microseconds is made for so long, lest the system's own work decide."""
REPEATS = {"smoke": 3, "small": 9, "medium": 9, "large": 7}


class Variant(NamedTuple):
    """One way to do a case's work.

    Attributes:
        name: short name.
        call: does the work once and waits for it. One that starts a process returns the seconds
            that the work took in there (a float), which count instead of its own.
        units: how many units of work one call does (steps, samples, denoiser calls, ...).
        compile_s: time spent in lowering and compiling, None where nothing is compiled.
    """

    name: str
    call: Callable[[], Any]
    units: int = 1
    compile_s: float | None = None


class Case(NamedTuple):
    """Something to time: a name, the unit of work, and how to make its variants for a size."""

    name: str
    unit: str
    build: Callable[[str], Sequence[Variant]]
    bar: str = ""
    """What is promised, in words."""
    most_rounds: int | None = None
    """Fewer rounds than usual, for a case whose calls repeat the work themselves."""


def jitted(name: str, fn: Callable[..., Any], *args: Any, units: int = 1) -> Variant:
    """Return the variant that runs ``jit(fn)(*args)``, compiled here and timed apart."""
    begin = time.perf_counter()
    program = jax.jit(fn).lower(*args).compile()
    compile_s = time.perf_counter() - begin
    return Variant(name, lambda: jax.block_until_ready(program(*args)), units, compile_s)


def run(case: Case, size: str, repeats: int | None = None) -> dict[str, Any]:
    """Return a case's timings, ready for JSON; times per unit of work are in milliseconds."""
    variants = case.build(size)
    firsts = [_timed(variant.call) for variant in variants]
    times: list[list[float]] = [[] for _ in variants]
    rounds = REPEATS[size] if repeats is None else repeats
    for _ in range(min(rounds, case.most_rounds or rounds)):
        for variant, taken in zip(variants, times, strict=True):
            taken.append(_timed(variant.call))
    rows = []
    for variant, first, taken in zip(variants, firsts, times, strict=True):
        ratios = [
            (mine / variant.units) / (other / variants[0].units)
            for mine, other in zip(taken, times[0], strict=True)
        ]
        rows.append(
            {
                "variant": variant.name,
                "compile_s": variant.compile_s,
                "first_call_s": first,
                "median_ms": 1e3 * statistics.median(taken) / variant.units,
                "min_ms": 1e3 * min(taken) / variant.units,
                "units": variant.units,
                "per_s": variant.units / statistics.median(taken),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        )
    return {"case": case.name, "unit": case.unit, "size": size, "bar": case.bar, "rows": rows}


def _timed(call: Callable[[], Any]) -> float:
    """Seconds of a call; the shortest of as many as fit into :data:`SHORT_S`."""
    least, start = math.inf, time.perf_counter()
    while True:
        begin = time.perf_counter()
        own = call()
        now = time.perf_counter()
        least = min(least, own if isinstance(own, float) else now - begin)
        if now - start > SHORT_S:
            return least


def environment() -> dict[str, Any]:
    """Return what timings depend on: versions, device, processors, revision."""
    packages = ("lowdim-diffusion", "jax", "jaxlib", "flax", "optax", "numpy")
    root = pathlib.Path(__file__).resolve().parents[1]
    git = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "revision": git.stdout.strip() or "unknown",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def table(result: dict[str, Any]) -> str:
    """Return a case's timings as text."""
    bar = f"   bar: {result['bar']}" if result["bar"] else ""
    lines = [f"{result['case']} ({result['size']}), per {result['unit']}{bar}"]
    heads = f"{'median':>11}{'min':>11}{'per s':>12}{'ratio':>8}{'spread':>14}{'compile':>9}"
    lines.append(f"  {'variant':<32}{heads}")
    for row in result["rows"]:
        compile_s = "" if row["compile_s"] is None else f"{row['compile_s']:.1f} s"
        spread = f"{row['ratio_min']:.2f}..{row['ratio_max']:.2f}"
        lines.append(
            f"  {row['variant']:<32}{row['median_ms']:>8.4g} ms{row['min_ms']:>8.4g} ms"
            f"{row['per_s']:>12,.1f}{row['ratio']:>8.2f}{spread:>14}{compile_s:>9}"
        )
    return "\n".join(lines)


def write(path: pathlib.Path, results: Sequence[dict[str, Any]]) -> None:
    """Write timings and environment as JSON; a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "results": list(results)}
    _files.write_atomic(path, json.dumps(content, indent=2) + "\n")


def finished(path: pathlib.Path, size: str) -> list[dict[str, Any]]:
    """Return the timings of a size that an earlier run left, if it was in this environment."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["environment"] | {"time": None} != environment() | {"time": None}:
        return []
    return [result for result in found["results"] if result["size"] == size]
