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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import peers, roof
from lowdim_diffusion import _files
from lowdim_diffusion.training import throughput

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
        compile_s: time spent in compiling, None where nothing is compiled.
        lower_s: time spent in tracing and lowering.
        flops: of the matrix products and convolutions of one call.
        peak_bytes: what the compiled program holds at most: arguments, results and temporaries.
        bars: what is promised beyond the size ``smoke``: at most so many times the time of the
            variant of that name.
        ours: whether this package does the work; others are yardsticks.
    """

    name: str
    call: Callable[[], Any]
    units: int = 1
    compile_s: float | None = None
    lower_s: float | None = None
    flops: float | None = None
    peak_bytes: int | None = None
    bars: Mapping[str, float] = {}
    ours: bool = True


class Case(NamedTuple):
    """Something to time: a name, the unit of work, and how to make its variants for a size."""

    name: str
    unit: str
    build: Callable[[str], Sequence[Variant]]
    bar: str = ""
    """What is promised, in words."""
    most_rounds: int | None = None
    """Fewer rounds than usual, for a case whose calls repeat the work themselves."""
    peers: tuple[str, ...] = ()
    """Modules of other libraries (``peers.INSTALL``) without which variants are left out."""


def jitted(
    name: str,
    fn: Callable[..., Any],
    *args: Any,
    units: int = 1,
    bars: Mapping[str, float] | None = None,
    ours: bool = True,
) -> Variant:
    """Return the variant that runs ``jit(fn)(*args)``, compiled here and timed apart."""
    begin = time.perf_counter()
    traced = jax.jit(fn).trace(*args)
    lowered = traced.lower()
    middle = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    return Variant(
        name,
        lambda: jax.block_until_ready(program(*args)),
        units,
        compile_s=end - middle,
        lower_s=middle - begin,
        flops=sum(throughput.count_flops(traced.jaxpr).values()) or None,
        peak_bytes=_peak_bytes(program),
        bars=bars or {},
        ours=ours,
    )


def _peak_bytes(program: Any) -> int | None:
    used = program.memory_analysis()
    if used is None:
        return None
    held = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
    return held - used.alias_size_in_bytes


def run(
    case: Case, size: str, repeats: int | None = None, measured_roof: roof.Roof | None = None
) -> dict[str, Any]:
    """Return a case's timings, ready for JSON; times per unit of work are in milliseconds."""
    variants = case.build(size)
    firsts = [_once(variant.call) for variant in variants]
    times: list[list[float]] = [[] for _ in variants]
    rounds = REPEATS[size] if repeats is None else repeats
    for _ in range(min(rounds, case.most_rounds or rounds)):
        for variant, taken in zip(variants, times, strict=True):
            taken.append(_timed(variant.call))
    each = {
        variant.name: [t / variant.units for t in taken]
        for variant, taken in zip(variants, times, strict=True)
    }
    rows = []
    for variant, first in zip(variants, firsts, strict=True):
        taken = each[variant.name]
        compared = ratios(taken, each[variants[0].name])
        rate = variant.flops and variant.flops / (min(taken) * variant.units)
        rows.append(
            {
                "variant": variant.name,
                "ours": variant.ours,
                "lower_s": variant.lower_s,
                "compile_s": variant.compile_s,
                "first_call_s": first,
                "median_ms": 1e3 * statistics.median(taken),
                "min_ms": 1e3 * min(taken),
                "units": variant.units,
                "per_s": 1 / statistics.median(taken),
                "ratio": statistics.median(compared),
                "ratio_min": min(compared),
                "ratio_max": max(compared),
                "flops_per_s": rate,
                "share_of_gemm": rate and measured_roof and rate / measured_roof.gemm_flops,
                "peak_bytes": variant.peak_bytes,
                "bars": [
                    {"against": name, "at_most": most, "ratio": found, "met": found <= most}
                    for name, most in variant.bars.items()
                    if name in each and size != "smoke"
                    for found in [statistics.median(ratios(taken, each[name]))]
                ],
                "times_ms": [1e3 * t for t in taken],
            }
        )
    missing = peers.missing(case.peers)
    about = {"case": case.name, "unit": case.unit, "size": size, "bar": case.bar}
    return {**about, "rows": rows, "missing": missing}


def ratios(mine: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [a / b for a, b in zip(mine, others, strict=True)]


def _once(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    own = call()
    return own if isinstance(own, float) else time.perf_counter() - begin


def _timed(call: Callable[[], Any]) -> float:
    """Seconds of a call; the shortest of as many as fit into :data:`SHORT_S`."""
    least, start = math.inf, time.perf_counter()
    while True:
        least = min(least, _once(call))
        if time.perf_counter() - start > SHORT_S:
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


def duration(ms: float) -> str:
    """Return a time with three figures and its unit.

    Examples:
        >>> duration(0.0123), duration(12.3), duration(12345.0)
        ('12.3 us', '12.3 ms', '12.3 s')
    """
    if ms < 1:
        return f"{1e3 * ms:.3g} us"
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def table(result: dict[str, Any]) -> str:
    """Return a case's timings as text."""
    bar = f"   bar: {result['bar']}" if result["bar"] else ""
    lines = [f"{result['case']} ({result['size']}), per {result['unit']}{bar}"]
    heads = f"{'median':>11}{'min':>11}{'per s':>12}{'ratio':>8}{'spread':>14}"
    lines.append(f"  {'variant':<32}{heads}{'of GEMM':>9}{'memory':>11}{'compile':>9}")
    for row in result["rows"]:
        compile_s = "" if row["compile_s"] is None else f"{row['compile_s']:.1f} s"
        spread = f"{row['ratio_min']:.2f}..{row['ratio_max']:.2f}"
        share = "" if row["share_of_gemm"] is None else f"{row['share_of_gemm']:.0%}"
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.3g} MB"
        lines.append(
            f"  {row['variant']:<32}{duration(row['median_ms']):>11}{duration(row['min_ms']):>11}"
            f"{row['per_s']:>12,.1f}{row['ratio']:>8.2f}{spread:>14}"
            f"{share:>9}{memory:>11}{compile_s:>9}"
        )
        lines += [
            f"    {'met' if b['met'] else 'MISSED'}: {b['ratio']:.3g} of {b['against']}, "
            f"at most {b['at_most']:g}"
            for b in row["bars"]
        ]
    lines += [
        f"  left out, {module} is not installed: {command}"
        for module, command in result["missing"].items()
    ]
    return "\n".join(lines)


def write(
    path: pathlib.Path,
    results: Sequence[dict[str, Any]],
    measured_roof: roof.Roof | None = None,
) -> None:
    """Write timings and environment as JSON; a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    roofs = measured_roof and measured_roof._asdict()
    content = {"environment": environment(), "roof": roofs, "results": list(results)}
    _files.write_atomic(path, json.dumps(content, indent=2) + "\n")


def finished(path: pathlib.Path, size: str) -> list[dict[str, Any]]:
    """Return the timings of a size that an earlier run left, if it was in this environment."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["environment"] | {"time": None} != environment() | {"time": None}:
        return []
    return [result for result in found["results"] if result["size"] == size]
