"""What a checkpoint in the background costs training: the example with a save in every other block of steps.

    python -m benchmarks.saving --blocks 12

Trains examples/gpt.py by the plan of ``make demo`` (state in all three tiers). Blocks of five steps with a save at
their beginning and without one take turns, so that what else the machine does falls on both; the difference of their
medians is the cost of one save, in seconds on the clock and of all the process's threads on the cores; what the disk
is busy with costs only the first. Writes results/saving.json.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import save
from examples.demo import BATCH_SIZE, MODEL
from memplan.described import find_machine
from memplan.plan_command import planned_for
from offload.checkpoint import step_tag
from offload.engine import Engine
from profiler.contract import call_model
from profiler.source import load_source

BLOCK, EVERY = 5, 50
"""Steps of a block, and between two checkpoints in the figure that is wanted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=12, help="Blocks of each kind.")
    wishes = parser.parse_args()
    source = load_source(MODEL)
    with tempfile.TemporaryDirectory(prefix="memplan-saving-") as folder:
        machine = find_machine(gpu_memory="96MiB", host_memory="32MiB", nvme=f"{folder}:256MiB")
        plan = planned_for(source, machine, BATCH_SIZE, None).plan
        model = source.build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        batches = source.train_batches(plan.micro_batch_size)
        rows = []
        with Engine(model, plan, optimizer, max_grad_norm=1.0) as engine:

            def block(saves: bool) -> None:
                began, began_cpu, saving = time.perf_counter(), time.process_time(), None
                if saves:
                    saving = engine.save_checkpoint(Path(folder) / "checkpoints", keep=2)
                for _ in range(BLOCK * plan.gradient_accumulation_steps):
                    batch = next(batches)
                    engine.backward(source.loss(call_model(engine, batch), batch))
                    engine.step()
                engine.finish()
                row = {"saves": saves, "first_step": engine.global_step - BLOCK, "seconds": time.perf_counter() - began}
                if saving is not None:
                    assert saving.path.name == step_tag(row["first_step"])
                    saving.wait()
                row["cpu_seconds"] = time.process_time() - began_cpu
                if saving is not None:
                    row |= {"saving_seconds": saving.seconds, "copied_seconds": saving.copied_seconds}
                    row |= {"bytes": saving.size_bytes, "staging_bytes": saving.staging_bytes}
                rows.append(row)
                print(row, flush=True)

            block(saves=False)
            rows.clear()  # the first steps are not like the others
            for number in range(2 * wishes.blocks):
                block(saves=bool(number % 2))
    facts = {}
    for what in ("seconds", "cpu_seconds"):
        without, beside = (statistics.median(r[what] for r in rows if r["saves"] is saves) for saves in (False, True))
        facts[what] = {
            "of_a_step": without / BLOCK,
            "of_a_save": beside - without,
            "share_at_every_50_steps": (beside - without) / (EVERY * without / BLOCK),
        }
    facts |= {
        "tiers": sorted({t for p in plan.placements for t in (p.parameters, p.optimizer)}),
    }
    print(save("saving", rows, **facts))
    print(facts)


if __name__ == "__main__":
    main()
