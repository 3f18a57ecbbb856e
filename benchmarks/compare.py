"""``python -m benchmarks.compare OLD.json NEW.json``: what has become slower?

What counts is a variant of ours against the yardsticks of its case (other people's code, bare
calls, a matrix product), which ran in turn with it: their ratio stays what it is when the machine
is slower today. A case without a yardstick is compared by its time, scaled by the rate of matrix
products in the two runs. A variant has become slower if the change is larger than the tolerance
and the ranges of the rounds do not overlap. Exit code 1 if there is one, 2 if nothing is common.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
from typing import Any, NamedTuple

from benchmarks.harness import ratios


class Change(NamedTuple):
    """A variant in two runs: new over old, below 1 where it has become faster."""

    case: str
    size: str
    variant: str
    against: str
    """The yardsticks, or how the time was scaled."""
    ratio: float
    low: float
    high: float

    def is_slower(self, tolerance: float) -> bool:
        """Whether it is slower by more than the tolerance, in all pairs of rounds."""
        return self.ratio > 1 + tolerance and self.low > 1


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Return every variant of ours that both runs hold at the same size."""
    before = {(r["case"], r["size"]): _rows(r) for r in old["results"]}
    scale, how = 1.0, "time, as it is"
    if old.get("roof") and new.get("roof"):
        scale = new["roof"]["gemm_flops"] / old["roof"]["gemm_flops"]
        how = "time, by the rate of matrix products"
    found = []
    for result in new["results"]:
        then = before.get((result["case"], result["size"]), {})
        now = _rows(result)
        for name in [n for n, row in now.items() if row["ours"] and n in then]:
            rules = [n for n, row in now.items() if not row["ours"] and n in then]
            a, b = then[name]["times_ms"], now[name]["times_ms"]
            if rules:
                pairs = [
                    (ratios(a, then[r]["times_ms"]), ratios(b, now[r]["times_ms"])) for r in rules
                ]
            else:
                pairs = [(a, [t * scale for t in b])]
            middle = _mean([statistics.median(y) / statistics.median(x) for x, y in pairs])
            low = _mean([min(y) / max(x) for x, y in pairs])
            high = _mean([max(y) / min(x) for x, y in pairs])
            against = ", ".join(rules) or how
            found.append(Change(result["case"], result["size"], name, against, middle, low, high))
    return found


def _rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in result["rows"]}


def _mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def table(found: list[Change], tolerance: float) -> str:
    """Return one line per variant."""
    width = max(len(f"{c.case} ({c.size}): {c.variant}") for c in found)
    lines = [f"{'new / old':<{width}}{'':>8}{'range':>14}   against"]
    for c in found:
        mark = "  SLOWER" if c.is_slower(tolerance) else ""
        lines.append(
            f"{f'{c.case} ({c.size}): {c.variant}':<{width}}{c.ratio:>8.2f}"
            f"{f'{c.low:.2f}..{c.high:.2f}':>14}   {c.against}{mark}"
        )
    return "\n".join(lines)


def draw(found: list[Change], tolerance: float, path: pathlib.Path) -> None:
    """Write a picture of all changes with their ranges."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.28 * len(found)))
    axes = figure.subplots()
    for i, c in enumerate(found):
        colour = "tab:red" if c.is_slower(tolerance) else "tab:blue"
        axes.plot([c.low, c.high], [i, i], color=colour, linewidth=1.5)
        axes.plot([c.ratio], [i], "o", color=colour, markersize=5)
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(found)), [f"{c.case} ({c.size}): {c.variant}" for c in found])
    axes.invert_yaxis()
    axes.set_xlabel("time, new / old (range of the rounds)")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main(argv: list[str] | None = None) -> int:
    """Print the changes; return 1 if something has become slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=pathlib.Path, metavar="OLD.json")
    parser.add_argument("new", type=pathlib.Path, metavar="NEW.json")
    parser.add_argument("--tolerance", type=float, default=0.1, help="of the ratio (default 0.1)")
    parser.add_argument("--figure", type=pathlib.Path, metavar="FILE.png")
    options = parser.parse_args(argv)
    runs = []
    for path in (options.old, options.new):
        try:
            runs.append(json.loads(path.read_text(encoding="utf-8")))
            rows = [row for result in runs[-1]["results"] for row in result["rows"]]
            if any("times_ms" not in row for row in rows):
                raise KeyError("times_ms")
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{path} is not a benchmarks.json of this version ({error!r})", file=sys.stderr)
            return 2
    found = changes(*runs)
    if not found:
        print("the two runs have no case of the same size in common", file=sys.stderr)
        return 2
    kinds = [run["environment"]["device_kind"] for run in runs]
    if kinds[0] != kinds[1]:
        print(f"note: on different devices, {kinds[0]} and {kinds[1]}")
    print(table(found, options.tolerance))
    if options.figure:
        draw(found, options.tolerance, options.figure)
    slower = [c for c in found if c.is_slower(options.tolerance)]
    if slower:
        print(f"{len(slower)} of {len(found)} slower by more than {options.tolerance:.0%}")
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
