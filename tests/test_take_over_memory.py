"""Taking over a model on meta holds little beside the tiers: it is never whole in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.measured_take_over import UNIT_BYTES, model
from tests.test_weight_files import save, saved

ROOT = Path(__file__).parent.parent
CONSTANT_BYTES = 24 << 20
"""Libraries that are loaded on the way, threads, and pieces of an allocator."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("source", ["its own initialisation", "files"])
def test_the_peak_beside_the_tiers_is_about_one_unit(source: str, tmp_path: Path) -> None:
    words = [str(save(saved(model()), tmp_path / "weights", shards=8))] if source == "files" else []
    command = [sys.executable, "-m", "tests.measured_take_over", str(tmp_path), *words]
    # What is freed goes back at once, so that one case does not hide in the leavings of another.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for case, size in json.loads(done.stdout.splitlines()[-1]).items():
        assert size <= 2 * UNIT_BYTES + CONSTANT_BYTES, (case, size / UNIT_BYTES)
