"""``python -m benchmarks --size smoke|small|medium|large --out DIR [--only CASE ...]``."""

import argparse
import pathlib
import sys

from benchmarks import harness


def main() -> int:
    """Run the chosen cases; print a table each, write ``DIR/benchmarks.json`` after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--size", choices=harness.SIZES, default="small")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/bench"))
    parser.add_argument("--only", nargs="+", metavar="CASE", help="names, or beginnings of names")
    parser.add_argument("--repeats", type=int, help="rounds over all variants of a case")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument(
        "--resume", action="store_true", help="keep the cases that DIR holds from this environment"
    )
    options = parser.parse_args()
    from benchmarks import roof
    from benchmarks.cases import CASES

    if options.list:
        print("\n".join(CASES))
        return 0
    chosen = {
        name: case
        for name, case in CASES.items()
        if not options.only or any(name.startswith(prefix) for prefix in options.only)
    }
    if not chosen:
        print(
            f"no case named {' '.join(options.only)}; there are: {', '.join(CASES)}",
            file=sys.stderr,
        )
        return 2
    measured = roof.measure()
    print(
        f"this device: {measured.gemm_flops / 1e9:,.0f} GFLOP/s in float32 products, "
        f"{measured.bytes_per_s / 1e9:,.1f} GB/s\n",
        flush=True,
    )
    results = harness.finished(options.out / "benchmarks.json", options.size) * options.resume
    for case in chosen.values():
        if any(result["case"] == case.name for result in results):
            print(f"{case.name}: kept", flush=True)
            continue
        results.append(harness.run(case, options.size, options.repeats, measured))
        print(harness.table(results[-1]), end="\n\n", flush=True)
        harness.write(options.out / "benchmarks.json", results, measured)
    print(f"written to {options.out / 'benchmarks.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
