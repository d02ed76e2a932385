"""The figures of a run of the demo, from the events it left.

python -m benchmarks.demo runs/demo-TIME/train
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.common import save
from tui.source import EVENTS, Tail

AVERAGED = 10
"""Steps at the end over which the loss is averaged, as ``memplan train`` does."""


def main() -> None:
    """Read the run's events, save its losses, its peaks beside the prediction, and its median step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    events = list(Tail(parser.parse_args().run / EVENTS).poll())
    run = next(e for e in events if e["event"] == "run")
    steps = [e for e in events if e["event"] == "step"]
    row = {
        "first_loss": steps[0]["loss"],
        "last_loss": statistics.mean(e["loss"] for e in steps[-AVERAGED:]),
        "steps": len(steps),
        "peak_bytes": steps[-1]["peak_bytes"],
        "predicted_bytes": run["predicted_bytes"],
        "median_step_seconds": statistics.median(e["seconds"] for e in steps),
        "predicted_step_seconds": run["predicted_step_seconds"],
    }
    print(save("demo", [row], model=run["model"], parameters=run["parameters"]))


if __name__ == "__main__":
    main()
