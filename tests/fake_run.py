"""A made-up run, for tests of what watches runs: a plan and events that look like those of a real one."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offload.plan import Alternative, Buckets, Budget, Placement, Plan, Precision, Prediction, Tier
from tui.view import RunView, fold

MIB = 1 << 20
START = 1_760_000_000.0
STEP_SECONDS = 0.41
BLOCKS = 8


def make_plan(nvme_dir: str | None = "swap", last_units_on: Tier = Tier.NVME) -> Plan:
    """The plan of a GPT of eight blocks; the optimizer state of the later ones overflows to disk."""
    units = ["", *(f"blocks.{i}" for i in range(BLOCKS)), "head"]
    tiers = [(Tier.GPU, Tier.GPU)] + [(Tier.GPU, Tier.HOST)] * 3 + [(Tier.HOST, Tier.HOST)] * 3
    tiers += [(Tier.HOST, last_units_on)] * (len(units) - len(tiers))
    return Plan(
        model="gpt.py",
        parameter_shapes={f"{u or 'embed'}.weight": (1 << 10, 1 << 10) for u in units},
        precision=Precision.BF16,
        device="cpu",
        gpus=1,
        zero_stage=0,
        placements=tuple(
            Placement(u, p, Tier.GPU if o is Tier.GPU else Tier.HOST, o) for u, (p, o) in zip(units, tiers, strict=True)
        ),
        buckets=Buckets(),
        micro_batch_size=8,
        gradient_accumulation_steps=2,
        recompute=tuple(f"blocks.{i}" for i in range(BLOCKS)),
        budget=Budget(96 * MIB, 64 * MIB, 512 * MIB),
        prediction=Prediction(41 * MIB, 52 * MIB, 48 * MIB, 118 * MIB, 0.38, "nvme", {"compute": 0.3, "nvme": 0.38}),
        nvme_dir=nvme_dir,
        reasons=("The optimizer state needs 170 MiB; 52 MiB fit in host memory.", "The rest goes to nvme."),
        alternatives=(Alternative("everything on gpu", 0.31, 190 * MIB, 0, 0, "94 MiB short on gpu"),),
    )


def run_event(plan: Plan, steps: int, first_step: int = 1) -> dict[str, Any]:
    """The ``run`` event of the plan."""
    p = plan.prediction
    return {
        "event": "run",
        "time": START,
        "model": plan.model,
        "device": plan.device,
        "precision": plan.precision.value,
        "parameters": 10_812_416,
        "pid": 1,
        "first_step": first_step,
        "last_step": steps,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "budget_bytes": {
            "gpu": plan.budget.gpu_bytes,
            "host": plan.budget.host_bytes,
            "nvme": plan.budget.nvme_bytes,
        },
        "predicted_bytes": {"gpu": p.gpu_peak_bytes, "host": p.host_bytes, "nvme": p.nvme_bytes},
        "predicted_step_seconds": p.step_seconds,
        "bottleneck": p.bottleneck,
        "units": [
            {
                "name": u.unit,
                "elements": 1 << 20,
                "parameters": u.parameters.value,
                "gradients": u.gradients.value,
                "optimizer": u.optimizer.value,
            }
            for u in plan.placements
        ],
    }


def now_events(plan: Plan, step: int, start: float) -> Iterator[dict[str, Any]]:
    """What the units do in one step."""
    names = [p.unit for p in plan.placements]
    order = (
        [("forward", n) for n in names] + [("backward", n) for n in reversed(names)] + [("update", n) for n in names]
    )
    for i, (phase, unit) in enumerate(order):
        ahead = order[(i + 1) % len(order)][1]
        link = {"forward": "host_to_device", "backward": "device_to_host", "update": "nvme_read"}[phase]
        flights = [{"unit": ahead, "link": link}]
        if phase == "update" and i % 2:
            flights.append({"unit": order[i - 1][1], "link": "nvme_write"})
        time = start + STEP_SECONDS * i / len(order)
        yield {"event": "now", "time": time, "step": step, "phase": phase, "unit": unit, "in_flight": flights}


def step_event(step: int, start: float) -> dict[str, Any]:
    """The measurements of one step, with a reproducible wobble."""
    wobble = math.sin(step * 12.9898) * 0.5 + math.sin(step * 4.1) * 0.5
    seconds = STEP_SECONDS * (1 + 0.06 * wobble) + (0.3 if step % 50 == 0 else 0)
    return {
        "event": "step",
        "time": start + STEP_SECONDS,
        "step": step,
        "loss": 2.2 + 3.3 * math.exp(-step / 45) + 0.09 * wobble,
        "gradient_norm": 0.6 + 2.0 * math.exp(-step / 30) + 0.15 * abs(wobble),
        "learning_rate": 3e-4 * min(step / 20, 1.0) * (0.5 + 0.5 * math.cos(step / 400 * math.pi)),
        "seconds": seconds,
        "tokens": 8 * 2 * 256,
        "memory_bytes": {"gpu": 37.2 * MIB, "host": 51.5 * MIB, "nvme": 118 * MIB},
        "peak_bytes": {"gpu": 40.3 * MIB, "host": 51.5 * MIB, "nvme": 118 * MIB},
        "traffic_bytes": {
            "host_to_device": int(MIB * (12.3 + wobble)),
            "device_to_host": int(MIB * (8.1 + wobble / 2)),
            "nvme_read": int(MIB * (59 + 4 * wobble)),
            "nvme_write": int(MIB * (59 + 4 * wobble)),
        },
    }


def make_events(done: int = 128, steps: int = 400, end: str | None = None) -> list[dict[str, Any]]:
    """A run of ``steps`` steps of which ``done`` are complete, in the middle of the next one or at its end."""
    plan = make_plan()
    events = [run_event(plan, steps), {"event": "note", "time": START + 0.1, "message": "pinned memory: 48.0 MiB"}]
    time = START + 0.5
    for step in range(1, done + 1):
        events.extend(list(now_events(plan, step, time))[:: 1 if step == done else 10])
        events.append(step_event(step, time))
        time += STEP_SECONDS
        if step % 100 == 0:
            path = f"checkpoint-{step}"
            events.append(
                {"event": "checkpoint", "time": time, "step": step, "path": path, "seconds": 0.42, "bytes": 130 * MIB}
            )
    if end is None:
        return events + list(now_events(plan, done + 1, time))[:14]
    return [*events, {"event": "end", "time": time, "reason": end, "step": done, "message": ""}]


def rank_events(rank: int, ranks: int, late: int, done: int = 40) -> list[dict[str, Any]]:
    """What one of several ranks tells, of whom ``late`` keeps the others waiting, now too."""
    events = []
    for event in make_events(done):
        kind, changed = event["event"], dict(event)
        if kind == "run":
            changed |= {"rank": rank, "ranks": ranks, "host": f"node{rank // 2}", "session": "now"}
        if kind == "step":
            changed["waited_seconds"] = 0.002 + 0.0007 * rank if rank == late else 0.118 + 0.003 * rank
            changed["memory_bytes"] = {t: size * (1 + rank / 50) for t, size in event["memory_bytes"].items()}
        if kind != "checkpoint":
            events.append(changed)
    if rank != late:
        last = events[-1]
        waiting = {"event": "waiting", "inside": "gather of blocks.4 of step 41", "step": done + 1, "seconds": 3.0}
        events.append({**waiting, "time": last["time"] + 3})
    return events


def write_ranks(run_dir: Path, each: list[list[dict[str, Any]]]) -> None:
    """Write the plan and the events of all ranks into a directory that exists."""
    write_run(run_dir, each[0])
    for rank, events in enumerate(each[1:], 1):
        (run_dir / f"events-{rank}.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def write_run(run_dir: Path, events: list[dict[str, Any]]) -> None:
    """Write the plan and the events of a run into a directory that exists."""
    make_plan().save(run_dir / "plan.json")
    with (run_dir / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def folded(events: list[dict[str, Any]]) -> RunView:
    """The view after all events."""
    view = RunView()
    for event in events:
        view = fold(view, event)
    return view
