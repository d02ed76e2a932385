"""Taking over a model holds little beside the tiers, or the model where it was built whole: [Note: the start]."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload.attach import host_bytes_of, in_turn
from offload.plan import Precision
from offload.residency import Footprint, host_bytes_of_unit
from offload.shards import Shards
from offload.unit import partition
from tests.measured_take_over import UNIT_BYTES, model
from tests.models import GPT
from tests.plans import EVERY_TIER, plan_for
from tests.test_weight_files import save, saved

ROOT = Path(__file__).parent.parent
CONSTANT_BYTES = 24 << 20
"""Libraries that are loaded on the way, threads, and pieces of an allocator."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("source", ["its own initialisation", "files", "a model built whole"])
def test_the_peak_beside_the_tiers_is_that_of_one_unit_on_its_way(source: str, tmp_path: Path) -> None:
    words = [str(save(saved(model()), tmp_path / "weights", shards=8))] if source == "files" else []
    words = ["whole"] if source == "a model built whole" else words
    command = [sys.executable, "-m", "tests.measured_take_over", str(tmp_path), *words]
    # What is freed goes back at once, so that one case does not hide in the leavings of another.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for case, size in json.loads(done.stdout.splitlines()[-1]).items():
        assert size <= 2 * UNIT_BYTES + CONSTANT_BYTES, (case, size / UNIT_BYTES)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("processes", [1, 4])
def test_between_the_two_ends_no_more_is_held_than_at_the_larger_one(precision: Precision, processes: int) -> None:
    network = GPT(layers=6)
    several = {"gpus": processes, "zero_stage": 1} if processes > 1 else {}
    plan = plan_for(network, EVERY_TIER[::-1], Path("/nowhere"), precision, **several)
    shards, form = Shards.of(plan), plan.state_format
    units = partition(network, plan.placements, shards)
    held = [host_bytes_of(units)]
    cpu = torch.device("cpu")
    for unit in in_turn(network, units, plan, cpu, Footprint(0, 0, 0), None):
        kept = host_bytes_of_unit(unit.shape, unit.placement, form, shards)
        held.append(held[-1] + kept - host_bytes_of([unit]))
    assert len(held) == len(units) + 1
    assert max(held) == max(held[0], held[-1])
