"""Plans made by hand, for tests of the runtime that need no planner."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

from torch import nn

from offload.plan import Buckets, Budget, Placement, Plan, Precision, Prediction, Tier
from offload.residency import footprint
from offload.shards import Shards
from offload.unit import partition

G, H, N = Tier.GPU, Tier.HOST, Tier.NVME
RESIDENT = (G, G, G)
EVERY_TIER = ((G, G, G), (G, G, H), (G, H, N), (H, H, H), (H, G, N), (N, H, N))
"""Each way in which a unit can be placed with something away, and one with nothing away."""


def units_of(model: nn.Module) -> list[str]:
    """The root unit, and every block or other module with parameters at the top of a GPT."""
    paths = [f"h.{i}" for i in range(len(model.h))]
    return ["", *(n for n, m in model.named_children() if n != "h" and any(True for _ in m.parameters())), *paths]


def plan_for(
    model: nn.Module,
    placements: tuple[tuple[Tier, Tier, Tier], ...],
    nvme_dir: Path | None = None,
    precision: Precision = Precision.FP32,
    device: str = "cpu",
    units: Sequence[str] = (),
    **changes: object,
) -> Plan:
    """A plan that deals the placements out to the model's units, over and over; ``units`` of what is no GPT."""
    units = units or units_of(model)
    plan = Plan(
        model=type(model).__name__,
        parameter_shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        precision=precision,
        device=device,
        gpus=1,
        zero_stage=0,
        placements=tuple(Placement(u, *p) for u, p in zip(units, islice(cycle(placements), len(units)), strict=True)),
        # Chunks smaller than a unit, so that every stream really has several.
        buckets=Buckets(prefetch_units=1, update_elements=5000, io_bytes=16384),
        micro_batch_size=4,
        gradient_accumulation_steps=1,
        recompute=(),
        budget=Budget(1 << 40, 1 << 40, 1 << 40),
        prediction=Prediction(0, 0, 0, 0, None, None),
        nvme_dir=str(nvme_dir) if nvme_dir else None,
    )
    return replace(plan, **changes)


def counted(plan: Plan, model: nn.Module) -> Plan:
    """The plan with the bytes that it takes, as whoever trains by it asks of a plan: of the model's state alone."""
    shards = Shards.of(plan)
    shapes = [unit.shape for unit in partition(model, plan.placements, shards)]
    held = footprint(shapes, plan.placements, plan.buckets, plan.state_format, plan.gpu_update_share, shards)
    host_bytes, nvme_bytes = plan.gpus * held.host_bytes, plan.gpus * held.nvme_bytes
    most = {"gpu_upper_bytes": held.gpu_bytes, "host_upper_bytes": host_bytes}
    return replace(plan, prediction=Prediction(held.gpu_bytes, host_bytes, host_bytes, nvme_bytes, None, None, **most))
