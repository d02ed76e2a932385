"""Measure this machine's CUDA device for the prediction of step times.

    python -m benchmarks.calibrate --out benchmarks/results/calibration-h200.json

Prints how long each part took, and every measurement that was skipped.
"""

import argparse
import time
from pathlib import Path

from profiler.calibrate import calibrate


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    begun = time.perf_counter()
    calibration = calibrate(lambda what: print(f"{time.perf_counter() - begun:6.1f} s  {what}", flush=True))
    calibration.save(out)
    print(f"{time.perf_counter() - begun:6.1f} s  done: {len(calibration.rates)} rates in {out}")
    for sentence in calibration.skipped:
        print(f"skipped {sentence}")


if __name__ == "__main__":
    main()
