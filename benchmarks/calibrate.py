"""Measure this machine as `memplan calibrate` does.

    python -m benchmarks.calibrate --nvme DIR --out benchmarks/results/calibration-h200.json

Prints how long each part took, the tables, and what was skipped; keeps nothing for later plans.
"""

import argparse
import time
from pathlib import Path

from rich.console import Console

from memplan.calibrate.run import calibrate
from memplan.show_rates import rates_tables


def main() -> None:
    """Measure, show and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvme", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    begun = time.perf_counter()
    rates = calibrate(args.nvme, lambda what: print(f"{time.perf_counter() - begun:6.1f} s  {what}", flush=True))
    rates.save(args.out)
    Console(width=160).print(rates_tables(rates))
    kernels = len(rates.kernels.rates) if rates.kernels is not None else 0
    print(f"{time.perf_counter() - begun:6.1f} s  done: {kernels} rates of kernels in {args.out}")


if __name__ == "__main__":
    main()
