"""``python -m benchmarks.report RESULTS.json ... --out docs/benchmarks.md``: the published tables.

Nothing in the page is typed: numbers, bars, versions and commands come from the files that the
suite wrote.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from benchmarks.harness import duration

_INTRO = """\
# Benchmarks

Made by `python -m benchmarks.report`; do not edit. Variants of a case run in turn, several rounds
over; **ratio** is the median over the rounds of a variant's time to the first one's, with its
range. "of GEMM" is the share of the rate of square float32 products that was measured in the same
run, counting matrix products and convolutions only. Memory is what the compiled program holds:
arguments, results, temporaries. A bar is a promise on a ratio; it is met or missed here.
"""


def page(runs: list[dict[str, Any]]) -> str:
    """Return the page of some runs, one section each."""
    return "\n".join([_INTRO, *(_section(run) for run in runs)])


def _section(run: dict[str, Any]) -> str:
    at, roof = run["environment"], run.get("roof")
    sizes = sorted({result["size"] for result in run["results"]})
    rate = ""
    if roof:
        rate = (
            f", {roof['gemm_flops'] / 1e9:,.0f} GFLOP/s in float32 products, "
            f"{roof['bytes_per_s'] / 1e9:,.1f} GB/s"
        )
    lines = [
        f"## {at['device_kind']} x {at['device_count']}, {', '.join(sizes)}",
        "",
        f"{at['cpu_count']} CPUs{rate}; jax {at['jax']}, flax {at['flax']}, numpy {at['numpy']}, "
        f"Python {at['python']}; revision {at['revision']}, {at['time'][:10]}.",
        "",
    ]
    for result in run["results"]:
        lines += [*_case(result), ""]
    return "\n".join(lines)


def _case(result: dict[str, Any]) -> list[str]:
    command = f"python -m benchmarks --size {result['size']} --only {result['case']}"
    lines = [
        f"### {result['case']} ({result['size']})",
        "",
        f"Per {result['unit']}. `{command}`" + (f". {result['bar']}." if result["bar"] else ""),
        "",
        "| variant | median | least | ratio | range | of GEMM | memory | compile | bar |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in result["rows"]:
        share = "" if row["share_of_gemm"] is None else f"{row['share_of_gemm']:.0%}"
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.3g} MB"
        compile_s = "" if row["compile_s"] is None else f"{row['compile_s']:.1f} s"
        bars = "; ".join(
            f"{bar['ratio']:.3g} of {bar['against']}, at most {bar['at_most']:.3g}: "
            + ("met" if bar["met"] else "**missed**")
            for bar in row["bars"]
        )
        name = f"**{row['variant']}**" if row["ours"] else row["variant"]
        lines.append(
            f"| {name} | {duration(row['median_ms'])} | {duration(row['min_ms'])} "
            f"| {row['ratio']:.3g} | {row['ratio_min']:.3g}-{row['ratio_max']:.3g} "
            f"| {share} | {memory} | {compile_s} | {bars} |"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=pathlib.Path, nargs="+", metavar="RESULTS.json")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/benchmarks.md"))
    options = parser.parse_args(argv)
    try:
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
        text = page(runs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"not the files of this version of the suite: {error!r}", file=sys.stderr)
        return 2
    options.out.write_text(text, encoding="utf-8")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
