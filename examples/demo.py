"""The whole of memplan in a few minutes on any computer: profile, plan, train with offload, watch.

The compute device is the CPU with a GPU tier of 88 MiB beside it, the host tier is 20 MiB, and a temporary directory
is the NVMe tier: too little for the model's state, so that all three tiers are used. Prints each command as it is run.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

MODEL = Path(__file__).parent / "gpt.py"
STEPS, BATCH_SIZE = 240, 16
BUDGETS = ("--gpu-memory", "88MiB", "--host-memory", "20MiB")


def run(*words: object) -> int:
    """One memplan command, shown as a person would type it."""
    print(f"\n$ memplan {shlex.join(str(word) for word in words)}", flush=True)
    # The CPU computes here, on a machine with GPUs too.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "memplan", *map(str, words)], env=environment, check=False).returncode


def main() -> int:
    """Run the commands one after another; stops at the first that fails."""
    model = MODEL.relative_to(Path.cwd()) if MODEL.is_relative_to(Path.cwd()) else MODEL
    out = Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    plan, train = out / "plan" / "plan.json", out / "train"
    with tempfile.TemporaryDirectory(prefix="memplan-demo-") as nvme:
        for words in (
            ("profile", model, "--batch-size", BATCH_SIZE),
            ("plan", model, *BUDGETS, "--batch-size", BATCH_SIZE, "--nvme", f"{nvme}:256MiB", "--out", plan.parent),
            ("train", model, "--plan", plan, "--steps", STEPS, "--learning-rate", "1e-3", "--out", train),
            ("report", train),
        ):
            if code := run(*words):
                return code
    print(f"\nThe run is in {out}: plan/plan.json, plan/ds_config.json, train/events.jsonl, train/report.html.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
