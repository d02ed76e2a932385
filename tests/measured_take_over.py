"""Run as a process of its own: the host memory that taking a model over takes, by case, as JSON.

That is, beside its tiers, or where it was built whole beside the larger of model and tiers.

python -m tests.measured_take_over FOLDER [WEIGHTS | whole]
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from torch import nn

from offload.engine import Engine
from offload.on_meta import on_meta
from offload.plan import Buckets, Placement, Precision, Tier
from offload.residency import footprint
from offload.unit import partition
from tests.models import GPT
from tests.plans import RESIDENT, G, H, N, plan_for

BLOCKS, LINEARS, WIDTH = 10, 4, 1024
UNIT_BYTES = LINEARS * WIDTH * WIDTH * 4
CASES = {"gpu": (G, G, G), "host": (H, H, H), "nvme": (N, G, N)}


def model() -> nn.Module:
    """Blocks of 16 MiB in fp32, all but alone."""
    blocks = (nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LINEARS))) for _ in range(BLOCKS))
    return nn.ModuleDict({"h": nn.ModuleList(blocks), "norm": nn.LayerNorm(WIDTH)})


def resident_bytes(key: str) -> int:
    """``VmRSS``, what this process holds now, or ``VmHWM``, the most since the last ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) << 10


def forget_peak() -> None:
    """Begin anew to look for the most."""
    Path("/proc/self/clear_refs").write_text("5")


def beside_bytes(
    tiers: tuple[Tier, Tier, Tier], precision: Precision, folder: Path, weights: Path | None, *, whole: bool
) -> int:
    """The most that was held while the engine was made, less the tiers or the model."""
    forget_peak()
    before = resident_bytes("VmRSS")
    with nullcontext() if whole else on_meta():
        network = model()
    placements = (Placement("", *RESIDENT), *(Placement(f"h.{i}", *tiers) for i in range(BLOCKS)))
    plan = replace(
        plan_for(GPT(layers=1), (RESIDENT,), folder, precision),
        parameter_shapes={name: tuple(p.shape) for name, p in network.named_parameters()},
        placements=placements,
        buckets=Buckets(),
    )
    shapes = [unit.shape for unit in partition(network, placements)]
    held = footprint(shapes, placements, plan.buckets, plan.state_format)
    engine = Engine(network, plan, weights=weights)
    most = resident_bytes("VmHWM")
    engine.close()
    built = sum(p.nbytes for p in network.parameters()) if whole else 0
    return most - before - max(built, held.gpu_bytes + held.host_bytes)


def main() -> None:
    """One figure a case; the first run of each kind warms up."""
    folder, word = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    weights, whole = Path(word) if word not in (None, "whole") else None, word == "whole"
    beside_bytes(CASES["nvme"], Precision.BF16, folder, weights, whole=whole)
    found = {
        f"{name} {precision}": beside_bytes(tiers, precision, folder, weights, whole=whole)
        for name, tiers in CASES.items()
        for precision in (Precision.FP32, Precision.BF16)
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
