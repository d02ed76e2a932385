"""``memplan train`` in several processes: one training, as one process sees it on the same data."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.commands import PATHS

MODEL = """
import torch
from torch import nn


def build_model():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


def example_batch(batch_size):
    return torch.randn(batch_size, 8)


def train_batches(batch_size):
    while True:
        yield torch.randn(batch_size, 8)


def loss(output, batch):
    return (output - batch[:, :4]).square().mean()
"""


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    command = [sys.executable, "-W", "ignore", "-m", "memplan", "train", "net.py", "--no-tui", *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=200)


def steps(run_dir: Path, name: str = "events.jsonl") -> list[dict]:
    events = map(json.loads, (run_dir / name).read_text().splitlines())
    return [event for event in events if event["event"] == "step"]


def test_processes_whose_models_have_no_room_together_build_them_on_meta_and_train_the_same(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    whole = run(tmp_path, "--nproc", "2", "-b", "8", "--steps", "2", "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    plan = json.loads((tmp_path / "whole" / "plan.json").read_text())
    assert plan["on_meta"] is False
    (tmp_path / "meta.json").write_text(json.dumps({**plan, "on_meta": True}))
    meta = run(tmp_path, "--nproc", "2", "--plan", "meta.json", "--steps", "2", "--out", "meta")
    assert meta.returncode == 0, meta.stderr
    said = " ".join(meta.stdout.split())
    assert (
        "the model of each of 2 processes, 1.64 KiB in fp32, is too large for the host: it is made unit by unit" in said
    )
    losses = [[s["loss"] for s in steps(tmp_path / name)] for name in ("whole", "meta")]
    assert losses[0] == losses[1]


def test_two_processes_train_as_one_and_resume_as_one_more(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    two = run(tmp_path, "--nproc", "2", "-b", "8", "--steps", "3", "--out", "two")
    assert two.returncode == 0, two.stderr
    assert len(re.findall("finished at step 3", two.stdout)) == 1  # one process speaks for both
    plan = json.loads((tmp_path / "two" / "plan.json").read_text())
    assert plan["gpus"] == 2
    assert plan["micro_batch_size"] * plan["gradient_accumulation_steps"] == 4
    # What is shown beside one process's bytes is its part of the node's.
    start = json.loads((tmp_path / "two" / "events.jsonl").read_text().splitlines()[0])
    assert start["predicted_bytes"]["host"] == plan["prediction"]["host_bytes"] // 2
    assert start["budget_bytes"]["host"] == plan["budget"]["host_bytes"] // 2
    # Each process has the loss of all, and their batches are those that one process draws in turn.
    both = [[s["loss"] for s in steps(tmp_path / "two", name)] for name in ("events.jsonl", "events-1.jsonl")]
    assert both[0] == both[1]
    alone = {**plan, "gpus": 1, "zero_stage": 0, "gradient_accumulation_steps": 2 * plan["gradient_accumulation_steps"]}
    alone["prediction"] |= dict.fromkeys(("gpu_peak_bytes", "gpu_upper_bytes"), plan["budget"]["gpu_bytes"])
    (tmp_path / "alone.json").write_text(json.dumps(alone))
    one = run(tmp_path, "--plan", "alone.json", "--steps", "3", "--out", "one")
    assert one.returncode == 0, one.stderr
    for found, expected in zip(both[0], steps(tmp_path / "one"), strict=True):
        assert abs(found - expected["loss"]) < 1e-6
    resumed = run(tmp_path, "--nproc=2", "--steps", "4", "--out", "two", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert [s["step"] for s in steps(tmp_path / "two")] == [1, 2, 3, 4]


def test_each_process_drops_out_its_own(tmp_path: Path) -> None:
    model = MODEL.replace("nn.ReLU()", "Dropping()").replace(
        "def build_model",
        """class Dropping(nn.Module):
    def forward(self, x):
        kept = nn.functional.dropout(torch.ones(64), 0.5)
        if type(kept) is torch.Tensor:
            with open(f"kept-{os.environ['RANK']}.txt", "a") as file:
                print(kept.tolist(), file=file)
        return x * kept[:32]


def build_model""",
    )
    (tmp_path / "net.py").write_text("import os\n" + model)
    done = run(tmp_path, "--nproc", "2", "-b", "8", "--steps", "3", "--out", "run")
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"kept-{rank}.txt").read_text().splitlines()[-3:] for rank in range(2))
    assert len({*first, *second}) == 6
